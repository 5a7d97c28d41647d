"""TensorBoard's points: on disk before the checkpoint that knows them, none missing, none twice."""

import errno
import struct

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile
from torch.utils.tensorboard import SummaryWriter

import train
from config import parse_args
from fileio.checkpoint_file import load_checkpoint
from tests.helpers.tiny import FLAGS, write_tiny_set
from training import event_log as events
from training.event_log import truncate_events


@pytest.fixture
def start(tmp_path, capsys, monkeypatch):
    """Run train.main on a tiny set in this process; its exit status and what it printed."""
    write_tiny_set(tmp_path / "set")

    def run(*argv, resumed=False):
        where = ["--runs-dir", f"{tmp_path}/runs", "--images-dir", f"{tmp_path}/images"]
        if not resumed:
            where += [*FLAGS.split(), "--train-set", f"{tmp_path}/set"]
        code = 0
        monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
        try:
            train.main(parse_args([*where, *argv], "train"))
        except SystemExit as error:
            code = error.code
        return code, "".join(capsys.readouterr())

    return run


def logged(folder):
    (path,) = folder.glob("events.*")
    frames = events.read_event_frames(path.read_bytes())
    return [(v.tag, event.step) for _, event in frames for v in event.summary.value]


def test_every_point_is_on_disk_before_the_checkpoint_that_knows_it(start, monkeypatch):
    saved, waiting = [], []
    add, flush = SummaryWriter.add_scalar, SummaryWriter.flush
    monkeypatch.setattr(
        SummaryWriter, "add_scalar", lambda self, *a: (waiting.append(a), add(self, *a))
    )
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: (waiting.clear(), flush(self)))

    def look(run_dir, checkpoint):
        points = [step for tag, step in logged(run_dir) if tag == "train/loss"]
        steps = [epoch * 4 + step for epoch, step, *_ in checkpoint["history"]["train"]]
        saved.append((points, steps, list(waiting)))

    monkeypatch.setattr("training.run.save_last", look)
    code, _ = start("--epochs", "3", "--checkpoint-every", "1", "--log-every", "1")
    assert code == 0
    assert len(saved) == 1 + 3 * 5  # at the start, after every step and after every epoch
    for points, steps, unwritten in saved:
        assert points == steps
        assert not unwritten


@pytest.mark.parametrize("written", [0, 1, 3, 9])
def test_a_full_disk_under_the_points_is_a_user_error(start, tmp_path, monkeypatch, written):
    """However many are written before; the run resumes from its checkpoint to the same points."""
    append, calls = gfile.LocalFileSystem.append, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gfile.LocalFileSystem, "append", full)
        code, printed = start("--log-every", "1")
    assert code == 2
    assert "events.out.tfevents cannot be written (No space left on device): make" in printed
    assert "Traceback" not in printed
    (run,) = tmp_path.glob("runs/[!.]*")
    if not (run / "last.pt").exists():
        return  # nothing was done that could be lost
    assert start("--resume", resumed=True)[0] == 0
    state = load_checkpoint(run / "last.pt")
    logged_steps = [event.step for path in sorted(run.glob("events.*"))
             for _, event in events.read_event_frames(path.read_bytes())
             for value in event.summary.value if value.tag == "train/loss"]  # fmt: skip
    assert logged_steps == [4 * epoch + step for epoch, step, *_ in state["history"]["train"]]


@pytest.mark.parametrize("epoch_is_open", [True, False])
def test_what_was_logged_after_the_checkpoint_is_cut_away(tmp_path, epoch_is_open):
    with SummaryWriter(tmp_path) as writer:
        for step in (2, 4, 6):
            writer.add_scalar("train/loss", step, step)
            if step % 4 == 0:
                writer.add_scalar("valid/loss", step, step)
    (path,) = tmp_path.glob("events.*")
    with path.open("ab") as file:  # a point that a kill cut in two
        file.write(struct.pack("<Q", 100) + b"abc")
    truncate_events(tmp_path, 4, epoch_is_open)
    expected = [("train/loss", 2), ("train/loss", 4)]
    assert logged(tmp_path) == expected + [("valid/loss", 4)] * (not epoch_is_open)
    before = path.stat()
    truncate_events(tmp_path, 4, epoch_is_open)  # nothing to do, nothing written
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with path.open("ab") as file:
        file.write(bytes(64))  # what a power cut leaves
    truncate_events(tmp_path, 4, epoch_is_open)
    assert path.stat().st_size == before.st_size
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [2, 4]
