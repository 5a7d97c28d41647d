"""A disk that fails: earlier files stay, a message says why, a second run completes the work.

Every call that writes, syncs, renames or makes a folder fails once; then the kernel's own limits.
"""

import json
import os
import re
import stat
import subprocess
import threading

import cv2
import numpy as np
import pytest
import torch

import pre_process
from config import Config
from evaluation.figures import draw_figure, save_figure
from fileio.bin_sets import write_bin
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.safe_files import atomic_write
from preprocessing import detector as face_detector
from preprocessing import index_pack, pipeline, prepare
from preprocessing.detector import Detection
from tests.helpers.faults import FailingDisk
from tests.helpers.synthetic_faces import write_zip
from utils import TEMPLATE, UserError

SET = ("train.rec", "train.idx", "property", "index.tsv")


def contents(folder, names=SET):
    return {name: (folder / name).read_bytes() for name in names}


# ------------------------------------------------------------------------------ single files


def write_text(path):
    with atomic_write(path, "w") as file:
        file.write("new" * 5000)


def write_torch(path):
    with atomic_write(path) as file:
        torch.save({"w": torch.arange(3000)}, file)


def write_and_read_back(path):
    with atomic_write(path, "w+b") as file:
        file.write(b"new" * 5000)
        file.seek(9000)
        file.write(file.read(3) + b"again")


def write_figure(path):
    save_figure(draw_figure("curve", lambda *_: None), path.with_suffix(".png"))


WRITERS = {
    "text": write_text,
    "torch": write_torch,
    "seeks": write_and_read_back,
    "png": write_figure,
    "bin": lambda path: write_bin(path, [b"a" * 9000, b"b"], [True]),
}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_the_old_one_or_the_new_one_after_any_failure(kind, stays, tmp_path, monkeypatch):
    path = tmp_path / "file.png"
    WRITERS[kind](path)
    new = path.read_bytes()
    for fail_at in range(1, 100):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, fail_at, stays)
            try:
                WRITERS[kind](path)
                error = None
            except UserError as caught:
                error = str(caught)
        assert (error is not None) == disk.failed
        assert path.read_bytes() in (b"old", new)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        if not disk.failed:
            break
        assert re.match(rf"{re.escape(str(tmp_path))}.* cannot be written \(", error)
        assert error.count("\n") == 0
    assert path.read_bytes() == new
    assert 5 <= fail_at < 99


