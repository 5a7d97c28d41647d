"""What a run does and says when a step, memory or a thread fails."""

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import parse_args
from data_gen import ImageStore, LoadingError, make_split, train_batches
from fileio.checkpoint_file import load_checkpoint
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from training.gpu_memory import StepMemory
from training.run import Run
from training.step_errors import describe_out_of_memory, requested_bytes
from utils import UserError, is_out_of_gpu_memory, is_out_of_memory

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of "
    "which 1.20 GiB is free. Process 1 has 14.57 GiB memory in use."
)
# As the libraries word it: the runtime, the driver, cuDNN 8 and 9, cuBLAS, NCCL.
GPU_ERRORS = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other",
    "CUDA driver error: out of memory",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "FIND was unable to find an engine to execute this computation",
    "GET was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'",
    "NCCL error: unhandled cuda error, NCCL version 2.27.3\nCuda failure 'out of memory'",
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Run train.main; returns the run's folder and what it ended with."""

    def run(more=""):
        where = f"--train-set {folder} --runs-dir {tmp_path}/runs --images-dir {tmp_path}/images"
        argv = f"--resume {more} --runs-dir {tmp_path}/runs".split()
        if not list(tmp_path.glob("runs/[!.]*")):
            argv = f"{FLAGS} {where} {more}".split()
        code = 0
        monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
        try:
            train.main(parse_args(argv, "train"))
        except SystemExit as error:
            code = error.code
        return next(tmp_path.glob("runs/[!.]*")), code

    return run


def fail_at(monkeypatch, number, how):
    """Replace Run.train_step by one that at a global step calls how(run, images) first."""
    step = Run.train_step

    def failing(self, images, labels, lr):
        if self.global_step == number:
            images = how(self, images)
        return step(self, images, labels, lr)

    monkeypatch.setattr(Run, "train_step", failing)


def raise_it(error):
    raise error


# ------------------------------------------------------------------------------ not finite


def test_a_gradient_that_is_not_finite_is_reported_at_its_step(start, capsys, monkeypatch):
    def poison(run, images):
        # The loss is as it should be, its gradient is not.
        parameter = run.engine.head.weight
        hook = parameter.register_hook(lambda grad: hook.remove() or grad * math.nan)
        return images

    fail_at(monkeypatch, 5, poison)  # the second of the three steps that are logged together
    run, code = start("--checkpoint-every 0")
    assert code == 2
    error = capsys.readouterr().err
    assert "gradient's norm is nan at epoch 2, step 2 of 4 (loss " in error
    assert "loss nan" not in error
    bad = load_checkpoint(run / "bad_batch.pt")
    assert (bad["epoch"], bad["step"], bad["scale"]) == (1, 1, 16.0)
    assert math.isfinite(bad["loss"])
    assert math.isnan(bad["gradient_norm"])
    assert str(bad["records"]) in error
    # Nothing of that step or later ones is in a checkpoint, and a resumed run comes to it again.
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["head"].values())
    assert start() == (run, 2)
    assert_same({**load_checkpoint(run / "bad_batch.pt"), "loss": 0, "gradient_norm": 0}, {
        **bad, "loss": 0, "gradient_norm": 0
    })  # fmt: skip


def test_a_checkpoint_between_two_points_looks_at_the_steps_before_it(start, monkeypatch):
    fail_at(monkeypatch, 1, lambda run, images: images * math.inf)
    run, code = start("--checkpoint-every 1 --log-every 100")
    assert code == 2
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 1)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert load_checkpoint(run / "bad_batch.pt")["step"] == 1


def test_a_batch_that_cannot_be_saved_does_not_hide_the_reason(start, capsys, monkeypatch):
    fail_at(monkeypatch, 1, lambda run, images: images * math.inf)
    full = UserError("bad_batch.pt cannot be written (No space left on device).")
    monkeypatch.setattr("training.step_errors.save_checkpoint", lambda *_: raise_it(full))
    run, code = start()
    assert code == 2
    error = capsys.readouterr().err
    assert "The loss is nan at epoch 1, step 2 of 4" in error
    assert "the batch could not be saved (bad_batch.pt cannot be written (No space" in error
    assert not (run / "bad_batch.pt").exists()


def test_running_statistics_that_are_not_finite_are_in_no_checkpoint(start, capsys, monkeypatch):
    """Of batch normalisation: the loss may look good for long, but not what is evaluated."""

    def spoil(run, images):
        run.engine.model.bn1.running_var.fill_(math.inf)
        return images

    fail_at(monkeypatch, 2, spoil)
    run, code = start("--checkpoint-every 1")
    assert code == 2
    assert "Weights are not finite at epoch 0, step 3" in capsys.readouterr().err
    assert load_checkpoint(run / "last.pt")["step"] == 2


# ------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_unless_it_is_ignored(start, monkeypatch, number):
    before = signal.getsignal(number)
    try:
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with monkeypatch.context() as patch:
            fail_at(patch, 1, lambda run, images: signal.raise_signal(number) or images)
            run, code = start("--epochs 1")
        assert code == 0
        signal.signal(number, signal.SIG_DFL)
        with monkeypatch.context() as patch:
            fail_at(patch, 5, lambda run, images: signal.raise_signal(number) or images)
            assert start("--epochs 2") == (run, 130)
        state = load_checkpoint(run / "last.pt")
        assert (state["epoch"], state["step"]) == (1, 2)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("stopped", [False, True])
