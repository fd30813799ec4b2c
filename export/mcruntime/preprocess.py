"""From an image file to the numbers a model reads, exactly as timm's evaluation transform does it, without torch.

``prepare`` is ``timm.data.create_transform(is_training=False)`` with torchvision on PIL images, written again in Pillow
and NumPy: a test holds the two bit-equal. Whoever opens the image decides about EXIF orientation; timm ignores it, so
``open_image`` does too, or the served answer would not be the one that was measured.
"""

# C = channels (3), H/W = height/width in pixels.
from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mcruntime.errors import DataError, ImageTooLargeError

MAX_PIXELS = 64_000_000  # a 50-megapixel photograph passes; decoded as RGB this is 192 MB
FORMATS = ("JPEG", "PNG", "WEBP")  # few decoders, few holes
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# What Pillow's decoders raise on hostile bytes (seen by cutting files short and flipping their bits).
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocessing(BaseModel):
    """How an image becomes a model's input."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image_size: Annotated[int, Field(ge=1)]  # height and width in pixels
    mean: tuple[Finite, Finite, Finite]  # of pixels scaled to 0..1
    std: tuple[Scale, Scale, Scale]
    interpolation: Literal["bilinear", "bicubic"]
    crop_pct: Annotated[float, Field(gt=0, le=1)]  # resize to image_size / crop_pct, then crop the centre


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file held in memory; of an animation, the first frame.

    The number of pixels is read from the header and checked before anything is decoded.

    Raises:
        DataError: not such an image, cut short, damaged.
        ImageTooLargeError: more than ``max_pixels``.
    """
    if not data:
        raise DataError("the image is empty (0 bytes); send a JPEG, PNG or WebP file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(f"the image has more than {max_pixels} pixels; send a smaller one") from None
    except DECODE_ERRORS:
        raise DataError("the bytes are not an image that can be read; send a JPEG, PNG or WebP file") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLargeError(f"the image has {width} x {height} pixels, more than {max_pixels}; send a smaller one")
    try:
        image.load()
    except DECODE_ERRORS:
        raise DataError(f"the {image.format} image is damaged or cut short; send the whole file") from None
    return image


def prepare(image: Image.Image, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """Resize the shorter side to ``image_size / crop_pct``, crop the centre, scale to 0..1, normalise.

    Returns:
        [3, image_size, image_size] float32, channels in the order R, G, B.

    Raises:
        ImageTooLargeError: an image so long and thin that it would be resized to more than ``max_pixels``.
    """
    shorter = math.floor(how.image_size / how.crop_pct)
    image = _resize(_to_rgb(image), shorter, RESAMPLING[how.interpolation], max_pixels)
    left = round((image.width - how.image_size) / 2.0)  # half to even, as torchvision
    top = round((image.height - how.image_size) / 2.0)
    image = image.crop((left, top, left + how.image_size, top + how.image_size))
    pixels_CHW = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
    mean = np.array(how.mean, dtype=np.float32).reshape(3, 1, 1)
    std = np.array(how.std, dtype=np.float32).reshape(3, 1, 1)
    return (pixels_CHW - mean) / std


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow warns that the palette's transparency is lost. It is meant to be: timm loses it too.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _resize(image: Image.Image, shorter: int, resampling: Image.Resampling, max_pixels: int) -> Image.Image:
    """torchvision's ``Resize(int)``: same aspect ratio, longer side rounded down, untouched when it already fits."""
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    if shorter * longer > max(max_pixels, shorter * shorter):
        raise ImageTooLargeError(f"the image is too long and thin ({width} x {height} pixels); crop it first")
    size = (shorter, longer) if width <= height else (longer, shorter)
    return image if image.size == size else image.resize(size, resampling)