def test_temporaries_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "last.pt"
    killed = tmp_path / ".last.pt-abc123.tmp"
    other = tmp_path / ".other-abc123.tmp"
    killed.write_bytes(b"half")
    other.write_bytes(b"another's")
    with atomic_write(path) as slow:
        slow.write(b"slow")
        with atomic_write(path) as quick:
            quick.write(b"quick")
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow"
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, type(tmp_path).replace

    def fsync(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_sync(handle)

    def replace(self, target):
        done.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(type(tmp_path), "replace", replace)
    write_text(tmp_path / "x")
    assert done == ["file", "rename", "folder"]


# ------------------------------------------------------------------------------ pre_process.py


def stub(detector, images):
    """A face a little off the middle of each image; none where it is dark."""
    points = TEMPLATE * 1.2 + 40
    box = np.array([50.0, 60, 170, 190])
    return [
        Detection("ok", 0.9, box, points) if image.mean() > 9 else Detection("no_face")
        for image in images
    ]


def tiny_images():
    """11 images of 3 identities, one of them dark: three blocks of four."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 256, (11, 5, 5, 3), np.uint8)
    coarse[6] = 0
    images = [encode_jpeg(cv2.resize(image, (220, 220))) for image in coarse]
    return {f"set/{i // 4}/{i:02d}.jpg": jpeg for i, jpeg in enumerate(images)}


@pytest.fixture
def prepare_in(tmp_path, capsys, monkeypatch):
    """Prepare tiny images with a stub for a detector, in a folder; returns the error message."""
    monkeypatch.setattr(pipeline, "find_face", stub)
    monkeypatch.setattr(face_detector, "FaceDetector", lambda *_, **__: object())
    monkeypatch.setattr(prepare, "BLOCK_IMAGES", 4)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and no power is cut here
    source = write_zip(tmp_path / "source" / "tiny.zip", tiny_images())

    def prepare_in(folder, source=source):
        settings = {"output": str(folder / "faces"), "images_dir": str(folder / "images")}
        try:
            pre_process.main(Config(source=str(source), detect_batch=4, **settings))
        except SystemExit as ended:
            assert ended.code == 2
            lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
            (message,) = [line for line in lines if line and "%|" not in line]
            return message
        capsys.readouterr()
        return ""

    return prepare_in


def everything(folder):
    """{name: bytes} of the folder but for report.json, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for-good"])
def test_pre_process_after_each_failing_call(stays, prepare_in, tmp_path, monkeypatch):
    """The output is absent or complete after each; run again, it has the unbroken run's bytes."""
    assert prepare_in(tmp_path / "complete") == ""
    complete = everything(tmp_path / "complete")
    assert {f"faces/{name}" for name in SET} | {"images/9_img.jpg"} <= set(complete)
    names = set()
    for fail_at in range(1, 500, 2 if stays else 1):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, fail_at, stays)
            message = prepare_in(folder)
        if not disk.failed:
            break
        finished = (folder / "faces" / "report.json").is_file()
        if not finished:
            assert not (folder / "faces").exists()
        published = {name: data for name, data in everything(folder).items() if "part/" not in name}
        assert published.items() <= complete.items()
        assert not [name for name in everything(folder) if name.endswith(".tmp")]
        assert re.fullmatch(
            r"\S+: (\S+) cannot be written \(.+\): .+ and start again; what was there before is "
            r"kept\.",
            message,
        ), message
        names.add(message.split()[1].removeprefix(str(folder)))
        if not finished:
            assert prepare_in(folder) == ""
            assert everything(folder) == complete
    print(f"{fail_at - 1} calls of pre_process.py failed in turn")
    assert fail_at > 80
    assert {"/faces.part/train.rec", "/faces.part/index.tsv", "/faces.part/property"} <= names
    assert {"/images/0_raw.jpg", "/faces.part/report.json", "/faces"} <= names


def test_setting_aside_can_be_cut_short_anywhere(prepare_in, tmp_path, monkeypatch):
    """What was begun with other settings ends up in one piece in one folder."""
    folder = tmp_path / "x"
    with monkeypatch.context() as patch:
        FailingDisk(patch, 1, calls=((prepare, "publish_output"),))
        prepare_in(folder)
    begun = contents(folder / "faces.part", (*SET, "report.json"))
    for fail_at in range(1, 20):
        part = tmp_path / str(fail_at) / "faces.part"
        part.mkdir(parents=True)
        for name, data in begun.items():
            (part / name).write_bytes(data)
        other = json.loads(begun["report.json"]) | {"fingerprint": "another"}
        (part / "report.json").write_text(json.dumps(other))
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, fail_at)
            prepare_in(part.parent)
        aside = part.parent / "faces.1.part"
        if disk.failed and not (part.parent / "faces").exists():
            assert prepare_in(part.parent) == ""
        assert contents(aside) == {name: begun[name] for name in SET}
        assert json.loads((aside / "report.json").read_text()) == other
        assert not (part.parent / "faces.2.part").exists()


def test_a_source_that_goes_away_is_no_set_of_bad_images(prepare_in, tmp_path, monkeypatch):
    source = tmp_path / "disk" / "set"
    for name, data in tiny_images().items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    assert prepare_in(tmp_path / "complete", source) == ""
    real = prepare.plan_blocks

    def unmount(*args):
        blocks = real(*args)
        source.rename(tmp_path / "elsewhere")
        return blocks

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "plan_blocks", unmount)
        assert "disappeared while it was being read" in prepare_in(tmp_path / "x", source)
    (tmp_path / "elsewhere").rename(source)
    assert prepare_in(tmp_path / "x", source) == ""
    assert everything(tmp_path / "x") == everything(tmp_path / "complete")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory (MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory"),
        (cv2.error("Failed to allocate 9 bytes"), "out of memory (error: Failed to allocate"),
        (SystemError("broken"), "thread that aligns images failed (SystemError: broken); the imag"),
    ],
)
@pytest.mark.parametrize(
    ("stage", "calls"), [("decode_entry", 9), ("find_face", 1), ("align_and_encode", 5)]
)
def test_a_failing_thread_ends_the_run_with_a_message_and_what_is_done_stays(
    error, message, stage, calls, prepare_in, tmp_path, monkeypatch
):
    assert prepare_in(tmp_path / "complete") == ""
    function, left = getattr(pipeline, stage), [calls]

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, stage, dying)
        assert message in prepare_in(tmp_path / "x")
    rows = (tmp_path / "x" / "faces.part" / "index.tsv").read_text().splitlines()[1:]
    assert len(rows) in (
        (4,) if stage == "align_and_encode" else (0, 4)
    )  # the others are far ahead
    assert prepare_in(tmp_path / "x") == ""
    assert everything(tmp_path / "x") == everything(tmp_path / "complete")
    report = json.loads((tmp_path / "x" / "faces" / "report.json").read_text())
    assert report["resumed_at"] == len(rows)