def test_after_a_run_signals_are_handled_as_before(start, monkeypatch, stopped):
    """In a notebook, Ctrl-C has to interrupt the next cell, not ask a finished run to stop."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    if stopped:
        fail_at(monkeypatch, 1, lambda run, images: signal.raise_signal(signal.SIGTERM) or images)
    _, code = start("--epochs 1")
    assert code == (130 if stopped else 0)
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------ memory


def test_errors_of_full_memory_are_known_and_read():
    for error, asked in (
        (torch.OutOfMemoryError(CUDA), 2.5 * 2**30),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 * 2**20),
        (RuntimeError(CPU), 2**32),
        (MemoryError(), 0),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), 0),
        *[(RuntimeError(text), 0) for text in GPU_ERRORS],
        (torch.AcceleratorError(GPU_ERRORS[0]), 0),
    ):
        assert is_out_of_memory(error)
        assert requested_bytes(error) == asked
    for text in ("mat1 and mat2 shapes cannot be multiplied", "CUDNN_STATUS_BAD_PARAM"):
        assert not is_out_of_memory(RuntimeError(text))
    assert all(is_out_of_gpu_memory(RuntimeError(text)) for text in GPU_ERRORS)
    assert is_out_of_gpu_memory(torch.OutOfMemoryError(CUDA))
    assert not is_out_of_gpu_memory(RuntimeError(CPU))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert requested_bytes(real.value) == 2**60
    text = describe_out_of_memory(real.value, None)
    assert text == "memory is full, 1,073,741,824.00 GiB were asked for"


def test_a_full_gpu_ends_the_run_with_a_user_error_and_what_was_saved(start, capsys, monkeypatch):
    needs = StepMemory(fixed=2 * 2**30, per_image=2**30, total=8 * 2**30)
    monkeypatch.setattr("training.run.free_gpu_memory", lambda device: 2**30)
    monkeypatch.setattr("training.run.measure_step_memory", lambda engine: needs)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, lambda *_: raise_it(torch.OutOfMemoryError(CUDA)))
        run, code = start()
    assert code == 2
    error = capsys.readouterr().err
    assert "epoch 2, step 1 of 4 the GPU's memory is full, 2.50 GiB were asked for, 1.00 GiB" in (
        error
    )
    assert "2.00 GiB and 1024.0 MiB per image, so 4 images at a time should fit. Take" in error
    assert "Take --accumulate 2, which keeps the batch size and the learning rate, or" in error
    assert "or --batch-size 4 with --lr 0.01. Once memory" in error
    assert "Traceback" not in error
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert start() == (run, 0)
    assert load_checkpoint(run / "last.pt")["epoch"] == 2


def test_full_memory_in_the_evaluation_keeps_every_step(start, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", lambda self: raise_it(torch.OutOfMemoryError(CUDA)))
        run, code = start("--checkpoint-every 0 --eval-batch 64")
    assert code == 2
    assert (
        "Evaluating, memory is full, 2.50 GiB were asked for; a smaller batch, say --eval-batch 32"
        in (capsys.readouterr().err)
    )
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 4)
    assert start("--eval-batch 32") == (run, 0)


# ------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(5, "Input/output error")])
def test_a_loader_thread_that_fails_ends_the_run_and_keeps_every_step(
    start, capsys, monkeypatch, error
):
    image, calls = RecordReader.image, []

    def failing(self, index):
        calls.append(index)
        if len(calls) > 150:
            raise error
        return image(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(RecordReader, "image", failing)
        run, code = start("--cache none --checkpoint-every 0 --epochs 4")
    assert code == 2
    printed = capsys.readouterr().err
    assert f"A loader thread failed ({type(error).__name__}: " in printed
    assert f"resume with: python train.py --resume {run}" in printed
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"]) > (1, 0)  # steps that only this end has saved
    assert start() == (run, 0)


def test_what_kills_a_thread_reaches_the_loop(folder, monkeypatch):
    reader = RecordReader(folder)
    parts = make_split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, parts, torch.device("cpu"), cache="none", workers=2)
    monkeypatch.setattr(RecordReader, "image", lambda *_: raise_it(SystemError("broken")))
    with pytest.raises(LoadingError, match="SystemError: broken"):
        list(train_batches(store, parts.train, batch_size=8, seed=0, epoch=0))


# ------------------------------------------------------------------------------ flat memory


def anonymous_bytes():
    """Memory of this process that no file backs: pages of a mapped train.rec do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def grown(tmp_path, count):
    """By how many bytes this process grows from the first quarter of `count` images on."""
    jpeg = encode_jpeg(np.zeros((112, 112, 3), np.uint8))
    write_dataset(tmp_path, (jpeg for _ in range(count)), [i * 100 // count for i in range(count)])
    reader = RecordReader(tmp_path)
    parts = make_split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, parts, torch.device("cpu"), cache="none", workers=2)
    batches = train_batches(store, parts.train, batch_size=100, seed=0, epoch=0)
    seen, sizes = 0, []
    for batch in batches:
        seen += len(batch.labels)
        sizes.append(anonymous_bytes())
    assert seen == count
    quarter = len(sizes) // 4
    return max(sizes[quarter:]) - max(sizes[:quarter])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_without_a_cache(tmp_path):
    assert grown(tmp_path, 4000) < 30 * 2**20  # as decoded images these are 150 MB


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_images(tmp_path):
    more = grown(tmp_path, 100_000)
    print(f"{more / 2**20:.1f} MiB more after the first quarter of 100,000 images")
    assert more < 30 * 2**20
