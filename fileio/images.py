"""Image files: decode them to RGB pixels (or say why not), and encode JPEGs.

    decode_image(Path("face.jpg").read_bytes())  # (height, width, 3) uint8, RGB

JPEG, PNG, BMP, GIF, WebP, TIFF, PNM, JPEG 2000 and AVIF are known. Image files are untrusted input:
the size is read from the header before anything is decoded, so a file of a few bytes that claims a
billion pixels costs nothing.

Unusual images: EXIF rotation is applied, so a face comes out upright as viewers show it; of an
animation (GIF, WebP, APNG) or of several pages (TIFF) the first image is taken; grey, CMYK, 16-bit
and palette images become 8-bit RGB, and transparency is dropped.
"""

from __future__ import annotations

import io
import re
import struct
import threading
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from utils import UserError

MAX_PIXELS = 100_000_000  # 300 MB when decoded; OpenCV needs 1 GB for an animated WebP of that size
MAX_IMAGE_SIDE = 65_500  # libjpeg's own limit (JPEG_MAX_DIMENSION), for all formats
# Images from here on are decoded one at a time: eight threads with 300 MB each would fill the
# memory of a small machine.
LARGE_IMAGE_PIXELS = 4_000_000

# Bits that mean nothing, with the markers RST0 to RST7 that decoders may wait for.
OTHER_BITS = b"".join(bytes(range(254, 0, -1)) + b"\xff" + bytes([0xD0 + n % 8]) for n in range(16))

_large_image_lock = threading.Lock()


