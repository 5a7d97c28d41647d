"""What test_cuda.py runs in a process that has fake GPUs; each case prints a line of JSON.

    python -m tests.cuda.cases FOLDER [CASE ...]      # in the environment of fake_cuda.launcher

FOLDER/set is the training set of tests/helpers/tiny.py. A case fails by raising.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from config import MARGINS, parse_args
from tests.helpers.fake_cuda.interpreter import fake_cuda

FLAGS = "--network tiny --emb-size 16 --batch-size 8 --margin-s 16 --margin-m 0.2 --epochs 2 "
FLAGS += "--valid-fraction 0.2 --log-every 3 --lr 0.02 --compile off --augment adaface"
NO_MARGIN = {"softmax": "--margin-s 1 --margin-m 0", "norm_softmax": "--margin-m 0"}
OPTIONS = [
    "--focal-loss --ema 0.9 --clip-norm 1 --no-decay-bn",
    "--accumulate 2 --checkpoint-activations --cache ram",
    "--cache none --use-se --zero-init",
    "--sample-rate 0.5 --batch-size 2",  # with more classes sampled than the batch has labels
    "--no-amp",
]


def settings(folder: Path, runs: str, more: str, device: str = "cuda"):
    """The settings of a tiny run."""
    where = f"--train-set {folder}/set --data-dir {folder} --images-dir {folder}"
    line = f"{FLAGS} {where} --runs-dir {folder}/{runs} --device {device} {more}"
    return parse_args(line.split(), "train")


def run_main(main, cfg) -> tuple[int, str]:
    """A script's exit status and all that it printed."""
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(cfg)
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def train_run(folder: Path, runs: str, more: str = "", device: str = "cuda") -> dict:
    """The last checkpoint of a run of train.py."""
    import train
    from fileio.checkpoint_file import load_checkpoint

    code, printed = run_main(train.main, settings(folder, runs, more, device))
    assert code == 0, printed
    return load_checkpoint(next((folder / runs).glob("*/last.pt")))


def open_run(folder: Path, more: str):
    """A run of train.py that has not begun."""
    import train

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = train.build_run(settings(folder, "unused", more), folder / "unused")
    run.engine.train()
    return run


# ------------------------------------------------------------------------------ the cases


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
    run.train_step(first.images, first.labels, 0.1)  # the first one creates the momentum
    report.clear()
    before, steps = report.launches(), 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            run.train_step(batch.images, batch.labels, 0.1)
            steps += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not report.waits(), report.waits()
    return {"kernels per step": round((report.launches() - before) / steps)}


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


def detects_as_on_a_cpu(folder: Path, report) -> dict:
    """MTCNN on synthetic images: the same status, points within a thousandth of a pixel."""
    from fileio.images import decode_image
    from preprocessing.detector import FaceDetector, find_face
    from tests.helpers.synthetic_faces import face, image_without_face

    files = [face(0), face(1), face(2, 1), image_without_face()]
    images = np.stack([decode_image(data) for data in files])
    cpu, gpu = (find_face(FaceDetector(device, threads=1), images) for device in ("cpu", "cuda"))
    assert [a.status for a in cpu] == [b.status for b in gpu]
    found = [(a, b) for a, b in zip(cpu, gpu, strict=True) if a.points is not None]
    apart = max(float(np.abs(a.points - b.points).max()) for a, b in found)
    assert apart < 1e-3
    return {"points apart": apart}


def evaluates_as_on_a_cpu(folder: Path, report) -> dict:
    """lfw_eval.py of one checkpoint: the same accuracy on both devices."""
    import lfw_eval

    train_run(folder, "evaluated", "--epochs 1", "cpu")
    (run,) = (folder / "evaluated").iterdir()
    metrics = []
    for device in ("cpu", "cuda"):
        where = f"--runs-dir {folder}/evaluated --images-dir {folder}/images --data-dir {folder} "
        argv = f"{where} --lfw {folder}/set/lfw.bin --device {device} --checkpoint {run}/best.pt"
        code, printed = run_main(lfw_eval.main, parse_args(argv.split(), "lfw_eval"))
        assert code == 0, printed
        metrics.append(json.loads((run / "lfw.json").read_text()))
        for cached in (run / "embeddings").glob("*"):
            cached.unlink()
    for key in ("accuracy", "standard_error", "best_accuracy"):
        assert metrics[0][key] == metrics[1][key], key
    return {"accuracy": metrics[1]["accuracy"]}


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


CASES: list[tuple] = [
    (losses_equal_the_cpus,),
    (resumes_bit_for_bit,),
    (caches_give_the_same_weights,),
    (detects_as_on_a_cpu,),
    (evaluates_as_on_a_cpu,),
    (full_memory_is_a_message,),
    *[(nothing_waits, f"--margin {name} {NO_MARGIN.get(name, '')}".strip()) for name in MARGINS],
    *[(nothing_waits, flags) for flags in OPTIONS],
    (is_deterministic,),
    (is_deterministic, "--margin unitsface"),
]


def title(case: tuple) -> str:
    """The name of a case, with its flags."""
    return " ".join([case[0].__name__, *case[1:]])


def main(folder: Path, wanted: list[str], cases: list[tuple]) -> None:
    """Run the cases one after the other, or the wanted ones."""
    from training import run_report

    run_report.plot_curves = lambda *_: None  # seconds that say nothing here
    with fake_cuda() as report:
        for case in cases:
            if wanted and title(case) not in wanted:
                continue
            start = time.perf_counter()
            try:
                result = {"ok": True, **case[0](folder, report, *case[1:])}
            except Exception as error:
                result = {"ok": False, "why": f"{type(error).__name__}: {error}"[:600]}
            seconds = round(time.perf_counter() - start, 1)
            print(json.dumps({"case": title(case), "seconds": seconds, **result}), flush=True)
        report.stop()
        differences = dict(report.differences)
        line = {"case": "the CPU's results have CUDA's shapes and types", "ok": not differences}
        print(json.dumps(line | {"why": str(differences)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], CASES)
