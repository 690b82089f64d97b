"""Open any picture as a plain 8-bit RGB image, or say clearly why that is impossible."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | bytearray | BinaryIO | Image.Image

MAX_ASPECT = 100.0  # smart_resize of the Qwen processors refuses more than 200:1
ACCEPTED = "a PNG, JPEG, WebP, GIF, BMP or TIFF file (or its bytes, or a PIL image)"

_DECODER_ERRORS = (
    OSError,
    SyntaxError,  # Pillow's PNG reader raises it for a broken chunk
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)


def load_image(
    source: ImageSource, *, max_aspect: float = MAX_ASPECT, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Open a picture of any size and mode as 8-bit RGB, upright.

    The camera's EXIF rotation is applied, transparency is laid on `background`, 16-bit and float values are scaled
    (not clipped) to 8 bits, palettes, grey, 1-bit and CMYK are converted, and of an animation the first frame is
    taken. A picture longer than `max_aspect` times its short side is padded with `background` on the right or at the
    bottom, so that pixel coordinates stay what they were.

    Args:
        source: path of a file, its bytes, an open binary file, or a PIL image.
        max_aspect: largest ratio of long to short side of the result, at least 1.
        background: RGB colour, 0..255, shown through transparent pixels and in the padding.

    Returns:
        A new PIL image in mode "RGB"; `source` is left unchanged.

    Raises:
        ValueError: if `source` is missing, a folder, a URL, of another type, not a picture, damaged, or so large that
            decoding it would exhaust memory (Pillow's decompression-bomb limit).
    """
    if max_aspect < 1:
        raise ValueError(f"max_aspect must be at least 1, got {max_aspect}.")
    if isinstance(source, Image.Image):
        name = "the given PIL image"
        return _pad_to_aspect(_decoded(source, name, background), name, max_aspect, background)
    stream, name = _open_stream(source)
    try:
        return _pad_to_aspect(_decoded(stream, name, background), name, max_aspect, background)
    finally:
        if isinstance(source, (str, os.PathLike)):
            stream.close()


@contextmanager
def whole_pictures_only() -> Iterator[None]:
    """Inside, Pillow refuses a file that is cut off, also where a library asked it to fill the rest with grey.

    lmms-eval does so for the whole process when it is imported.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open_stream(source: ImageSource) -> tuple[BinaryIO, str]:
    """Return a binary stream of `source` and the name to use for it in messages."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), f"the given {len(source)} bytes"
    if hasattr(source, "read"):
        return cast(BinaryIO, source), f"the open file {getattr(source, 'name', '')!r}"
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"source must be {ACCEPTED}, got {type(source).__name__}.")
    text = os.fspath(source)
    if text.startswith(("http://", "https://", "data:")):
        raise ValueError(f"'{text[:80]}' is a URL; download the picture and give its path, or {ACCEPTED}.")
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder; give {ACCEPTED}.")
    try:
        return path.open("rb"), f"'{path}'"
    except FileNotFoundError:
        raise ValueError(f"'{path}' does not exist; give {ACCEPTED}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be opened ({error}); give {ACCEPTED}.") from error


def _decoded(source: BinaryIO | Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    """Decode, turn upright and convert to RGB; every decoder failure becomes one ValueError that names the source."""
    try:
        with warnings.catch_warnings(), whole_pictures_only():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error at twice the size still holds
            image = source if isinstance(source, Image.Image) else Image.open(source)
            if all(image.size):
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), background)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read; give {ACCEPTED}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to open safely ({error}); make it smaller first.") from error
    except _DECODER_ERRORS as error:
        raise ValueError(f"{name} is damaged or cut off ({error}); give {ACCEPTED}.") from error
    raise ValueError(f"{name} is empty ({image.width}x{image.height} pixels); give {ACCEPTED}.")


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return a new RGB image, transparency laid on `background` and deep pixels scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "La":  # grey with premultiplied alpha converts only to LA
        image = image.convert("LA")
    if image.has_transparency_data or image.mode == "RGBa":
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit or float grey values (H, W) to uint8 by their full range.

    Floats within 0..1 count as fractions of white, floats within 0..255 as 8-bit values; any other float range
    carries no stated white and is stretched from its smallest to its largest value.
    """
    if values.dtype.kind in "iu":
        deep = np.clip(values, 0, None)
        if deep.max() <= 0xFFFF:
            return ((np.arange(0x10000) + 128) // 257).astype(np.uint8)[deep]  # 0xFFFF / 257 = 255
        return (deep >> 24).astype(np.uint8)
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1:
        scaled = finite * 255
    elif low >= 0 and high <= 255:
        scaled = finite
    else:
        scaled = (finite - low) * (255 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def _pad_to_aspect(image: Image.Image, name: str, max_aspect: float, background: tuple[int, int, int]) -> Image.Image:
    """Pad the short side at the right or bottom until long / short <= `max_aspect`."""
    shortest = -(-max(image.size) // max_aspect)  # rounded up
    width, height = (max(side, int(shortest)) for side in image.size)
    if (width, height) == image.size:
        return image
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow's own limit for opening a file
        raise ValueError(
            f"{name} ({image.width}x{image.height} pixels) is too long and thin: padded to {max_aspect:g}:1 it would "
            "exhaust memory; cut it into pieces."
        )
    canvas = Image.new("RGB", (width, height), background)
    canvas.paste(image, (0, 0))
    return canvas