class ImageError(UserError):
    """An image file that cannot be decoded; `status` is the reason in one word.

    The text is a sentence about "its bytes": the caller puts the file's name before it.
    """

    def __init__(self, data: bytes, status: str, reason: str):
        super().__init__(f"its {len(data)} bytes cannot be decoded as an image: {reason}.")
        self.status = status


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file's bytes to (height, width, 3) uint8 RGB.

    Raises ImageError with status "empty_file", "not_an_image", "truncated", "too_large" or
    "unreadable".
    """
    height, width = image_size(data)
    if height * width > MAX_PIXELS or max(height, width) > MAX_IMAGE_SIDE:
        limits = f"{MAX_PIXELS:,} pixels or {MAX_IMAGE_SIDE:,} on a side"
        raise ImageError(data, "too_large", f"{width}x{height} is more than {limits}")
    if height * width < LARGE_IMAGE_PIXELS:
        return _decode_complete(data)
    with _large_image_lock:
        return _decode_complete(data)


def _decode_complete(data: bytes) -> np.ndarray:
    complete = _with_end(data)
    if complete is None:
        raise ImageError(data, "truncated", "its end is missing")
    return _decode(complete)


def _decode(data: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise ImageError(data, "unreadable", "OpenCV cannot decode it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encode_jpeg(rgb: np.ndarray, quality: int = 95) -> bytes:
    """Encode (height, width, 3) uint8 RGB as JPEG."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as the header says, before any EXIF rotation.

    Raises ImageError as `decode_image` does.
    """
    if not data:
        raise ImageError(data, "empty_file", "the file is empty")
    for signature, read_size in _FORMATS:
        if re.match(signature, data, re.DOTALL):
            try:
                height, width = read_size(data)
            except (struct.error, IndexError, ValueError):
                raise ImageError(data, "truncated", "its header is cut short") from None
            if height < 1 or width < 1:
                raise ImageError(data, "unreadable", f"its header claims {width}x{height} pixels")
            return height, width
    raise ImageError(data, "not_an_image", "it begins like no known image format")


# ------------------------------------------------------------------------------ complete or not


def _with_end(data: bytes) -> bytes | None:
    """The file, with its end marker if it is a JPEG that lacks only that; None if more is missing.

    A PNG has to have its own; the decoders of other formats check.
    """
    if data.startswith(b"\x89PNG"):
        return data if _is_complete_png(data) else None
    # Most JPEGs end in EOI (FF D9): no need to search those.
    if not data.startswith(b"\xff\xd8") or data.endswith(b"\xff\xd9"):
        return data
    # Some have bytes after EOI. Search from the start of scan on, since a thumbnail in the EXIF
    # segment before it has an EOI of its own; within the scan, FF is always followed by 00 or RSTn.
    try:
        scan = _find_jpeg_segment(data, lambda marker: marker == 0xDA)
        if data.find(b"\xff\xd9", scan) >= 0:
            return data
        if not _has_all_scans(data, scan):
            return None
    except (struct.error, IndexError, ValueError):
        return None
    # libjpeg fills what is missing with grey and only warns, so a truncated download would become a
    # face with a grey chin. Here other bits follow where the file is cut, enough of them for whole
    # blocks of pixels: if they change no pixel, every pixel came from the file.
    begun = data.removesuffix(b"\xff")
    try:
        pixels = [_pillow_pixels(begun + bits + b"\xff\xd9") for bits in (b"", OTHER_BITS)]
    except Exception:  # its decoder raises several types
        return None
    return begun + b"\xff\xd9" if np.array_equal(*pixels) else None


def _has_all_scans(data: bytes, scan: int) -> bool:
    """Whether the scans from byte `scan` on begin every coefficient's last bit (T.81, annex G).

    A scan is FF DA, length (2), number of components (1), an id and a table (2) of each, then first
    and last coefficient (2) and the bits before (4 bits) and after it (4 bits).
    """
    final = set()
    while scan >= 0:
        count = data[scan + 4]
        first, last, bits = data[scan + 5 + 2 * count : scan + 8 + 2 * count]
        if bits & 15 == 0:
            components = data[scan + 5 : scan + 5 + 2 * count : 2]
            final |= {(c, k) for c in components for k in range(first, last + 1)}
        scan = data.find(b"\xff\xda", scan + 2)
    return len(final) == 64 * data[_find_jpeg_frame(data) + 9]


def _pillow_pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return np.asarray(image)


def _is_complete_png(data: bytes) -> bool:
    """Whether all chunks up to IEND are there.

    A chunk is: length of its data (4 bytes, big-endian), type (4), data, CRC (4). OpenCV allocates
    the length as claimed: 2 GB for a file of 44 bytes.
    """
    position = 8  # after the signature
    while position + 12 <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


# ------------------------------------------------------------------------------ sizes in headers
# Each function returns (height, width); the layouts give the byte offsets.


def _find_jpeg_segment(data: bytes, is_wanted: Callable[[int], bool]) -> int:
    """The position of the first segment whose marker is wanted (ITU T.81, annex B).

    A segment is FF, marker (1 byte), length (2, big-endian, itself included), content.
    """
    position = 2  # after SOI, FF D8
    while True:
        if data[position] != 0xFF:
            raise ValueError("no marker")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte; any number of them may precede a marker
            position += 1
        elif is_wanted(marker):
            return position
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            # No length follows these. Decoders skip them; if we took the next two bytes for a
            # length, we would read the size from another place than the decoder does, and the
            # limit on pixels could be evaded.
            raise ValueError("a marker out of place")
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]


def _find_jpeg_frame(data: bytes) -> int:
    # Frame headers are SOF0 to SOF15 (C0 to CF), except for the tables DHT, JPG and DAC:
    # FF marker | 2 length (2) | 4 precision (1) | 5 height (2) | 7 width (2) | 9 components (1)
    return _find_jpeg_segment(data, lambda m: 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC))


def _jpeg_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">HH", data, _find_jpeg_frame(data) + 5)


def _png_size(data: bytes) -> tuple[int, int]:
    # IHDR is the first chunk: 16 width (4), 20 height (4), big-endian
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _gif_size(data: bytes) -> tuple[int, int]:
    # logical screen descriptor: 6 width (2), 8 height (2), little-endian
    width, height = struct.unpack_from("<HH", data, 6)
    return height, width


def _bmp_size(data: bytes) -> tuple[int, int]:
    # 14 size of the header (4), then 18 width and height: 2 bytes each in OS/2's header of 12
    # bytes, else 4 each and signed
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), width  # a negative height means that the rows run from top to bottom


def _webp_size(data: bytes) -> tuple[int, int]:
    # 0 "RIFF" | 4 size (4) | 8 "WEBP" | 12 type of the first chunk (4) | 16 its length (4)
    chunk = data[12:16]
    if chunk == b"VP8X":  # extended: 24 width - 1 (3), 27 height - 1 (3), little-endian
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return (height, width) if len(data) >= 30 else (0, 0)
    if chunk == b"VP8L":  # lossless: 20 signature 2F | 21 width - 1 (14 bits), height - 1 (14 bits)
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    # lossy: 20 frame tag (3) | 23 start code (3) | 26 width, 28 height: 14 bits each, 2 of scaling
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _tiff_size(data: bytes) -> tuple[int, int]:
    # 0 byte order "II" or "MM" | 2 the number 42 (2) | 4 offset of the first directory (4).
    # A directory is a count (2) and entries of 12: tag (2), type (2), count (4), value (4).
    order = "<" if data[:2] == b"II" else ">"
    directory = struct.unpack_from(order + "I", data, 4)[0]
    size = {}
    for i in range(struct.unpack_from(order + "H", data, directory)[0]):
        entry = directory + 2 + 12 * i
        tag, value_type = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):  # ImageWidth, ImageLength: SHORT (type 3) or LONG
            value_format = order + ("H" if value_type == 3 else "I")
            size[tag] = struct.unpack_from(value_format, data, entry + 8)[0]
    return size.get(257, 0), size.get(256, 0)


def _pnm_size(data: bytes) -> tuple[int, int]:
    # "P6", width and height as text, with white space and # comments between them
    header = re.match(rb"P\d(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data[:4096])
    if not header:
        raise ValueError("no size")
    return int(header[2]), int(header[1])


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    # in the codestream, which may stand in boxes: SOC (2), SIZ (2) | 4 length, capabilities (4) |
    # 8 width, height of the grid (4 each) | 16 left, top of the image in it (4 each)
    siz = data.index(b"\xff\x4f\xff\x51")
    width, height, left, top = struct.unpack_from(">IIII", data, siz + 8)
    return height - top, width - left


def _avif_size(data: bytes) -> tuple[int, int]:
    # Each image of the file has a box "ispe" (4) | version (4) | width (4) | height (4).
    sizes = [struct.unpack(">II", size) for size in re.findall(rb"(?s)ispe\0{4}(.{8})", data)]
    return max(height for _, height in sizes), max(width for width, _ in sizes)


# The first bytes of each format, and how its size is read.
_FORMATS = [
    (rb"\xff\xd8\xff", _jpeg_size),
    (rb"\x89PNG\r\n\x1a\n", _png_size),
    (rb"GIF8[79]a", _gif_size),
    (rb"RIFF....WEBP", _webp_size),
    (rb"BM", _bmp_size),
    (rb"II\*\0|MM\0\*", _tiff_size),
    (rb"P[1-6]\s", _pnm_size),
    (rb"....ftypavi[fs]", _avif_size),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _jpeg2000_size),
]
