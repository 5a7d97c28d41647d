"""What test_memory.py runs in a process that has a fake GPU of little memory; see cases.py.

    python -m tests.cuda.memory_cases FOLDER [CASE ...]

FOLDER/set has 2,000 images, which take 72 MiB decoded, FOLDER/small 150 and LFW. By
`training.gpu_memory` a step of `tiny` takes 8 MiB and 2.8 MiB per image, 186 MiB for 64; the
allocator reserves 204 MiB.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tests.cuda.cases import main
from tests.cuda.runs import run_main, settings
from tests.helpers.tiny import assert_same

MIB = 2**20
FLAGS = "--batch-size 64 --epochs 1 --augment none --eval-batch 64"
SMALL = "--train-set {}/small --cache ram --valid-fraction 0.9"
STOPPED = 130  # the status of a run that a signal has stopped


@contextlib.contextmanager
def memory_of(report, size: float) -> Iterator[None]:
    """For the block, the GPU has `size` MiB."""
    torch.cuda.empty_cache()
    report.set_total_memory(int(size * MIB))
    try:
        yield
    finally:
        report.set_total_memory(80 << 30)


def train(folder: Path, runs: str, more: str, steps: int = 0) -> tuple[int, str, Path]:
    """The status of a run, what it printed, and its last checkpoint; it stops after `steps`."""
    import train
    from training.run import Run

    train_step = Run.train_step

    def step(self, *args):
        if self.global_step + 1 == steps:
            self.request_stop()
        return train_step(self, *args)

    Run.train_step = step
    try:
        code, printed = run_main(train.main, settings(folder, runs, f"{FLAGS} {more}"))
    finally:
        Run.train_step = train_step
    return code, printed, next((folder / runs).glob("*/last.pt"), folder / "none")


def same_result(first: Path, second: Path) -> None:
    """Losses, weights, momentum and random states are the same to the last bit."""
    from fileio.checkpoint_file import load_checkpoint

    states = [load_checkpoint(path) for path in (first, second)]
    for key in ("model", "head", "optimizer", "history", "random", "window"):
        assert_same(states[1][key], states[0][key], key)


# ------------------------------------------------------------------------------ the cases


def cache_leaves_room_for_the_step(folder: Path, report) -> dict:
    """Half of 230 MiB would hold the set; beside it a step would not fit."""
    with memory_of(report, 230):
        code, printed, _ = train(folder, "gpu", "--cache gpu")
        assert code == 2, printed
        assert "memory is full" in printed, printed
        assert "--cache ram frees some" in printed, printed
        code, printed, auto = train(folder, "auto", "--cache auto", steps=3)
        assert code == STOPPED, printed
        assert "cache: ram" in printed, printed
        assert "Beside a training step the GPU has" in printed, printed
        code, printed, ram = train(folder, "ram", "--cache ram", steps=3)
        assert code == STOPPED, printed
    same_result(auto, ram)
    return {}


def cache_is_on_the_gpu_where_a_step_fits_too(folder: Path, report) -> dict:
    """The step that measures changes neither weights nor random states."""
    with memory_of(report, 400):
        code, printed, auto = train(folder, "roomy", "--cache auto", steps=2)
        assert code == STOPPED, printed
        assert "cache: gpu" in printed, printed
        assert "Beside" not in printed, printed
        code, _, gpu = train(folder, "asked", "--cache gpu", steps=2)
    same_result(auto, gpu)
    return {}


def accumulation_leaves_room_for_the_cache(folder: Path, report) -> dict:
    """What counts is how many images are computed at a time: 16 take 53 MiB."""
    with memory_of(report, 230):
        code, printed, _ = train(folder, "parts", "--cache auto --accumulate 4", steps=1)
    assert code == STOPPED, printed
    assert "cache: gpu" in printed, printed
    return {}


def memory_that_fills_while_loading_the_cache(folder: Path, report) -> dict:
    """The images then go into RAM, whoever has taken the GPU's memory."""
    with memory_of(report, 65):
        code, printed, full = train(folder, "loading", "--cache gpu --batch-size 8", steps=3)
    assert code == STOPPED, printed
    assert "Memory was full for --cache gpu; taking --cache ram instead." in printed, printed
    assert "cache: ram" in printed, printed
    code, printed, ram = train(folder, "loaded", "--cache ram --batch-size 8", steps=3)
    assert code == STOPPED, printed
    same_result(full, ram)
    return {}


