"""Every untrusted file, changed at random: a result or a sentence, nothing else.

A valid small file of each kind is flipped, cut, spliced, and given extreme numbers; some inputs are
random bytes. `make test` tries a few hundred, the same ones each time; `make fuzz` sets
FUZZ_EXAMPLES, the number for each kind, and tries new ones. It ends with a table of what came of
them.
"""

import collections
import contextlib
import copy
import gzip
import io
import os
import pickle
import resource
import zipfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from config import parse_args
from evaluation.embedders import load_embedder
from evaluation.face_folders import FaceFolder
from evaluation.pair_lists import parse_pairs
from fileio.archive_source import ArchiveError
from fileio.archives import open_source
from fileio.bin_sets import read_bin
from fileio.images import MAX_PIXELS, ImageError, decode_image
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row, read_index
from fileio.onnx_file import read_onnx
from fileio.record_writer import write_dataset
from fileio.recordio import RecordError, RecordReader, record_offsets
from fileio.shards import ShardReader, write_shards
from models import build_model
from tests.helpers.bounded import limit_memory
from tests.helpers.mutants import (
    CHANGES,
    JPEGS,
    NEWER,
    OTHERS,
    PNGS,
    REPLACEMENTS,
    TARS,
    TIFFS,
    WEBPS,
    ZIPS,
    change,
    changed,
    replaced,
    with_crcs,
    with_sums,
)
from tests.helpers.onnx_files import EXTERNAL_MODEL
from tests.helpers.tiny import FLAGS, write_tiny_set
from training.resume import open_checkpoint, resumed_config
from utils import UserError

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


def zipped(tar: bytes) -> bytes:
    return gzip.compress(tar, mtime=0)


def read_archive(path):
    with open_source(path) as source:
        entries = source.entries()
        for entry in entries:
            assert ".." not in entry.name.split("/") and not entry.name.startswith("/")
        for _, data in source.read(entries):
            assert isinstance(data, (bytes, ArchiveError))
        return source.corruption


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
@given(data=changed(*TARS, fix_up=with_sums))
def test_tar_of_right_sums(folder, data):
    try_archive(folder, "fixed-up tar", data)


@tried
@given(data=st.one_of(changed(*map(zipped, TARS)), changed(*TARS, fix_up=with_sums).map(zipped)))
def test_tgz(folder, data):
    try_archive(folder, "tgz", data)


# ------------------------------------------------------------------------------ images


def try_image(kind, data):
    image = judge(kind, decode_image, data, errors=ImageError)
    if image is not None:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
        assert image.shape[0] * image.shape[1] <= MAX_PIXELS


@tried
@given(data=changed(*JPEGS))
def test_jpeg(data):
    try_image("jpeg", data)


@tried
@given(data=changed(*PNGS, fix_up=with_crcs))
def test_png(data):
    try_image("png", data)


@tried
@given(data=changed(*WEBPS))
def test_webp(data):
    try_image("webp", data)


@tried
@given(data=changed(*TIFFS))
def test_tiff(data):
    try_image("tiff", data)


@tried
@given(data=changed(*OTHERS))
def test_gif_bmp_pnm(data):
    try_image("gif bmp pnm", data)


@tried
@given(data=changed(*NEWER))
def test_avif_jpeg2000(data):
    try_image("avif jp2", data)


