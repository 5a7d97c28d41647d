"""Files that are valid and small, and changed at random: untrusted input."""

import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib

import cv2
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

EXTREMES = [
    n + d for n in (0, 1 << 7, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63) for d in (-1, 0, 1)
]
WORDS = [b"-1", b"nan", b"inf", b"1e400", b"9" * 30, b"9" * 5000, b"0x10", b"", b"1_0", b"\xd9\xa1"]
POSITION = st.integers(-1 << 12, 1 << 16)  # from the end or the beginning
CODES = st.sampled_from("BHIQ")
EDITS = st.one_of(
    st.tuples(st.just("flip"), POSITION, st.integers(1, 255)),
    st.tuples(st.just("number"), POSITION, st.sampled_from(EXTREMES), CODES, st.sampled_from("<>")),
    st.tuples(st.just("word"), POSITION, st.sampled_from(WORDS)),
    st.tuples(st.just("cut"), POSITION, st.integers(1, 300)),
    st.tuples(st.just("end"), POSITION),
    st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("copy"), POSITION, POSITION, st.integers(1, 600)),
    st.tuples(st.just("repeat"), POSITION, st.integers(1, 64), st.integers(2, 200)),
)  # fmt: skip

CHANGES = st.lists(EDITS, min_size=1, max_size=4)


def change(data: bytes, edits) -> bytes:
    """The bytes after each of the edits, whose positions wrap around."""
    for kind, position, *how in edits:
        at = position % max(1, len(data))
        rest = data[at:]
        if kind == "flip" and rest:
            rest = bytes([rest[0] ^ how[0]]) + rest[1:]
        elif kind == "number":
            number, code, order = how
            packed = struct.pack(order + code, number % (1 << 8 * struct.calcsize(code)))
            rest = packed + rest[len(packed) :]
        elif kind == "word":
            match = re.compile(rb"-?[0-9][0-9.]*").search(data, at)
            if match:
                at, rest = match.start(), how[0] + data[match.end() :]
        elif kind == "cut":
            rest = rest[how[0] :]
        elif kind == "end":
            rest = b""
        elif kind == "insert":
            rest = how[0] + rest
        elif kind == "copy":
            source = how[0] % max(1, len(data))
            part = data[source : source + how[1]]
            rest = part + rest[len(part) :]
        elif kind == "repeat":
            rest = rest[: how[0]] * how[1] + rest[how[0] :]
        data = data[:at] + rest
    return data


def changed(*seeds: bytes, fix_up=bytes):
    """Mostly one of the seeds, changed in a few places and fixed up; sometimes any bytes."""
    mutants = st.builds(change, st.sampled_from(seeds), CHANGES).map(fix_up)
    return st.integers(0, 9).flatmap(lambda n: st.binary(max_size=200) if n == 9 else mutants)


# ------------------------------------------------------------------------------ files


def zip_of(files, how=zipfile.ZIP_DEFLATED, links=()) -> bytes:
    """A .zip of {name: data} and of symbolic links {name: target}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, how)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, links[name])
    return buffer.getvalue()


def tar_of(files, form, links=()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, links[name]
            archive.addfile(info)
    return buffer.getvalue()[:8192]


def with_sums(tar: bytes) -> bytes:
    """Each block that may be a header gets a right checksum, or no change would get far."""
    blocks = [bytearray(tar[i : i + 512]) for i in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


PIXELS = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8), (0, 0), 3
)


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and options.pop("animated", False):
        options |= {"save_all": True, "append_images": [Image.fromarray(255 - PIXELS)]}
    if kind in ("JPEG", "WEBP", "PNG", "TIFF"):
        options["exif"] = exif
    image.convert(options.pop("mode", "RGB")).save(buffer, kind, **options)
    return buffer.getvalue()


def with_crcs(png: bytes) -> bytes:
    """A PNG whose chunks have right checksums."""
    if not png.startswith(b"\x89PNG"):
        return png
    out, at = png[:8], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        body = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + png[at:]


FILES = {"set/b/2.jpg": b"b two" * 40, "set/a/1.jpg": b"", "set/张/3.jpg": bytes(700)}


LINKS = {"set/a/link.jpg": "../b/2.jpg", "set/c": "a"}
ZIPS = [zip_of(FILES, how) for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
ZIPS += [zip_of(FILES, how) for how in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)]
ZIPS += [zip_of(FILES, links=LINKS)]
TARS = [tar_of({**FILES, "set/" + "n" * 120 + "/4.jpg": b"4"}, form) for form in range(3)]
TARS += [tar_of(FILES, tarfile.PAX_FORMAT, LINKS)]
JPEGS = [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("JPEG", mode="CMYK")]
DEEP = cv2.imencode(".png", PIXELS.astype(np.uint16) * 257)[1].tobytes()
PNGS = [encoded("PNG"), encoded("PNG", animated=True), encoded("PNG", mode="P"), DEEP]
WEBPS = [encoded("WEBP"), encoded("WEBP", lossless=True), encoded("WEBP", animated=True)]
TIFFS = [encoded("TIFF"), encoded("TIFF", mode="CMYK"), encoded("TIFF", animated=True)]
TIFFS += [encoded("TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate")]
TIFFS += [encoded("TIFF", mode="1", compression="group4")]
OTHERS = [encoded("GIF"), encoded("GIF", animated=True), encoded("BMP"), encoded("BMP", mode="P")]
Image.init()  # fills Image.SAVE; of a Pillow before 11.3, AVIF is missing in it
NEWER = [encoded(kind) for kind in ("AVIF", "JPEG2000") if kind in Image.SAVE]
OTHERS += [encoded("PPM"), encoded("PPM", mode="1"), b"P3 2 1 255\n1 2 3 4 5 6\n"]


# ------------------------------------------------------------------------------ values

ODD = [
    None,
    True,
    -1,
    0,
    1,
    10**9,
    1 << 70,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x" * 50,
    [],
    (),
    {},
]
ODD += [[1], (1, 2, 3), {"a": 1}, {"train": [], "valid": [], "lfw": []}, "cuda:99", [None] * 5]
ODD += [torch.zeros(0), torch.zeros(3), torch.tensor(7), torch.full((2, 3), float("nan"))]
ODD += [torch.zeros(1).expand(9999, 9999), torch.arange(6).view(2, 3), torch.zeros(2, 3).half()]
REPLACEMENTS = st.tuples(st.lists(st.integers(0, 99), min_size=2, max_size=6), st.sampled_from(ODD))


def replaced(tree, choices, value):
    """A nest of dicts, lists and tuples with the value where the choices lead."""
    if not choices or not isinstance(tree, (dict, list, tuple)) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[choices[0] % len(keys)]
    inner = replaced(tree[key], choices[1:], value)
    if isinstance(tree, dict):
        return {**tree, key: inner}
    return type(tree)([*tree[:key], inner, *tree[key + 1 :]])
