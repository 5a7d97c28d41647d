"""pictures.py: sizes without decoding, all colour models right, every kind of damage named."""

import io
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from pictures import PictureError, decode_picture, picture_size


@pytest.fixture(scope="module")
def pixels():
    """(60, 50, 3) uint8 RGB, smooth, with differing channels."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 6), None, 0, 255, cv2.NORM_MINMAX)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def status_of(data):
    with pytest.raises(PictureError) as error:
        decode_picture(data)
    return error.value.status


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_sizes_without_decoding(kind, pixels):
    assert picture_size(encode(Image.fromarray(pixels), kind)) == (60, 50)


def test_other_headers(pixels):
    image = Image.fromarray(pixels)
    assert picture_size(encode(image, "WEBP", lossless=True)) == (60, 50)
    assert picture_size(encode(image.convert("RGBA"), "WEBP", exif=b"Exif\0\0MM")) == (60, 50)
    assert picture_size(encode(image, "JPEG", progressive=True)) == (60, 50)
    assert picture_size(b"P5 # comment\n50 60\n255\n" + bytes(3000)) == (60, 50)
    assert picture_size(b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 50, -60, 1, 24)) == (60, 50)
    assert picture_size(b"BM" + bytes(12) + struct.pack("<IHH", 12, 50, 60)) == (60, 50)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact_rgb(kind, pixels):
    np.testing.assert_array_equal(decode_picture(encode(Image.fromarray(pixels), kind)), pixels)


def test_grey_palette_alpha_and_one_bit(pixels):
    image = Image.fromarray(pixels)
    for mode in ("L", "P", "1"):
        converted = image.convert(mode)
        wanted = np.asarray(converted.convert("RGB"))
        np.testing.assert_array_equal(decode_picture(encode(converted, "PNG")), wanted)
    image.putalpha(100)
    np.testing.assert_array_equal(decode_picture(encode(image, "PNG")), pixels)


def test_jpeg_grey_and_cmyk_are_close_to_pillow(pixels):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(Image.fromarray(pixels).convert(mode), "JPEG", quality=95)
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        got = decode_picture(data)
        assert got.dtype == np.uint8
        assert np.abs(got - wanted).mean() < 2


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_become_8(suffix, pixels):
    data = cv2.imencode(suffix, pixels[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode_picture(data), pixels)
    grey = pixels[..., 1].astype(np.uint16) * 257
    got = decode_picture(cv2.imencode(suffix, grey)[1].tobytes())
    np.testing.assert_array_equal(got, np.repeat(pixels[..., 1:2], 3, axis=2))


def test_exif_rotation_is_applied(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    data = encode(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, exif=exif)
    assert np.abs(decode_picture(data) - np.rot90(pixels, -1).astype(int)).mean() < 2


def test_empty_text_and_garbage():
    assert status_of(b"") == "empty_file"
    assert status_of(b"this is a text file named .jpg") == "not_an_image"
    assert status_of(random.Random(0).randbytes(5000)) == "not_an_image"
    assert status_of(bytes(5000)) == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_no_truncated_file_gives_a_picture(kind, pixels):
    data = encode(Image.fromarray(pixels), kind)
    for length in (1, 11, 25, len(data) // 2, len(data) * 9 // 10):
        assert status_of(data[:length]) in {"not_an_image", "truncated", "unreadable"}
    if kind == "JPEG":
        assert status_of(data[: len(data) // 2]) == status_of(data[:-2]) == "truncated"


def test_a_thumbnails_end_is_not_the_pictures_end(pixels):
    """An embedded thumbnail is a whole JPEG, with an end marker of its own."""
    thumbnail = encode(Image.fromarray(pixels[:8, :8]), "JPEG")
    data = encode(Image.fromarray(pixels), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = data[:2] + segment + data[2:]
    assert decode_picture(whole).shape == (60, 50, 3)
    assert status_of(whole[: len(whole) - len(data) // 4]) == "truncated"


def test_bytes_after_the_end_do_no_harm(pixels):
    data = encode(Image.fromarray(pixels), "JPEG")
    assert decode_picture(data + b"\0" * 100 + b"appended").shape == (60, 50, 3)


def test_claimed_sizes_are_refused_before_decoding(pixels, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    assert status_of(png_claiming(20_000, 20_000)) == "too_large"
    assert status_of(png_claiming(2**31 - 1, 2**31 - 1)) == "too_large"
    assert status_of(png_claiming(0, 10)) == "unreadable"
    data = bytearray(encode(Image.fromarray(pixels), "JPEG"))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert status_of(bytes(data)) == "too_large"


def test_one_pixel_is_a_picture():
    assert decode_picture(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [
        [[1, 2, 3]]
    ]


def test_random_damage_never_escapes(pixels):
    rng = random.Random(0)
    image = Image.fromarray(pixels)
    files = [encode(image, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")]
    for i in range(700):
        data = bytearray(files[i % len(files)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), rng.choice([30, 300, 9999])))] = rng.randrange(256)
        try:
            height, width = picture_size(bytes(data))
        except PictureError:
            continue
        if height * width < 1_000_000:
            try:
                assert decode_picture(bytes(data)).ndim == 3
            except PictureError as error:
                assert error.status in {"unreadable", "truncated"}
