"""The served image is the image that was measured: ``prepare`` against timm's own transform."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from mcruntime.errors import DataError
from mcruntime.preprocess import Preprocessing, open_image, prepare
from PIL import Image
from timm.data import create_transform

SIZES = [(32, 32), (37, 53), (53, 37), (401, 33), (33, 401), (7, 5), (1, 1), (31, 32), (36, 36), (500, 375)]
IMAGENET = Preprocessing(
    image_size=32,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
)


def noise(width, height, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def picture(mode, width=45, height=38):
    """An image of any mode, its pixels random."""
    if mode == "RGBA":
        return Image.fromarray(noise(width, height, 4))
    if mode == "P":
        return Image.fromarray(noise(width, height)).quantize(17)
    if mode == "LA":
        return Image.fromarray(noise(width, height, 4)).convert("LA")
    return Image.fromarray(noise(width, height)).convert(mode)


def with_timm(image, how):
    transform = create_transform(
        input_size=how.image_size,
        is_training=False,
        mean=how.mean,
        std=how.std,
        interpolation=how.interpolation,
        crop_pct=how.crop_pct,
    )
    return transform(image.convert("RGB")).numpy()


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875, 0.5])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_prepare_is_bit_equal_to_timm_for_every_size(width, height, crop_pct, interpolation):
    how = IMAGENET.model_copy(update={"crop_pct": crop_pct, "interpolation": interpolation})
    image = Image.fromarray(noise(width, height).reshape(height, width, 3))
    prepared = prepare(image, how)
    assert prepared.dtype == np.float32
    assert prepared.shape == (3, 32, 32)
    np.testing.assert_array_equal(prepared, with_timm(image, how))


@pytest.mark.parametrize("image_size", [28, 29, 224])
def test_prepare_is_bit_equal_to_timm_for_every_target(image_size):
    how = IMAGENET.model_copy(update={"image_size": image_size})
    np.testing.assert_array_equal(prepare(picture("RGB"), how), with_timm(picture("RGB"), how))


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "P", "LA", "CMYK"])
def test_prepare_is_bit_equal_to_timm_for_every_mode(mode):
    np.testing.assert_array_equal(prepare(picture(mode), IMAGENET), with_timm(picture(mode), IMAGENET))


def test_a_palette_with_transparency_is_prepared_without_a_warning_as_timm_does_it():
    image = open_image(encoded(picture("P"), transparency=bytes(range(17))))
    assert isinstance(image.info["transparency"], bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(image, IMAGENET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(prepared, with_timm(image, IMAGENET))
    assert "transparency" in image.info, "the caller's image stays as it was"


def test_channels_come_out_in_the_order_red_green_blue():
    red = prepare(Image.new("RGB", (32, 32), (255, 0, 0)), IMAGENET)
    np.testing.assert_allclose(red[:, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)


def test_an_image_too_long_and_thin_is_refused_before_it_fills_the_memory():
    with pytest.raises(DataError, match="too long and thin"):
        prepare(Image.new("L", (2_000_000, 1)), IMAGENET)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_open(kind):
    image = open_image(encoded(picture("RGB"), kind))
    assert (image.format, image.size) == (kind, (45, 38))


def test_exif_orientation_is_left_alone_as_timm_leaves_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_image(encoded(picture("RGB"), "JPEG", exif=exif)).size == (45, 38)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a" + bytes(20)])
def test_bytes_that_are_no_image_are_refused_in_one_sentence(data):
    with pytest.raises(DataError, match="send a JPEG, PNG or WebP file") as caught:
        open_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_anywhere_is_a_data_error_and_nothing_else(kind):
    whole = encoded(picture("RGB"), kind)
    for length in range(1, len(whole) // 2, 7):
        with pytest.raises(DataError):
            open_image(whole[:length])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_with_flipped_bytes_opens_or_is_a_data_error(kind):
    rng = np.random.default_rng(0)
    whole = encoded(picture("RGB"), kind)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            prepare(open_image(bytes(damaged)), IMAGENET)
        except DataError:
            refused += 1
    assert refused


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 9_999), (8_001, 8_000)])
def test_an_image_with_too_many_pixels_is_refused_from_its_header(width, height):
    """No pixels follow the header, so a decoder would say "cut short" instead."""
    with pytest.raises(DataError, match="64000000"):
        open_image(png_header(width, height))


def test_the_pixel_limit_is_exact():
    data = encoded(picture("RGB", 10, 10))
    assert open_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="10 x 10 pixels, more than 99"):
        open_image(data, max_pixels=99)


@pytest.mark.parametrize(
    "change",
    [{"crop_pct": 0.0}, {"crop_pct": 1.1}, {"std": (0.0, 1.0, 1.0)}, {"mean": (float("nan"), 0.0, 0.0)},
     {"interpolation": "nearest"}, {"image_size": 0}, {"image_size": "32"}, {"crop_mode": "squash"}],
)  # fmt: skip
def test_preprocessing_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Preprocessing(**(IMAGENET.model_dump() | change))
