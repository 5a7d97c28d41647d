"""Bytes of an image file to RGB pixels, or the reason why not.

    decode_image(Path("face.jpg").read_bytes())  # (height, width, 3) uint8, RGB

The size is read from the header before anything is decoded, so that a file of a few bytes that
claims a billion pixels costs nothing.  JPEG, PNG, BMP, GIF, WebP, TIFF and PNM are known.

What becomes of the unusual: EXIF rotation is honoured, so that a face comes out upright as viewers
show it; of an animation (GIF, WebP, APNG) or of several pages (TIFF) the first image is taken;
grey, CMYK, 16-bit and palette images become 8-bit RGB, and transparency is dropped.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable

import cv2
import numpy as np

from utils import UserError

MAX_PIXELS = 100_000_000  # 300 MB when decoded; an animated WebP takes 1 GB on the way
MAX_SIDE = 65_500  # JPEG's; longer strips could be searched in no small copy
MANY_PIXELS = 4_000_000  # images from here on are decoded one at a time, for memory's sake

_one_large_image = threading.Lock()


class ImageError(UserError):
    """A file that gives no image; `status` is the reason in one word."""

    def __init__(self, status: str, sentence: str):
        super().__init__(sentence)
        self.status = status


def decode_image(data: bytes) -> np.ndarray:
    """The image as (height, width, 3) uint8 RGB.

    Raises ImageError with status "empty_file", "not_an_image", "truncated", "too_large" or
    "unreadable".
    """
    height, width = image_size(data)
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        sentence = f"{width}x{height} are more than {MAX_PIXELS:,} pixels, or {MAX_SIDE:,} in a row"
        raise ImageError("too_large", sentence)
    if not _is_complete(data):
        raise ImageError("truncated", "its end is missing")
    if height * width < MANY_PIXELS:
        return _decode(data)
    with _one_large_image:
        return _decode(data)


def _decode(data: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise ImageError("unreadable", "OpenCV cannot decode it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as the header says, before any EXIF rotation.

    Raises ImageError as `decode_image` does.
    """
    if not data:
        raise ImageError("empty_file", "the file is empty")
    for magic, read_size in _HEADERS:
        if re.match(magic, data, re.DOTALL):
            try:
                height, width = read_size(data)
            except (struct.error, IndexError, ValueError):
                raise ImageError("truncated", "its header is cut short") from None
            if height < 1 or width < 1:
                raise ImageError("unreadable", f"its header claims {width}x{height} pixels")
            return height, width
    raise ImageError("not_an_image", "its first bytes are no known image format's")


def _jpeg_segment(data: bytes, wanted: Callable[[int], bool]) -> int:
    """Where the first segment with a wanted marker begins (ITU T.81, annex B)."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif wanted(marker):
            return at
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            # No length follows these.  Decoders pass over them; whoever took the next two bytes for
            # one would read the size from another place than the decoder does.
            raise ValueError("a marker out of place")
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]


def _jpeg_size(data: bytes) -> tuple[int, int]:
    # frames are SOF0 to SOF15 but for the tables DHT, JPG and DAC
    frame = _jpeg_segment(data, lambda m: 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC))
    return struct.unpack_from(">HH", data, frame + 5)


def _is_complete(data: bytes) -> bool:
    """Whether a JPEG or PNG has its end marker (True for other formats, whose decoders notice).

    libjpeg fills a missing lower part with grey and merely warns.  The marker is looked for after
    the start of the scan: an embedded thumbnail has one of its own.
    """
    if data.startswith(b"\x89PNG"):
        return _png_is_whole(data)
    if not data.startswith(b"\xff\xd8") or data.endswith(b"\xff\xd9"):
        return True
    try:
        scan = _jpeg_segment(data, lambda m: m == 0xDA)
    except (struct.error, IndexError, ValueError):
        return False
    return data.find(b"\xff\xd9", scan) >= 0


def _png_is_whole(data: bytes) -> bool:
    """Whether all chunks are there: OpenCV takes 2 GB for one of 44 bytes that claims as many."""
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), width  # a negative height means from top to bottom


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return (height, width) if len(data) >= 30 else (0, 0)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _tiff_size(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    directory = struct.unpack_from(order + "I", data, 4)[0]
    size = {}
    for i in range(struct.unpack_from(order + "H", data, directory)[0]):
        at = directory + 2 + 12 * i
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in (256, 257):  # ImageWidth, ImageLength, SHORT or LONG
            size[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)[0]
    return size.get(257, 0), size.get(256, 0)


def _pnm_size(data: bytes) -> tuple[int, int]:
    head = re.match(rb"P\d(?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data[:4096])
    if not head:
        raise ValueError("no size")
    return int(head[2]), int(head[1])


_HEADERS = [
    (rb"\xff\xd8\xff", _jpeg_size),
    (rb"\x89PNG\r\n\x1a\n", lambda data: struct.unpack_from(">II", data, 16)[::-1]),
    (rb"GIF8[79]a", lambda data: struct.unpack_from("<HH", data, 6)[::-1]),
    (rb"RIFF....WEBP", _webp_size),
    (rb"BM", _bmp_size),
    (rb"II\*\0|MM\0\*", _tiff_size),
    (rb"P[1-6]\s", _pnm_size),
]
