"""Every file that comes from strangers, changed at random: a result or a sentence, nothing else.

A valid small file of each kind is flipped, cut, spliced, and given extreme numbers; some inputs are
bytes from nowhere. `make test` tries a few hundred, the same ones each time; `make fuzz` sets
FUZZ_EXAMPLES, the number for each kind, and tries new ones. It ends with a table of what came of
them.
"""

import collections
import contextlib
import gzip
import io
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch
from bounded import limit_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_onnx_file import external, model

from archives import ArchiveError, open_source
from embedders import load_embedder
from index_tsv import INDEX_HEADER, IndexRow, format_index_row, read_index
from models import build_model
from onnx_file import check_onnx
from pictures import MAX_PIXELS, PictureError, decode_picture
from record_writer import write_dataset
from recordio import RecordError, RecordReader, read_bin, record_offsets
from utils import UserError
from verification import parse_pair_list, parse_pairs

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MEGABYTES = 1500  # an animated WebP of as many pixels as are allowed takes 1 GB
tried = settings(
    max_examples=EXAMPLES or 20,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

# ------------------------------------------------------------------------------ changes

EXTREMES = [
    n + d for n in (0, 1 << 7, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63) for d in (-1, 0, 1)
]
WORDS = [b"-1", b"nan", b"inf", b"1e400", b"9" * 30, b"9" * 5000, b"0x10", b"", b"1_0", b"\xd9\xa1"]
PLACE = st.integers(-1 << 12, 1 << 16)  # from the end or the beginning
CODES = st.sampled_from("BHIQ")
EDITS = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
    st.tuples(st.just("number"), PLACE, st.sampled_from(EXTREMES), CODES, st.sampled_from("<>")),
    st.tuples(st.just("word"), PLACE, st.sampled_from(WORDS)),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 300)),
    st.tuples(st.just("end"), PLACE),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("copy"), PLACE, PLACE, st.integers(1, 600)),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 64), st.integers(2, 200)),
)  # fmt: skip

CHANGES = st.lists(EDITS, min_size=1, max_size=4)


def change(data: bytes, edits) -> bytes:
    """The bytes after each of the edits, whose places go round."""
    for kind, place, *how in edits:
        at = place % max(1, len(data))
        rest = data[at:]
        if kind == "flip" and rest:
            rest = bytes([rest[0] ^ how[0]]) + rest[1:]
        elif kind == "number":
            number, code, order = how
            packed = struct.pack(order + code, number % (1 << 8 * struct.calcsize(code)))
            rest = packed + rest[len(packed) :]
        elif kind == "word":
            found = re.compile(rb"-?[0-9][0-9.]*").search(data, at)
            if found:
                at, rest = found.start(), how[0] + data[found.end() :]
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


def changed(*seeds: bytes, mend=bytes):
    """Mostly one of the seeds, changed in a few places and mended; sometimes any bytes."""
    mutants = st.builds(change, st.sampled_from(seeds), CHANGES).map(mend)
    return st.integers(0, 9).flatmap(lambda n: st.binary(max_size=200) if n == 9 else mutants)


def judge(kind: str, function, *arguments, errors=UserError):
    """Count what comes of an input: a result or one of these errors; any other fails the test."""
    try:
        result = function(*arguments)
    except errors as error:
        outcomes[kind]["refused"] += 1
        assert str(error)
        return None
    outcomes[kind]["read"] += 1
    return result


@contextlib.contextmanager
def written(folder, files):
    """The paths of files in the folder, for as long as they are looked at."""
    paths = [folder / name for name in files]
    for path in paths:
        path.write_bytes(files[path.name])
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink()


@pytest.fixture(autouse=True)
def little_memory():
    """The process may not grow by more than `MEGABYTES`."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    before = limit_memory(3 * MEGABYTES)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A folder for the inputs; at the end, the table of what came of them."""
    yield tmp_path_factory.mktemp("fuzz")
    if EXAMPLES:
        outcomes["all"] = sum(outcomes.values(), collections.Counter())
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{'kind':12}{'inputs':>8}{'read':>8}{'refused':>8}")
            for kind, counts in outcomes.items():
                print(f"{kind:12}{counts.total():8,}{counts['read']:8,}{counts['refused']:8,}")


# ------------------------------------------------------------------------------ archives

FILES = {"set/b/2.jpg": b"b two" * 40, "set/a/1.jpg": b"", "set/张/3.jpg": bytes(700)}