def evaluation_takes_smaller_batches(folder: Path, report) -> dict:
    """Validation and LFW of 128 images at a time do not fit."""
    from fileio.checkpoint_file import load_checkpoint

    points = []
    for size in (80 << 10, 50):
        with memory_of(report, size):
            flags = f"{SMALL.format(folder)} --batch-size 8 --eval-batch 128"
            code, printed, path = train(folder, f"evaluated-{size}", flags)
        assert code == 0, printed
        assert ("Memory is full: evaluating 64 images at a time." in printed) == (size == 50)
        points.append(load_checkpoint(path)["history"])
    for key in ("valid", "lfw"):
        np.testing.assert_allclose(points[1][key], points[0][key], rtol=1e-5)
    return {"times": printed.count("Memory is full")}


def evaluation_that_cannot_fit_is_a_message(folder: Path, report) -> dict:
    """Not even one image fits; the run resumes where it was."""
    import train as script
    from config import parse_args
    from evaluation import embedders

    embed_in_batches = embedders.embed_in_batches

    def full(*args, **kwargs):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")  # PyTorch's own error

    embedders.embed_in_batches = full
    try:
        flags = f"{SMALL.format(folder)} --batch-size 16"
        code, printed, _ = train(folder, "hopeless", flags)
    finally:
        embedders.embed_in_batches = embed_in_batches
    assert code == 2, printed
    assert "Memory does not suffice for evaluating one image at a time" in printed, printed
    assert "All steps are saved; resume with" in printed, printed
    assert "Traceback" not in printed, printed
    argv = f"--runs-dir {folder}/hopeless --images-dir {folder} --resume"
    code, printed = run_main(script.main, parse_args(argv.split(), "train"))
    assert code == 0, printed
    return {}


def convolutions_have_the_layout_of_their_precision(folder: Path, report) -> dict:
    """channels_last where tensor cores compute, else contiguous; a CPU's stays channels_last."""
    from config import Config
    from evaluation.embedders import torch_embedder
    from train import build_engine

    faces, seen = torch.zeros(2, 112, 112, 3, dtype=torch.uint8), set()
    forward = torch.nn.Conv2d.forward

    def watched(self, x):
        if self.kernel_size != (1, 1) and x.shape[1] > 1:  # else both layouts are one
            last = {"memory_format": torch.channels_last}
            seen.add((x.is_contiguous(**last), self.weight.is_contiguous(**last)))
        return forward(self, x)

    capability = torch.cuda.get_device_capability
    result = {}
    torch.nn.Conv2d.forward = watched
    try:
        for device, cc, amp in (("cuda", 9, True), ("cuda", 9, False), ("cuda", 7, False), CPU):
            torch.cuda.get_device_capability = lambda device=None, cc=cc: (cc, 5)
            cfg = Config(network="tiny", emb_size=16, batch_size=8, amp=amp, device=device)
            engine = build_engine(cfg, 4, torch.device(device))
            where = f"on {device} {cc} {'amp' if amp else 'float32'}"
            seen.clear()
            torch_embedder(engine.model, torch.device(device))(faces)
            result[f"evaluate {where}"] = sorted(seen)
            seen.clear()
            engine.trial_step(8)  # of whose weights nothing can be embedded
            result[f"train {where}"] = sorted(seen)
    finally:
        torch.nn.Conv2d.forward = forward
        torch.cuda.get_device_capability = capability
    contiguous = {name for name, layouts in result.items() if layouts == [(False, False)]}
    last = {name for name, layouts in result.items() if layouts == [(True, True)]}
    assert contiguous | last == set(result), result
    assert contiguous == {
        "train on cuda 7 float32",
        *(f"evaluate on cuda {name}" for name in ("9 amp", "9 float32", "7 float32")),
    }, result
    return {}


CPU = ("cpu", 0, False)
CASES: list[tuple] = [
    (cache_leaves_room_for_the_step,),
    (cache_is_on_the_gpu_where_a_step_fits_too,),
    (accumulation_leaves_room_for_the_cache,),
    (memory_that_fills_while_loading_the_cache,),
    (evaluation_takes_smaller_batches,),
    (evaluation_that_cannot_fit_is_a_message,),
    (convolutions_have_the_layout_of_their_precision,),
]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], CASES)