# ------------------------------------------------------------------------------ records


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """train.rec, train.idx and property of a small set, by name."""
    folder = tmp_path_factory.mktemp("pack")
    write_dataset(folder, [*JPEGS, b"no image"], [0, 0, 1, 2])
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


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """train-00000.rec, its indexes and property, by name."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [*JPEGS, b"no image"], np.array([0, 0, 1, 2]), 1)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_shards(folder):
    reader = ShardReader(folder)
    for i in range(min(len(reader), 100)):
        with contextlib.suppress(RecordError):
            assert 0 <= reader.labels_of(np.array([i]))[0] < reader.num_classes
            assert reader.image(i).dtype == np.uint8
    reader.fingerprint()


@tried
@given(data=st.data(), name=st.sampled_from(["train-00000.rec", "train-00000.npy", "property"]))
def test_shards(folder, shard, data, name):
    files = dict(shard)
    if data.draw(st.booleans()):
        del files["train-00000.idx"]
    files[name] = data.draw(changed(files[name]))
    with written(folder, files):
        judge("shards", read_shards, folder)


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
# LFW's, CALFW's, a list in two forms, CSV; in four encodings.
PAIR_FILES = [
    b"2\t1\nAl\t1\t2\nAl\t1\tBo Li\t3\nBo Li\t12\t2\nBo Li\t3\tAl\t1\n",
    b"a_1.jpg 1\na_2.jpg 1\n\xef\xbb\xbfa_1.jpg 0\nb_1.jpg 0\n",
    "a/1.jpg a/2.jpg 1\n李/1.png a/1.jpg 0\n".encode(),
    "b\\1\t./c 1\t0\r\n李/1.png\ta/1.jpg\t1\r\n".encode("gb18030"),
    'path1,path2,same,fold\n"a/1.jpg",a/2.jpg,True,3\nb/1,a/1,False,4\n'.encode("utf-16"),
]
PAIR_IMAGES = ["Al/Al_0001", "Al/Al_0002", "Bo Li/Bo Li_0003", "r/a/1.jpg", "r/a/2.jpg", "b/1"]
find_pair_images = FaceFolder(None, PAIR_IMAGES, [], np.empty(0)).find


@tried
@given(data=changed(INDEX))
def test_index(folder, data):
    with written(folder, {"index.tsv": data}):
        table = judge("index.tsv", read_index, folder)
    if table is not None:
        assert {len(column) for column in table} == {len(table.record)}
        assert min(table.record.min(initial=0), table.label.min(initial=0)) >= -1


@tried
@given(data=changed(*PAIR_FILES))
def test_pairs(data):
    pairs = judge("pairs.txt", parse_pairs, data, find_pair_images, errors=ValueError)
    if pairs is not None:
        listed, ends = pairs
        assert len(listed.first) == len(listed.second) == len(listed.same) == ends.shape[1] > 0
        assert listed.folds is None or listed.folds.shape == ends.shape[1:]
        assert ends.max() < len(PAIR_IMAGES)


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
    """The checkpoint with another pickle, its checksums right."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as original,
        zipfile.ZipFile(buffer, "w") as packed,
    ):
        for info in original.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            packed.writestr(info.filename, pickled if is_pickle else original.read(info))
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as opened:
    PICKLED = next(opened.read(n) for n in opened.namelist() if n.endswith("data.pkl"))


def read_checkpoint(path):
    load_embedder(path, device=torch.device("cpu"), network="tiny")


@tried
@given(original=st.sampled_from([PICKLED, CHECKPOINT, LEGACY]), edits=CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_checkpoint(folder, original, edits):
    data = change(original, edits)  # here, or Hypothesis would keep hundreds of them
    data = repacked(data) if original is PICKLED else data
    with written(folder, {"x.pt": data}) as (path,):
        judge("checkpoint", read_checkpoint, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in the middle of its first epoch, and its state."""
    where = tmp_path_factory.mktemp("set")
    flags = f"{FLAGS} --checkpoint-every 0 --log-every 2 --train-set {where}"
    cfg = parse_args(flags.split(), "train")
    write_tiny_set(where)
    with contextlib.redirect_stdout(None):
        run = train.build_run(cfg, where)
    run.train_one_epoch(SimpleNamespace(add_scalar=lambda *_: None))
    history = {"train": run.history["train"][:1], "valid": [], "lfw": []}
    best = {"epoch": 0, "accuracy": 0.5, "loss": 1.0}
    state = {"step": 3, "window": torch.zeros(1, 3), "history": history, "best": best}
    return run, copy.deepcopy(run.state_dict() | state)


def resume(path, run):
    """As train.py --resume does, to the end of the epoch."""
    cfg = parse_args(["--resume", str(path)], "train")
    checkpoint, path = open_checkpoint(str(path), path.parent)
    resumed_config(cfg, checkpoint["config"], path)
    run.load_state_dict(checkpoint, path)
    run.train_one_epoch(SimpleNamespace(add_scalar=lambda *_: None))
    assert f"{run.best['epoch']} {run.best['accuracy']:.2%}"


@tried
@given(changes=st.lists(REPLACEMENTS, min_size=1, max_size=2))
def test_resumed_checkpoint(folder, trained, changes):
    run, state = trained
    for choices, value in changes:
        state = replaced(state, choices, value)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with written(folder, {"x.pt": buffer.getvalue()}) as (path,):
        run.epoch = run.step = 0
        run.window, run.is_mid_step = [], False
        judge("resumed", resume, path, run)
        (run.folder / "bad_batch.pt").unlink(missing_ok=True)


@tried
@given(data=changed(EXTERNAL_MODEL))
def test_onnx(folder, data):
    with written(folder, {"x.onnx": data}) as (path,):
        judge("onnx", read_onnx, path)