def zip_of(files, how=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, how)
    return buffer.getvalue()


def tar_of(files, form) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()[:8192]


ZIPS = [zip_of(FILES, how) for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)]
TARS = [tar_of({**FILES, "set/" + "n" * 120 + "/4.jpg": b"4"}, form) for form in range(3)]


def zipped(tar: bytes) -> bytes:
    return gzip.compress(tar, mtime=0)


def with_sums(tar: bytes) -> bytes:
    """Each block that may be a header gets a right check sum, or no change would get far."""
    blocks = [bytearray(tar[i : i + 512]) for i in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def read_archive(path):
    with open_source(path) as source:
        entries = source.entries()
        for entry in entries:
            assert ".." not in entry.name.split("/") and not entry.name.startswith("/")
        for _, data in source.read(entries):
            assert isinstance(data, (bytes, ArchiveError))
        return source.damage


def try_archive(folder, kind, data):
    with written(folder, {f"x.{kind.partition(' ')[2] or kind}": data}) as (path,):
        judge(kind, read_archive, path)
        assert list(folder.iterdir()) == [path]  # nothing is written


@tried
@given(data=changed(*ZIPS))
def test_zip(folder, data):
    try_archive(folder, "zip", data)


@tried
@given(data=changed(*TARS))
def test_tar(folder, data):
    try_archive(folder, "tar", data)


@tried
@given(data=changed(*TARS, mend=with_sums))
def test_tar_of_right_sums(folder, data):
    try_archive(folder, "mended tar", data)


@tried
@given(data=st.one_of(changed(*map(zipped, TARS)), changed(*TARS, mend=with_sums).map(zipped)))
def test_tgz(folder, data):
    try_archive(folder, "tgz", data)


# ------------------------------------------------------------------------------ pictures

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
    """A PNG whose chunks have right check sums."""
    if not png.startswith(b"\x89PNG"):
        return png
    out, at = png[:8], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        body = png[at + 4 : at + 8 + length]
        out += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + png[at:]


JPEGS = [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("JPEG", mode="CMYK")]
DEEP = cv2.imencode(".png", PIXELS.astype(np.uint16) * 257)[1].tobytes()
PNGS = [encoded("PNG"), encoded("PNG", animated=True), encoded("PNG", mode="P"), DEEP]
WEBPS = [encoded("WEBP"), encoded("WEBP", lossless=True), encoded("WEBP", animated=True)]
TIFFS = [encoded("TIFF"), encoded("TIFF", mode="CMYK"), encoded("TIFF", animated=True)]
TIFFS += [encoded("TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate")]
TIFFS += [encoded("TIFF", mode="1", compression="group4")]
OTHERS = [encoded("GIF"), encoded("GIF", animated=True), encoded("BMP"), encoded("BMP", mode="P")]
OTHERS += [encoded("PPM"), encoded("PPM", mode="1"), b"P3 2 1 255\n1 2 3 4 5 6\n"]


def try_picture(kind, data):
    image = judge(kind, decode_picture, data, errors=PictureError)
    if image is not None:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
        assert image.shape[0] * image.shape[1] <= MAX_PIXELS


@tried
@given(data=changed(*JPEGS))
def test_jpeg(data):
    try_picture("jpeg", data)


@tried
@given(data=changed(*PNGS, mend=with_crcs))
def test_png(data):
    try_picture("png", data)


@tried
@given(data=changed(*WEBPS))
def test_webp(data):
    try_picture("webp", data)


@tried
@given(data=changed(*TIFFS))
def test_tiff(data):
    try_picture("tiff", data)


@tried
@given(data=changed(*OTHERS))
def test_gif_bmp_pnm(data):
    try_picture("gif bmp pnm", data)


# ------------------------------------------------------------------------------ records


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """train.rec, train.idx and property of a small set, by name."""
    folder = tmp_path_factory.mktemp("pack")
    write_dataset(folder, [*JPEGS, b"no picture"], [0, 0, 1, 2])
    return {name: (folder / name).read_bytes() for name in ("train.rec", "train.idx", "property")}


def read_pack(folder):
    reader = RecordReader(folder)
    assert 0 <= reader.labels.min() <= reader.labels.max() < reader.num_classes
    for i in range(len(reader)):
        with contextlib.suppress(RecordError):
            assert reader.image(i).dtype == np.uint8


@tried
@given(data=st.data())
@pytest.mark.parametrize("name", ["train.rec", "train.idx", "property"])
def test_record_files(folder, pack, name, data):
    beside = data.draw(st.sets(st.sampled_from(["train.idx", "property"])))
    files = {n: c for n, c in pack.items() if n in {"train.rec", name} | beside}
    files[name] = data.draw(changed(files[name]))
    with written(folder, files):
        judge(name, read_pack, folder)
        assert record_offsets(folder / "train.rec")[-1] <= len(files["train.rec"])


BINS = [
    pickle.dumps(value, protocol)
    for protocol in range(6)
    for value in (([b"\xff\xd8a", b"\xe9", b"\xe9", b"d"], [True, False]),
                  ([np.frombuffer(b"abc", np.uint8)] * 2, np.array([True])),
                  ([bytearray(b"\xe9")] * 2, [np.bool_(True)]))
]  # fmt: skip


@tried
@given(data=changed(*BINS))
def test_bin(folder, data):
    with written(folder, {"x.bin": data}) as (path,):
        result = judge("bin", read_bin, path, errors=RecordError)
    if result is not None:
        images, same = result
        assert all(type(image) is bytes for image in images)
        assert same.dtype == bool and len(images) == 2 * len(same)


# ------------------------------------------------------------------------------ text

ROWS = [
    IndexRow(1, 0, "李", "s/李/1.jpg", "ok", 0.9, [1, 2, 3, 4], [[1, 2]] * 5),
    IndexRow(None, None, "b\t\\", "s/b/\n.jpg", "no_face"),
]
INDEX = (INDEX_HEADER + "".join(map(format_index_row, ROWS))).encode()
PAIR_LIST = "a/1.jpg a/2.jpg 1\n李/1.png a/1.jpg 0\nb\\1\t./c 1\t0\n".encode()
PAIRS = b"2\t1\nAl\t1\t2\nAl\t1\tBo Li\t3\nBo Li\t12\t2\nBo Li\t3\tAl\t1\n"


@tried
@given(data=changed(INDEX))
def test_index(folder, data):
    with written(folder, {"index.tsv": data}):
        table = judge("index.tsv", read_index, folder)
    if table is not None:
        assert {len(column) for column in table} == {len(table.record)}
        assert min(table.record.min(initial=0), table.label.min(initial=0)) >= -1


@tried
@given(
    data=changed(PAIRS) | changed(PAIR_LIST), parse=st.sampled_from([parse_pairs, parse_pair_list])
)
def test_pairs(data, parse):
    pairs = judge("pairs.txt", lambda: parse(data.decode("utf-8")), errors=ValueError)
    if pairs is not None:
        assert len(pairs.first) == len(pairs.second) == len(pairs.same) == len(pairs.folds)
        assert max(pairs.first.max(), pairs.second.max()) < len(pairs.names)


# ------------------------------------------------------------------------------ models


def state_file(**options) -> bytes:
    torch.manual_seed(0)
    state = build_model("tiny", emb_size=2).state_dict()
    buffer = io.BytesIO()
    config = {"network": "tiny", "use_se": False, "seed": 1}
    torch.save({"config": config, "model": dict(state), "epoch": 3}, buffer, **options)
    return buffer.getvalue()


CHECKPOINT, LEGACY = state_file(), state_file(_use_new_zipfile_serialization=False)


def repacked(pickled: bytes) -> bytes:
    """The checkpoint with another pickle, its check sums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as whole, zipfile.ZipFile(buffer, "w") as packed:
        for info in whole.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            packed.writestr(info.filename, pickled if is_pickle else whole.read(info))
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as opened:
    PICKLED = next(opened.read(n) for n in opened.namelist() if n.endswith("data.pkl"))


def read_checkpoint(path):
    load_embedder(path, device=torch.device("cpu"), network="tiny")


@tried
@given(whole=st.sampled_from([PICKLED, CHECKPOINT, LEGACY]), edits=CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_checkpoint(folder, whole, edits):
    data = change(whole, edits)  # here, or Hypothesis would keep hundreds of them
    data = repacked(data) if whole is PICKLED else data
    with written(folder, {"x.pt": data}) as (path,):
        judge("checkpoint", read_checkpoint, path)


@tried
@given(data=changed(model(external("matrix", "x.onnx", offset="0"), nodes=[external("a", "b")])))
def test_onnx(folder, data):
    with written(folder, {"x.onnx": data}) as (path,):
        judge("onnx", check_onnx, path)
