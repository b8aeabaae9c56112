"""The error and the warning that are gpuconv's own."""


class NoBackendError(RuntimeError):
    """Nothing can run the problem as asked; the message lists every implementation with its reasons and remedies.

    Raised for a forced ``backend`` that is missing or cannot serve the problem, and for ``device="cuda"`` without a
    usable GPU where ``GPUCONV_FALLBACK=error`` is set. It is a ``RuntimeError``.
    """


class DeviceFallbackWarning(UserWarning):
    """A GPU was asked for, none is usable, and the CPU ran instead; the message says what is missing.

    ``GPUCONV_FALLBACK=silent`` drops it, ``GPUCONV_FALLBACK=error`` makes it a ``NoBackendError``. It is a
    ``UserWarning``, so Python's warning filters apply too.
    """
