"""Image files in and out: bounded, checked, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MIN_SIDE = 16
MAX_SIDE = 16384
MAX_PIXELS = 64_000_000
"""What a file may hold. It is read in at most 16 bytes per pixel, a strip at a time: 1 GB for the largest."""
_STRIP = 1 << 16
"""Pixels that become numbers at once."""

# Formats we read. Pillow knows more, among them ones that start other programs.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# suffix -> Pillow's format and its options
_WRITE_FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
IMAGE_SUFFIXES: tuple[str, ...] = tuple(_WRITE_FORMATS)

# EXIF's tag of how the camera was held, and its values for a quarter turn.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, largest_side: int | None = None) -> Tensor:
    """Read an image file as float32 [1, 3, H, W] in [0, 1].

    Grey becomes RGB; 16-bit grey keeps its precision; CMYK and palettes are converted; an EXIF
    rotation is applied; what is transparent is composited over white; of an animation the first
    frame is read. Colour profiles are not applied. largest_side: a picture with a longer side is
    scaled down to it (antialiased bicubic) before its bytes become floats. Raises `TruePoseError`,
    naming the file, when it is missing, not a file, empty, damaged, not an image in PNG, JPEG,
    WebP, BMP, TIFF, GIF or PPM, or has a side under `MIN_SIDE`, a side over `MAX_SIDE`, or more
    than `max_pixels` pixels. Sizes are read from the header, before anything is decoded.
    """
    image = decode(path, max_pixels)
    deep = _is_deep_grey(image)
    with refusing_damage(f"image {Path(path)}"):
        size = image.size
        if largest_side is not None and max(size) > largest_side:
            size = reduced_size(size, largest_side)
            image = image if deep else _scaled(image, size)
        width, height = image.size
        pixels = torch.empty(1, 1 if deep else 3, height, width)
        rows = max(1, _STRIP // width)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            array = _grey_array(strip, path) if deep else _colour_array(strip)
            pixels[0, :, top : top + rows] = torch.from_numpy(array).permute(2, 0, 1)
    if size != image.size:
        pixels = F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True).clamp(0, 1)
    return pixels.expand(-1, 3, -1, -1).contiguous()


def reduced_size(size: tuple[int, int], largest_side: int) -> tuple[int, int]:
    """(width, height) with this longest side and the same shape, no side under `MIN_SIDE`."""
    scale = largest_side / max(size)
    return max(MIN_SIDE, round(size[0] * scale)), max(MIN_SIDE, round(size[1] * scale))


def image_size(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of an image file, upright, without its pixels. Checks as `load_image`."""
    with _opened(path, max_pixels) as image:
        turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        return image.size[::-1] if turned else image.size


