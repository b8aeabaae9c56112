"""Pictures in and out of arrays, and the contact sheet; the one module that knows Pillow."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from gpuconv.files import write_bytes
from gpuconv.filters import NamedKernel

Floats = npt.NDArray[np.float32]

# Pillow widens these to 16 bits per sample without loss; its other modes hold 8.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# What we write and what each holds. Listed, because Pillow writes more of them than it keeps the pixels of: WebP would
# clip 16 bits, PPM drop the alpha, ICO shrink the picture, all without a word.
_FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"alpha": True, "16-bit": True},
    "TIFF": {"alpha": True, "16-bit": True, "options": {"compression": "tiff_adobe_deflate"}},
    "JPEG2000": {"alpha": True, "16-bit": True},
    "WEBP": {"alpha": True, "options": {"quality": 92}},
    "AVIF": {"alpha": True, "options": {"quality": 90}},
    "TGA": {"alpha": True},
    "PPM": {"16-bit": True},
    "JPEG": {"options": {"quality": 92}},
    "BMP": {},
    "GIF": {},
}


@dataclass(frozen=True)
class Picture:
    """``pixels``, float32 (H, W) or (H, W, 3) from 0 to ``peak`` (255 or 65535), and what is not filtered."""

    pixels: Floats
    peak: int
    alpha: Image.Image | None = None
    profile: bytes | None = None
    notes: tuple[str, ...] = ()


def read(path: Path) -> Picture:
    """The picture in ``path``, upright, of its first frame; ValueError, in one line, where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow only warns of a picture that would fill the memory until it is twice that size.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                # Pillow's decoders keep 8 of the 16 bits of colour; only the raw mode tells.
                reduced = ";16" in str(image.tile) and image.mode not in _DEEP
                image.load()
                return _split(ImageOps.exif_transpose(image), reduced)
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {path}: not a picture of a known format") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        raise ValueError(f"cannot read {path}: {error or type(error).__name__}") from error


def _split(image: Image.Image, reduced: bool) -> Picture:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers; convert the picture to 8 or 16 bits first")
    if image.mode in _DEEP:
        deep = np.asarray(image, dtype=np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("pixels are 32-bit numbers; convert the picture to 8 or 16 bits first")
        return Picture(deep.astype(np.float32), 65535)
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    # A profile describes the colours as they were stored; it does not fit a converted picture.
    profile = image.info.get("icc_profile") if image.mode in ("L", "RGB", "RGBA") else None
    notes = ("16-bit colour is read as 8-bit",) if reduced else ()
    return Picture(np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32), 255, alpha, profile, notes)


