"""images.py: sizes without decoding, all colour models right, each kind of corruption named."""

import io
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from fileio.images import ImageError, decode_image, encode_jpeg, image_size
from preprocessing.pipeline import align_face
from tests.helpers.bounded import within
from tests.helpers.record_files import smooth_image
from tests.helpers.synthetic_faces import face


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
    with pytest.raises(ImageError) as error:
        decode_image(data)
    return error.value.status


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_sizes_without_decoding(kind, pixels):
    assert image_size(encode(Image.fromarray(pixels), kind)) == (60, 50)


def test_other_headers(pixels):
    image = Image.fromarray(pixels)
    assert image_size(encode(image, "WEBP", lossless=True)) == (60, 50)
    assert image_size(encode(image.convert("RGBA"), "WEBP", exif=b"Exif\0\0MM")) == (60, 50)
    assert image_size(encode(image, "JPEG", progressive=True)) == (60, 50)
    assert image_size(b"P5 # comment\n50 60\n255\n" + bytes(3000)) == (60, 50)
    assert image_size(b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 50, -60, 1, 24)) == (60, 50)
    assert image_size(b"BM" + bytes(12) + struct.pack("<IHH", 12, 50, 60)) == (60, 50)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact_rgb(kind, pixels):
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(pixels), kind)), pixels)


def test_grey_palette_alpha_and_one_bit(pixels):
    image = Image.fromarray(pixels)
    for mode in ("L", "P", "1"):
        converted = image.convert(mode)
        wanted = np.asarray(converted.convert("RGB"))
        np.testing.assert_array_equal(decode_image(encode(converted, "PNG")), wanted)
    image.putalpha(100)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG")), pixels)


def test_jpeg_grey_and_cmyk_are_close_to_pillow(pixels):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(Image.fromarray(pixels).convert(mode), "JPEG", quality=95)
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        got = decode_image(data)
        assert got.dtype == np.uint8
        assert np.abs(got - wanted).mean() < 2


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_become_8(suffix, pixels):
    data = cv2.imencode(suffix, pixels[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode_image(data), pixels)
    grey = pixels[..., 1].astype(np.uint16) * 257
    got = decode_image(cv2.imencode(suffix, grey)[1].tobytes())
    np.testing.assert_array_equal(got, np.repeat(pixels[..., 1:2], 3, axis=2))


# What the eight orientations do to an image, in words of NumPy (Exif 2.3, tag 0x0112).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # the camera was turned: rotate clockwise to see it upright
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_honoured(kind, orientation, pixels):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels), kind, exif=exif, **options.get(kind, {}))
    assert np.abs(decode_image(data) - UPRIGHT[orientation](pixels).astype(int)).mean() < 2


def test_a_face_comes_out_upright():
    """A face whose image lies on its side but for EXIF is cut out as from the upright one."""
    upright = decode_image(face(0))
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(lying, "PNG", exif=exif))
    points = np.array([[100, 110], [150, 110], [125, 140], [105, 165], [145, 165]], float)
    np.testing.assert_array_equal(align_face(turned, points), align_face(upright, points))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_image_is_taken(kind, pixels):
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.fromarray(255 - pixels), Image.new("RGB", (50, 60))]
    data = encode(Image.fromarray(pixels), kind, save_all=True, append_images=frames, **options)
    mean = 5 if kind == "GIF" else 0  # of 256 colours
    assert np.abs(decode_image(data) - pixels.astype(int)).mean() <= mean


def test_other_depths_and_colours(pixels):
    cmyk = Image.fromarray(pixels).convert("CMYK")
    wanted = np.asarray(cmyk.convert("RGB")).astype(int)
    assert np.abs(decode_image(encode(cmyk, "TIFF")) - wanted).mean() < 1
    wide = b"P6\n50 60\n65535\n" + (pixels.astype(">u2") * 257).tobytes()
    np.testing.assert_array_equal(decode_image(wide), pixels)
    floats = Image.fromarray(pixels[..., 0].astype(np.float32))
    assert status_of(encode(floats, "TIFF")) == "unreadable"