def decode(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as a Pillow image in its own mode, upright; checks as `load_image`."""
    from PIL import ImageOps

    with _opened(path, max_pixels) as image:
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    what = f"image {path}"
    _check_readable_file(path, what)
    with refusing_damage(what):
        try:
            with warnings.catch_warnings():
                # We refuse by our own, lower bound.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = Image.open(path, formats=_READ_FORMATS)
        except UnidentifiedImageError as error:
            raise TruePoseError(
                f"{what} is not an image that can be read; expected one of {', '.join(_READ_FORMATS)}"
            ) from error
        except Image.DecompressionBombError as error:
            raise TruePoseError(f"{what} is too large ({error}); expected at most {max_pixels} pixels") from error
        with opened:
            _check_size(opened.size, what, max_pixels)
            yield opened


@contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """What Pillow raises while it decodes or converts a damaged file becomes a `TruePoseError` about `what`."""
    try:
        yield
    except TruePoseError:
        raise
    except _DECODE_ERRORS as error:
        raise TruePoseError(f"{what} is damaged or incomplete ({error}); save or download it again") from error


def save_image(tensor: Tensor, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write an image file in 8 bits, whole or not at all; the suffix says the format.

    tensor: float [1, C, H, W] or [C, H, W] with C = 3 or 1; values outside [0, 1] are clipped.
    Returns the path. Raises `TruePoseError` for another shape, NaN, or as `check_output`.
    """
    path = check_output(path, overwrite, IMAGE_SUFFIXES)
    return atomic_write(path, encode_image(tensor, path.suffix, f"{path}"), overwrite)


def encode_image(tensor: Tensor, suffix: str = ".png", what: str = "an image") -> bytes:
    """The bytes of an image file in 8 bits. tensor: as for `save_image`. suffix: one of `IMAGE_SUFFIXES`.

    what: names it in errors. Raises `TruePoseError` for another shape, and NaN."""
    from PIL import Image

    image = tensor.detach()
    if image.dim() == 4 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        raise TruePoseError(
            f"cannot save {tensor.dtype} {tuple(tensor.shape)} as {what}; expected one float image [1, 3, H, W]"
        )
    if not bool(image.isfinite().all()):
        raise TruePoseError(f"cannot save {what}: the image holds NaN or infinite values")
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    kind, options = _WRITE_FORMATS[suffix.lower()]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    suffixes: tuple[str, ...] | None = None,
) -> Path:
    """Check, before any work, that a file can be written here. Returns it as a `Path`.

    Raises `TruePoseError` when the suffix is not one of `suffixes` (lower case, with the dot; None
    allows all), the folder is missing or cannot be written to, the path is a folder, or the file
    exists and `overwrite` is false. Removes what a killed process left of this file.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise TruePoseError(f"output {path} has the suffix {path.suffix!r}; expected one of {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise TruePoseError(f"output {path} is a folder; expected the path of a file")
        if not overwrite and os.path.lexists(path):
            raise TruePoseError(f"output {path} exists already; choose another path, or overwrite it on purpose")
        if not path.parent.is_dir():
            raise TruePoseError(f"the folder {path.parent} of output {path.name} does not exist; create it first")
        _remove_leftovers(path)
        # Permission bits do not tell the whole truth (root, read-only mounts): try it.
        probe = _temporary_path(path)
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise TruePoseError(f"output {path} cannot be written: {error.strerror}") from error
    return path


def atomic_write(path: str | os.PathLike[str], data: bytes | str, overwrite: bool = False) -> Path:
    """Write a file so that it is there whole or not at all, also on Ctrl-C. Returns the path.

    Text is written as UTF-8. Raises `TruePoseError` as `whole_file`.
    """
    with whole_file(path, overwrite) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def whole_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which is at `path` when the block ends without an error, and never in part.

    The data goes to a temporary file in the same folder, which then takes the file's name. What a process that was
    killed left of an earlier try is removed by the next one. Raises `TruePoseError` as `check_output`, and when the
    disk refuses.
    """
    path = check_output(path, overwrite)
    temporary = _temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, path)
        if fcntl is None:  # Windows, where an open file keeps its name
            os.replace(temporary, path)
    except OSError as error:
        raise TruePoseError(f"output {path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    return path.parent / f".truepose-{_mark(path)}-{uuid.uuid4().hex}.tmp"


def _mark(path: Path) -> str:
    """What temporary files of one output have in common."""
    return hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _hold(file: BinaryIO) -> None:
    """Mark a file as being written, until it is closed or the process ends in whatever way."""
    if fcntl is not None:
        # A disk without locks: then nobody takes the file for left behind either.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this output that nobody writes."""
    for left in path.parent.glob(f".truepose-{_mark(path)}-*.tmp"):
        # It is being written, or is another user's.
        with suppress(OSError):
            if fcntl is None:  # Windows does not remove what is open
                left.unlink()
                continue
            with open(left, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def _check_readable_file(path: Path, what: str) -> None:
    try:
        if not path.exists():
            raise TruePoseError(f"{what} does not exist; check the path")
        if path.is_dir():
            raise TruePoseError(f"{what} is a folder; expected an image file")
        if not path.is_file():
            raise TruePoseError(f"{what} is not a regular file; expected an image file")
        if path.stat().st_size == 0:
            raise TruePoseError(f"{what} is empty (0 bytes); save or download it again")
    except OSError as error:
        raise TruePoseError(f"{what} cannot be read: {error.strerror}") from error


def _check_size(size: tuple[int, int], what: str, max_pixels: int) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise TruePoseError(f"{what} is {width}x{height} pixels; expected at least {MIN_SIDE} on each side")
    if max(size) > MAX_SIDE or width * height > max_pixels:
        raise TruePoseError(
            f"{what} is {width}x{height} pixels, too large; expected at most {MAX_SIDE} on a side "
            f"and {max_pixels} in all. Make it smaller first"
        )


def _is_deep_grey(image: Image.Image) -> bool:
    """Grey of more than 8 bits: Pillow's own conversion to RGB would clip it at 255."""
    return image.mode.startswith("I") or image.mode == "F"


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    # Pillow weighs colours by their opacity.
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.resize(size, Image.Resampling.BICUBIC)


def _grey_array(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """[H, W, 1] float32 in [0, 1]."""
    import numpy as np

    grey = np.asarray(image).astype(np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (grey.min() >= 0 and grey.max() <= top):
        raise TruePoseError(
            f"image {Path(path)} has grey values from {grey.min():g} to {grey.max():g}; "
            f"expected 0 to {top:g}. Save it with 8 or 16 bits per channel"
        )
    return (grey / np.float32(top))[..., None]


def _colour_array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] float32 in [0, 1], transparent parts over white."""
    import numpy as np

    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
        colours, opacity = pixels[..., :3], pixels[..., 3:]
        return colours * opacity + (1 - opacity)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255
