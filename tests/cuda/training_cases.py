"""Training on fake GPUs: equal to a CPU's, resumed, never waiting, out of memory."""

from __future__ import annotations

import collections
import itertools
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from config import MARGINS, parse_args
from distributed.process_group import world_size
from tests.cuda.runs import open_run, run_main, settings, train_run

NO_MARGIN = {"softmax": "--margin-s 1 --margin-m 0", "norm_softmax": "--margin-m 0"}
OPTIONS = [
    "--focal-loss --ema 0.9 --clip-norm 1 --no-decay-bn",
    "--accumulate 2 --checkpoint-activations --cache ram",
    "--cache none --use-se --zero-init",
    "--sample-rate 0.5 --batch-size 2",  # with more classes sampled than the batch has labels
    "--no-amp",
]


def losses_equal_the_cpus(folder: Path, report) -> dict:
    """float32 without dropout: the first loss to the last bit, the next within rounding."""
    flags = "--no-amp --dropout 0 --log-every 1"
    losses = []
    for device in ("cpu", "cuda"):
        history = train_run(folder, f"same-{device}", flags, device)["history"]
        losses.append([point[2] for point in history["train"]])
    assert losses[0][0] == losses[1][0], losses
    np.testing.assert_allclose(losses[0][:4], losses[1][:4], rtol=5e-3)
    return {"losses": losses[1][:3]}


def resumes_bit_for_bit(folder: Path, report) -> dict:
    """With dropout, random margins and EMA: CUDA's random state is saved and restored."""
    import train
    from fileio.checkpoint_file import load_checkpoint

    flags = "--dropout 0.3 --margin elastic_arc --ema 0.9"
    straight = train_run(folder, "straight", flags)
    train_run(folder, "halves", f"{flags} --epochs 1")
    argv = f"--runs-dir {folder}/halves --images-dir {folder} --resume --epochs 2"
    code, printed = run_main(train.main, parse_args(argv.split(), "train"))
    assert code == 0, printed
    resumed = load_checkpoint(next((folder / "halves").glob("*/last.pt")))
    for part in ("model", "head", "ema"):
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), name
    assert torch.equal(straight["random"]["cuda"], resumed["random"]["cuda"])
    assert straight["random"]["cuda"].any()
    return {"tensors": len(straight["model"])}


def caches_give_the_same_weights(folder: Path, report) -> dict:
    """Images from the GPU, from RAM and from the file are the same batches."""
    weights = [train_run(folder, f"cache-{c}", f"--cache {c} --epochs 1") for c in CACHES]
    for other in weights[1:]:
        for name, value in weights[0]["model"].items():
            assert torch.equal(value, other["model"][name]), name
    return {}


CACHES = ("gpu", "ram", "none")


def nothing_waits(folder: Path, report, *flags: str) -> dict:
    """No step makes the host wait: PyTorch's own check, and the stand-in's count."""
    run = open_run(folder, " ".join(flags))
    batches = run._batches()
    first = next(batches)
    # The first one creates the momentum; DistributedDataParallel times its first ten, for its log.
    for _ in range(12 if world_size() > 1 else 1):
        run.train_step(first.images, first.labels, 0.1)
    report.clear()
    before, steps = report.launches(), 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            run.train_step(batch.images, batch.labels, 0.1)
            steps += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not report.waits(), str(report)
    return {"kernels per step": round((report.launches() - before) / steps)}


def shards_do_not_wait(folder: Path, report) -> dict:
    """Nor do steps on a set in shards, whose labels are read from files."""
    from fileio.recordio import RecordReader
    from fileio.shards import write_shards

    reader = RecordReader(folder / "set")
    jpegs = (reader.encoded(i) for i in range(len(reader)))
    write_shards(folder / "shards", jpegs, reader.labels, 3, seed=0)
    return nothing_waits(folder, report, f"--train-set {folder}/shards")


