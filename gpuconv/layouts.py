"""Orders of axes: which of a caller's axes is which, which shapes pair, and the views that implementations see."""

from __future__ import annotations

from typing import Any

LAYOUTS = ("NCHW", "NHWC")
KERNEL_LAYOUTS = ("OIHW", "HWIO", "OHWI")

PAIRINGS = """\
    x (H, W)         with k (KH, KW)                  gives (OH, OW)
    x (H, W)         with k (O, KH, KW)               gives (O, OH, OW)
    x (C, H, W)      with k (O, C/groups, KH, KW)     gives (O, OH, OW)
    x (N, C, H, W)   with k (O, C/groups, KH, KW)     gives (N, O, OH, OW)"""

# Axes of the kernel as given, in the order O I H W (or O H W).
_KERNEL_AXES = {
    ("OIHW", 4): (0, 1, 2, 3),
    ("HWIO", 4): (3, 2, 0, 1),
    ("OHWI", 4): (0, 3, 1, 2),
    ("OIHW", 3): (0, 1, 2),
    ("HWIO", 3): (2, 0, 1),
    ("OHWI", 3): (0, 1, 2),
}


def kernel_axes(kernel_layout: str, ndim: int) -> tuple[int, ...]:
    """The permutation that brings a kernel of rank 3 or 4 to the order O (I) H W."""
    return _KERNEL_AXES[kernel_layout, ndim]


def image_axes(layout: str, ndim: int) -> tuple[int, ...]:
    """The permutation that brings x (or the result) to channels first."""
    if layout == "NCHW" or ndim < 3:
        return tuple(range(ndim))
    return (*range(ndim - 3), ndim - 1, ndim - 3, ndim - 2)


def images(array: Any, layout: str, groups: int) -> Any:
    """A view of images or of their gradients as (N, groups, C // groups, H, W)."""
    view = array.transpose(image_axes(layout, array.ndim))[(None,) * (4 - array.ndim)]
    # Splitting an axis is a view for any strides.
    return view.reshape((view.shape[0], groups, view.shape[1] // groups, *view.shape[2:]))


def kernels(array: Any, kernel_layout: str, flip: bool, groups: int) -> Any:
    """A view of a kernel or of its gradient as (groups, O // groups, I, KH, KW), turned by 180° if asked."""
    if array.ndim == 1:  # the kernel that multiplies a constant image, whose gradient is that of the bias
        view = array[:, None, None, None]
    elif array.ndim == 2:
        view = array[None, None]
    else:
        view = array.transpose(kernel_axes(kernel_layout, array.ndim))
        view = view[:, None] if array.ndim == 3 else view
    view = view.reshape((groups, view.shape[0] // groups, *view.shape[1:]))
    return view[..., ::-1, ::-1] if flip else view


def four_dimensional(
    call: str,
    names: tuple[str, str],
    x_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    layout: str,
    kernel_layout: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes as (N, C, H, W) and (O, I, KH, KW), or a ValueError that says which pairings would work."""
    ranks = (len(x_shape), len(k_shape))
    if ranks not in ((2, 2), (2, 3), (3, 4), (4, 4)):
        hint = ""
        if names != ("x", "k"):  # a gradient, for which other calls help
            pass
        elif len(x_shape) in (3, 4) and len(k_shape) == 3:
            hint = "\nFor one filter over all channels, pass k[None]. There is no 3-D convolution."
        elif len(x_shape) in (3, 4) and len(k_shape) == 2:
            channels = x_shape[image_axes(layout, len(x_shape))[-3]]
            # A colour image as most libraries load it: channels last, whatever the default layout says.
            last = layout == "NHWC" or (x_shape[-1] in (3, 4) and channels not in (1, 3, 4))
            channels, rest = (x_shape[-1], ', layout="NHWC"') if last else (channels, "")
            hint = (
                f"\nTo filter each of the {channels} channels with the same kernel (depthwise):\n"
                f"    conv2d(x, np.broadcast_to(k, ({channels}, 1, *k.shape)), groups={channels}{rest})"
            )
        raise ValueError(
            f"{call}: {names[0]} of shape {x_shape} and {names[1]} of shape {k_shape} do not pair; what works:\n"
            f"{PAIRINGS}{hint}"
        )
    x = tuple(x_shape[axis] for axis in image_axes(layout, len(x_shape)))
    x = (1,) * (4 - len(x)) + x
    if len(k_shape) == 2:
        return x, (1, 1, *k_shape)
    k = tuple(k_shape[axis] for axis in kernel_axes(kernel_layout, len(k_shape)))
    return x, (k if len(k) == 4 else (k[0], 1, *k[1:]))


def check_channels(
    call: str,
    names: tuple[str, str],
    x_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    C: int,
    O: int,
    I: int,
    groups: int,
    axis: int,
    layout: str | None = None,
) -> None:
    """Refuse channel counts that do not fit each other or the groups; k's input channels are its ``axis``. An image of
    the other ``layout`` is pointed out.
    """
    x, k = names
    for name, channels in ((f"{x}'s channels", C), (f"{k}'s output channels", O)):
        if channels % groups:
            raise ValueError(
                f"{call}: groups must divide {name}; got groups={groups} and {channels} channels "
                f"({x} {x_shape}, {k} {k_shape})"
            )
    if I * groups != C:
        other = "NHWC" if layout == "NCHW" else "NCHW"
        swapped = layout and len(x_shape) > 2 and x_shape[image_axes(other, len(x_shape))[-3]] == I * groups
        hint = f"; or is it layout={other!r}?" if swapped else ""
        raise ValueError(
            f"{call}: {k} has {I} input channels per group (shape {k_shape}) but {x} has {C} channels "
            f"(shape {x_shape}) and groups={groups}; {k}.shape[{axis}] must be {x}'s channels // groups = {C // groups}"
            f"{hint}"
        )