def test_empty_text_and_garbage():
    assert status_of(b"") == "empty_file"
    assert status_of(b"this is a text file named .jpg") == "not_an_image"
    assert status_of(random.Random(0).randbytes(5000)) == "not_an_image"
    assert status_of(bytes(5000)) == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_no_truncated_file_gives_a_image(kind, pixels):
    data = encode(Image.fromarray(pixels), kind)
    for length in (1, 11, 25, len(data) // 2, len(data) * 9 // 10):
        assert status_of(data[:length]) in {"not_an_image", "truncated", "unreadable"}
    if kind == "JPEG":
        assert status_of(data[: len(data) // 2]) == status_of(data[:-3]) == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_without_its_end_mark_alone_is_complete(pixels, mode, progressive):
    """Wherever else it is cut, also between two scans, pixels are missing."""
    data = encode(Image.fromarray(pixels).convert(mode), "JPEG", progressive=progressive)
    complete = decode_image(data)
    for length in range(len(data) // 8, len(data)):
        try:
            image = decode_image(data[:length])
        except ImageError as error:
            assert error.status == "truncated"
            assert length < len(data) - 2
        else:
            np.testing.assert_array_equal(image, complete)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_avif_and_jpeg_2000(kind, pixels):
    if kind not in Image.SAVE:
        pytest.skip("a Pillow before 11.3 cannot write it")
    data = encode(Image.fromarray(pixels), kind, quality=95 if kind == "AVIF" else None)
    assert image_size(data) == (60, 50)
    try:
        image = decode_image(data)
    except ImageError as error:  # an OpenCV that was built without it
        assert error.status == "unreadable"
        pytest.skip(str(error))
    assert np.abs(image.astype(int) - pixels).mean() < 6
    assert status_of(data[: len(data) // 2]) in {"unreadable", "truncated"}


def test_a_thumbnails_end_is_not_the_images_end(pixels):
    """An embedded thumbnail is a complete JPEG, with an end marker of its own."""
    thumbnail = encode(Image.fromarray(pixels[:8, :8]), "JPEG")
    data = encode(Image.fromarray(pixels), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    complete = data[:2] + segment + data[2:]
    assert decode_image(complete).shape == (60, 50, 3)
    assert status_of(complete[: len(complete) - len(data) // 4]) == "truncated"


def test_bytes_after_the_end_do_no_harm(pixels):
    data = encode(Image.fromarray(pixels), "JPEG")
    assert decode_image(data + b"\0" * 100 + b"appended").shape == (60, 50, 3)


def test_claimed_sizes_are_refused_before_decoding(pixels, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    assert status_of(png_claiming(20_000, 20_000)) == "too_large"
    assert status_of(png_claiming(2**31 - 1, 2**31 - 1)) == "too_large"
    assert status_of(png_claiming(0, 10)) == "unreadable"
    data = bytearray(encode(Image.fromarray(pixels), "JPEG"))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert status_of(bytes(data)) == "too_large"


def outcome(data):
    """The shape of the image, or the reason why there is none."""
    try:
        return decode_image(data).shape
    except ImageError as error:
        return error.status


def bmp(width, height):
    fields = (40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + bytes(8) + struct.pack("<I", 54) + struct.pack("<IiiHHIIIIII", *fields)


def tiff(*tags):
    """A TIFF of these (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4000)


def webp(kind, fields):
    chunk = kind + struct.pack("<I", len(fields)) + fields
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def jpeg_claiming(side, kind=b"\xff\xc0"):
    """A JPEG that is complete but for its size."""
    data = encode(Image.new("RGB", (16, 16)), "JPEG", progressive=kind == b"\xff\xc2")
    frame = data.find(kind)
    return data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]


Image.init()  # fills Image.SAVE


def claiming(kind, mark, offset):
    """A file whose width and height stand `offset` bytes after a mark, with 60,000 for both."""
    if kind not in Image.SAVE:  # Pillow before 11.3
        return b"\0\0\0\x20ftypavif" + bytes(40) + mark + bytes(offset - 4) + b"\0\0\xea\x60" * 2
    data = encode(Image.new("RGB", (16, 16)), kind)
    at = data.find(mark) + offset
    return data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]


SIDE = 60_000
CLAIMS = {
    "jpeg": jpeg_claiming(SIDE),
    "progressive": jpeg_claiming(SIDE, b"\xff\xc2"),
    "png": png_claiming(SIDE, SIDE),
    "avif": claiming("AVIF", b"ispe", 8),
    "jpeg 2000": claiming("JPEG2000", b"\xff\x4f\xff\x51", 8),
    "bmp": bmp(SIDE, SIDE),
    "bmp upside down": bmp(SIDE, -SIDE),
    "gif": b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + bytes(100),
    "webp extended": webp(b"VP8X", bytes(4) + (SIDE - 1).to_bytes(3, "little") * 2),
    "webp lossless": webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(99)),  # 16,384: all it can
    "webp lossy": webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(99)),
    "tiff": tiff((256, 4, 1, SIDE), (257, 4, 1, SIDE)),
    "tiff short": tiff((256, 3, 1, SIDE), (257, 3, 1, SIDE)),
    **{f"P{i}": b"P%d\n%d %d\n255\n" % (i, SIDE, SIDE) for i in range(1, 7)},
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_60_000_by_60_000_pixels_in_every_format(kind):
    assert within(50, status_of, CLAIMS[kind]) == "too_large"


@pytest.mark.parametrize("shape", [(19, 2_000_000), (2_000_000, 19)])
def test_a_long_strip_is_refused(shape):
    """It could be searched for faces in no copy of moderate size."""
    assert status_of(png_claiming(*shape)) == "too_large"


def test_a_jpeg_cannot_hide_its_size_behind_a_marker_without_a_length():
    """Decoders skip RST0 and read 60,000; as a segment, it would lead to 10 pixels."""
    huge = jpeg_claiming(60_000)
    for marker in (b"\xff\xd0", b"\xff\x01", b"\xff\x00", b"\xff\xd8"):
        hiding = b"\xff\xd8\xff\xfe\0\4ab" + marker + huge[2:]
        harmless = b"\xff\xc0\0\x0b\x08\0\x0a\0\x0a\1\1\x11\0\xff\xda\0\2\xff\xd9"
        length = int.from_bytes(huge[2:4], "big")  # what the next marker would be, as a length
        assert within(200, status_of, hiding.ljust(10 + length, b"\0") + harmless) == "truncated"


@pytest.mark.parametrize("kind", [b"tEXt", b"IDAT", b"eXIf", b"iCCP"])
def test_a_png_chunk_that_claims_two_gigabytes(kind):
    data = png_claiming(10, 10)[:33] + struct.pack(">I", 2**31 - 16) + kind + b"abc"
    assert within(200, status_of, data) == "truncated"


@pytest.mark.parametrize(
    "tag",
    [
        (322, 4, 1, 1 << 20),  # TileWidth
        (277, 3, 1, 60_000),  # SamplesPerPixel
        (258, 3, 1, 60_000),  # BitsPerSample
        (279, 4, 1 << 28, 8),  # StripByteCounts
        (278, 4, 1, 2**32 - 1),  # RowsPerStrip
    ],
)
def test_a_tiffs_other_sizes_take_no_memory(tag):
    tags = {256: (256, 3, 1, 50), 257: (257, 3, 1, 60), 258: (258, 3, 1, 8), 259: (259, 3, 1, 1)}
    tags |= {262: (262, 3, 1, 1), 273: (273, 4, 1, 200), 277: (277, 3, 1, 1)}
    tags |= {278: (278, 4, 1, 60), 279: (279, 4, 1, 3000), 323: (323, 4, 1, 1 << 20)}
    if tag[0] != 322:
        del tags[323]
    data = tiff(*(tags | {tag[0]: tag}).values())
    assert within(200, outcome, data) in ("unreadable", (60, 50, 3))


def test_compressed_text_in_a_png_stays_compressed(pixels):
    complete = encode(Image.fromarray(pixels), "PNG")
    for kind in (b"zTXt", b"iCCP", b"iTXt"):
        text = b"x\0\1\0\0\0" if kind == b"iTXt" else b"x\0\0"
        body = kind + text + zlib.compress(bytes(100 << 20), 9)
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        image = within(60, decode_image, complete[:33] + chunk + complete[33:])
        np.testing.assert_array_equal(image, pixels)


def test_one_pixel_is_an_image():
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [
        [[1, 2, 3]]
    ]


def test_random_corruption_never_escapes(pixels):
    rng = random.Random(0)
    image = Image.fromarray(pixels)
    files = [encode(image, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")]
    for i in range(700):
        data = bytearray(files[i % len(files)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), rng.choice([30, 300, 9999])))] = rng.randrange(256)
        try:
            height, width = image_size(bytes(data))
        except ImageError:
            continue
        if height * width < 1_000_000:
            try:
                assert decode_image(bytes(data)).ndim == 3
            except ImageError as error:
                assert error.status in {"unreadable", "truncated"}


def test_jpeg_is_rgb_and_close(tmp_path):
    red = np.zeros((112, 96, 3), np.uint8)
    red[..., 0] = 200
    again = decode_image(encode_jpeg(red))
    assert again.shape == red.shape and again.dtype == np.uint8
    assert np.abs(again.astype(int) - red).max() <= 3
    assert len(encode_jpeg(smooth_image(1), 30)) < len(encode_jpeg(smooth_image(1)))
    grey = cv2.imencode(".png", smooth_image(0)[..., 0])[1].tobytes()
    assert decode_image(grey).shape == (112, 112, 3)