def live_threads(prefix):
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def test_a_failing_writer_leaves_no_thread_behind(prepare_in, tmp_path, monkeypatch):
    """The pipeline is closed by its consumer; the garbage collector could do so in any thread."""
    real, ended, errors = pipeline.align_blocks, [], []

    def watched(*args, **kwargs):
        try:
            yield from real(*args, **kwargs)
        finally:
            ended.append(threading.current_thread())

    def failing(self, block):
        assert live_threads(pipeline.ALIGN_THREADS)
        errors.append(UserError("the writer has failed"))
        raise errors[0]  # kept, and with it its traceback and the frames: nothing is collected

    monkeypatch.setattr(prepare, "align_blocks", watched)
    monkeypatch.setattr(prepare.DatasetWriter, "append", failing)
    assert "the writer has failed" in prepare_in(tmp_path / "x")
    assert ended == [threading.current_thread()]
    assert live_threads(pipeline.ALIGN_THREADS) == []


def test_a_failing_index_leaves_no_thread_behind(tmp_path, monkeypatch):
    write_dataset(tmp_path, [encode_jpeg(np.zeros((112, 112, 3), np.uint8))] * 9, [0] * 9)
    monkeypatch.setattr(index_pack, "CHECK_CHUNK", 2)
    errors = []

    def failing(row):
        assert live_threads(index_pack.CHECK_THREADS)
        errors.append(UserError("the index has failed"))
        raise errors[0]

    monkeypatch.setattr(index_pack, "format_index_row", failing)
    with pytest.raises(UserError, match="index has failed"):
        index_pack.index_pack(tmp_path / "train.rec", tmp_path)
    assert live_threads(index_pack.CHECK_THREADS) == []


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system in memory of so many bytes, or changes its options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount")
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        return disk

    yield mount
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [4, 8, 16, 24, 32, 48, 64, 96, 128])
def test_a_full_disk(kilobytes, small_disk, prepare_in, tmp_path):
    assert prepare_in(tmp_path / "complete") == ""
    disk = small_disk(f"size={kilobytes}k")
    message = prepare_in(disk)
    assert "cannot be written (No space left on device): make room" in message
    assert not list(disk.rglob("*.tmp"))
    small_disk("remount,size=10m")
    assert prepare_in(disk) == ""
    assert everything(disk) == everything(tmp_path / "complete")


def test_a_disk_that_turns_read_only_and_one_that_goes(
    small_disk, prepare_in, tmp_path, monkeypatch
):
    assert prepare_in(tmp_path / "complete") == ""
    disk = small_disk("size=10m")
    real, left = prepare.DatasetWriter.append, [1]

    def append(self, block):
        left[0] -= 1
        if left[0] == -1:
            subprocess.run(self.command, check=True)
        real(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.DatasetWriter, "append", append)
        patch.setattr(prepare.DatasetWriter, "command", ["umount", "-l", disk], raising=False)
        assert "property cannot be written (No such file" in prepare_in(disk)
    assert list(disk.iterdir()) == []
    small_disk("size=10m,ro")
    assert "faces.part cannot be written (Read-only file system): mount" in prepare_in(disk)
    small_disk("remount,rw,size=10m")
    assert prepare_in(disk) == ""
    assert everything(disk) == everything(tmp_path / "complete")
