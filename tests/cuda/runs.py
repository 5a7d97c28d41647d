"""Runs of the project's scripts within one process, as the cases of tests/cuda need them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from config import parse_args

FLAGS = "--network tiny --emb-size 16 --batch-size 8 --margin-s 16 --margin-m 0.2 --epochs 2 "
FLAGS += "--valid-fraction 0.2 --log-every 3 --lr 0.02 --compile off --augment adaface"


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