class OtherLayouts(TorchDispatchMode):
    """Counts operations that give feature maps in another layout than channels_last."""

    def __init__(self):
        super().__init__()
        self.operations = collections.Counter()
        self.maps = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_flatten(out)[0]:
                if isinstance(x, torch.Tensor) and x.dim() == 4 and min(x.shape[1:]) > 3:
                    self.maps += 1
                    # A square map whose last dimension is another is permuted to (N, H, W, C).
                    is_permuted = x.shape[1] == x.shape[2] != x.shape[3] and x.is_contiguous()
                    if not (x.is_contiguous(memory_format=torch.channels_last) or is_permuted):
                        self.operations[func._schema.name] += 1
        return out


def stays_in_channels_last(folder: Path, report, *flags: str) -> dict:
    """No feature map or gradient of one is copied to NCHW and back."""
    run = open_run(folder, " ".join(flags))
    for batch in run._batches():
        with OtherLayouts() as layouts:
            run.train_step(batch.images, batch.labels, 0.1)
        assert layouts.maps > 50, layouts.maps
        # IResNet's last map is flattened by channel, as InsightFace's weights have it.
        flattened = 0 if "mobilefacenet" in "".join(flags) else 1
        assert layouts.operations == collections.Counter({"aten::clone": flattened}), str(
            layouts.operations
        )
        break
    return {"feature maps": layouts.maps}


def is_deterministic(folder: Path, report, *flags: str) -> dict:
    """Each operation of a step has a deterministic form."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        train_run(
            folder,
            "deterministic" + "".join(flags).replace(" ", ""),
            " ".join(["--epochs 1", *flags]),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return {}


def full_memory_is_a_message(folder: Path, report) -> dict:
    """The device has no more memory in the middle of a run."""
    import train
    from training.run import Run

    step, calls = Run.train_step, itertools.count(1)

    def train_step(self, *arguments):
        if next(calls) == 3:
            torch.cuda.empty_cache()
            report.set_total_memory(report.memory())
        return step(self, *arguments)

    Run.train_step = train_step
    try:
        code, printed = run_main(train.main, settings(folder, "full", "--batch-size 16"))
    finally:
        Run.train_step = step
        report.set_total_memory(80 << 30)
    assert code == 2, printed
    assert "memory" in printed and "Traceback" not in printed, printed
    assert "--resume" in printed, printed
    return {"message": printed[printed.index("At epoch") :][:200]}


def the_default_fits_8_gb_as_the_message_says(folder: Path, report) -> dict:
    """r50 at batch 512: the message names --accumulate, and a step with that does fit."""
    import train
    from fileio.record_writer import write_dataset
    from fileio.recordio import RecordReader
    from tests.helpers.fake_cuda import interpreter

    reader = RecordReader(folder / "set")
    jpegs = [reader.encoded(i % len(reader)) for i in range(600)]
    write_dataset(folder / "large", jpegs, [i // 60 for i in range(600)])
    flags = f"--network r50 --batch-size 512 --train-set {folder}/large --emb-size 512 --cache ram"
    torch.cuda.empty_cache()
    report.set_total_memory(8 << 30)
    interpreter.VALUES_BATCH = 2  # the sizes tell, not the values
    try:
        code, printed = run_main(train.main, settings(folder, "eight", flags))
        assert code == 2, printed
        assert "memory" in printed and "Traceback" not in printed, printed
        accumulate = re.search(r"Take (--accumulate \d+), which keeps the batch size", printed)
        assert accumulate, printed
        run = open_run(folder, f"{flags} {accumulate[1]}")
        batch = next(run._batches())
        run.train_step(batch.images, batch.labels, 0.1)
        return {"message": printed[printed.index("A step takes") :][:200]}
    finally:
        interpreter.VALUES_BATCH = float("inf")
        report.set_total_memory(80 << 30)


CASES: list[tuple] = [
    (losses_equal_the_cpus,),
    (resumes_bit_for_bit,),
    (caches_give_the_same_weights,),
    (full_memory_is_a_message,),
    (the_default_fits_8_gb_as_the_message_says,),
    *[(nothing_waits, f"--margin {name} {NO_MARGIN.get(name, '')}".strip()) for name in MARGINS],
    *[(nothing_waits, flags) for flags in OPTIONS],
    (shards_do_not_wait,),
    (stays_in_channels_last, "--use-se"),
    (stays_in_channels_last, "--network mobilefacenet --accumulate 2 --checkpoint-activations"),
    (is_deterministic,),
    (is_deterministic, "--margin unitsface"),
]
