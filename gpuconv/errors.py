"""The error and the warning that are gpuconv's own."""


class NoBackendError(RuntimeError):
    """Nothing can run the problem as asked; the message lists every implementation with its reasons and remedies."""


class DeviceFallbackWarning(UserWarning):
    """A GPU was asked for, none is usable, and the CPU ran instead."""