def photograph() -> Image.Image:
    """The photograph that comes with the library, RGB."""
    with resources.files("gpuconv").joinpath("data/coffee.jpg").open("rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def to_display(y: npt.NDArray[Any], peak: int, style: str, gain: float = 1.0) -> Floats:
    """Filter responses as pixel values: whole numbers from 0 to ``peak``, in float32.

    Parameters
    ----------
    y : numpy.ndarray
        Responses, any shape.
    peak : int
        The value of white.
    style : {"plain", "magnitude", "signed"}
        ``gain·y``, ``|gain·y|``, or ``(peak + gain·y) / 2``: no response is mid-grey, and a response as large as white
        reaches the end of the range.
    gain : float, default 1
        Factor on the responses.
    """
    y = np.nan_to_num(np.asarray(y, dtype=np.float64) * gain)
    values = {"plain": y, "magnitude": np.abs(y), "signed": (peak + y) / 2}[style]
    shown: Floats = np.clip(np.rint(values), 0, peak).astype(np.float32)
    return shown


def format_for(path: Path) -> str:
    """The format that ``path``'s extension names; ValueError where we write none such, or path is a directory."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    Image.init()
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    if name not in _FORMATS or name not in Image.SAVE:
        what = f"the extension {path.suffix}" if path.suffix else "a name without an extension"
        raise ValueError(f"cannot write {path}: no picture format goes with {what}; try .png, .jpg, .tif or .webp")
    return name


def write(path: Path, pixels: Floats, original: Picture) -> tuple[str, ...]:
    """Write ``pixels``, which ``to_display`` made, with the original's alpha; returns what the format cannot hold."""
    name = format_for(path)
    notes = []
    if original.peak == 255:
        image = Image.fromarray(pixels.astype(np.uint8))
    elif "16-bit" in _FORMATS[name]:
        image = Image.fromarray(pixels.astype(np.uint16))
    else:
        image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
        notes.append(f"{name} holds 8 bits per pixel, not 16")
    if original.alpha is not None and "alpha" in _FORMATS[name]:
        image.putalpha(original.alpha)
    elif original.alpha is not None:
        notes.append(f"{name} cannot hold the transparency, which was left out")
    _encode(path, image, **({"icc_profile": original.profile} if original.profile else {}))
    return tuple(notes)


def _encode(path: Path, image: Image.Image, **options: Any) -> int:
    """Write ``image`` in the format of ``path``; returns the bytes written."""
    name = format_for(path)
    buffer = io.BytesIO()  # so that what cannot be encoded never reaches the disk
    try:
        image.save(buffer, format=name, **_FORMATS[name].get("options", {}), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path} as {name}: {error}") from error
    write_bytes(path, buffer.getvalue())
    return buffer.tell()


# The contact sheet. Sizes in pixels.
PANEL = (330, 220)
_MARGIN, _GAP, _LABEL, _HEAD, _FOOT = 36, 24, 80, 100, 44
_PAPER, _INK, _SOFT, _LINE = (250, 249, 246), (33, 33, 38), (112, 110, 108), (214, 210, 202)
_POSITIVE, _NEGATIVE = np.array((196, 78, 16.0)), np.array((20, 92, 168.0))


@dataclass(frozen=True)
class Panel:
    """One picture of the sheet: RGB of any size, its title and the line under it."""

    image: Image.Image
    title: str
    about: str
    kernel: NamedKernel | None = None


def in_two_inks(y: npt.NDArray[Any], faint: float, full: float) -> Image.Image:
    """Signed responses as ink on white paper: orange where positive, blue where negative.

    Up to ±``faint`` (the grain of the photograph) the paper stays white; at ±``full`` the ink is at its strongest.
    """
    strength = np.clip((np.abs(y) - faint) / (full - faint), 0, 1)[..., None] ** 0.7
    ink = np.where((y > 0)[..., None], _POSITIVE, _NEGATIVE)
    return Image.fromarray(np.rint(255 + (ink - 255) * strength).astype(np.uint8))


def contact_sheet(panels: list[Panel], title: str, subtitle: str, footer: str, columns: int = 4) -> Image.Image:
    """The panels in a grid of ``columns`` under a title, each with its name and its kernel."""
    rows = -(-len(panels) // columns)
    step_x, step_y = PANEL[0] + _GAP, PANEL[1] + _LABEL + _GAP
    size = (2 * _MARGIN + columns * step_x - _GAP, _HEAD + _FOOT + rows * step_y)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 24), title, _INK, _font(27))
    draw.text((_MARGIN, 60), subtitle, _SOFT, _font(16))
    for number, panel in enumerate(panels):
        x, y = _MARGIN + number % columns * step_x, _HEAD + number // columns * step_y
        sheet.paste(ImageOps.fit(panel.image, PANEL, Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + PANEL[0], y + PANEL[1]), outline=_LINE)
        below = y + PANEL[1] + 12
        draw.text((x, below), panel.title, _INK, _font(18))
        draw.text((x, below + 26), panel.about.replace("×", "x"), _SOFT, _font(14))
        if panel.kernel is not None:
            _draw_kernel(draw, panel.kernel, x + PANEL[0], below)
    draw.text((_MARGIN, size[1] - _FOOT), footer, _SOFT, _font(14))
    return sheet


def write_sheet(path: Path, sheet: Image.Image) -> int:
    """Write the sheet to ``path``; returns the bytes written."""
    return _encode(path, sheet, optimize=True)


def _draw_kernel(draw: ImageDraw.ImageDraw, kernel: NamedKernel, right: int, top: int) -> None:
    """The weights as a small matrix with its upper right corner at (right, top), tinted by sign and size."""
    # Larger than 3×3, the cells have no room for numbers, and the tint must do.
    cell_x, cell_y, size = (24, 18, 12) if len(kernel.rows) <= 3 else (63 // len(kernel.rows),) * 2 + (0,)
    largest = max(abs(weight) for row in kernel.rows for weight in row)
    left = right - cell_x * len(kernel.rows[0])
    signed = any(weight < 0 for row in kernel.rows for weight in row)
    for i, row in enumerate(kernel.rows):
        for j, weight in enumerate(row):
            ink = (_POSITIVE if weight > 0 else _NEGATIVE) if signed else np.array(_SOFT)
            tint = tuple(int(v) for v in np.rint(255 + (ink - 255) * 0.45 * abs(weight) / largest))
            box = (left + j * cell_x, top + i * cell_y, left + (j + 1) * cell_x, top + (i + 1) * cell_y)
            draw.rectangle(box, fill=tint, outline=_LINE)
            if size:
                middle = ((box[0] + box[2]) / 2 + 0.5, (box[1] + box[3]) / 2 + 0.5)
                draw.text(middle, str(weight), _INK, _font(size), anchor="mm")
    if kernel.divisor != 1:
        middle = (left - 8, top + cell_y * len(kernel.rows) / 2)
        draw.text(middle, f"1/{kernel.divisor} ·", _SOFT, _font(14), anchor="rm")


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)  # Aileron, which comes inside Pillow; it has no ×, − or arrows
