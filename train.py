"""Train a face embedding with ArcFace on a set that pre_process.py (or InsightFace) prepared.

    python train.py                                    # r50 on data/faces_webface_112x112
    python train.py --network mobilefacenet --batch-size 128 --lr 0.025        # on a laptop
    python train.py --resume                           # go on with the newest run
    tensorboard --logdir=runs                          # watch

It prints what it trains on, a progress bar an epoch and then one line an epoch:

    epoch 1/32  loss 18.402  accuracy 12.31 %  valid loss 15.210 ...

and writes runs/<time>-<network>-s<seed>/last.pt, best.pt (best on the held-out images) and
TensorBoard's events, and at the end the curves images/train_loss.png, train_acc.png,
valid_loss.png and valid_acc.png. Ctrl-C stops after the step at hand and keeps it in last.pt.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from config import Config, parse_args
from data_gen import ImageStore, Split, split
from embedders import torch_embedder
from figures import plot_curves
from lfw_eval import LfwSet, evaluate_lfw, find_lfw, load_lfw
from recordio import RecordReader
from trainer import Trainer
from utils import (
    UserError,
    exit_with_sentence,
    get_device,
    keep_freed_memory,
    load_checkpoint,
    newest_run,
    seed_everything,
)

# What a resumed run may not change: it would be another run under the old one's name.
# fmt: off
FIXED_ON_RESUME = {
    "network", "emb_size", "use_se", "dropout", "margin_m", "margin_s", "easy_margin",
    "focal_loss", "gamma", "max_classes", "valid_fraction", "flip", "batch_size", "momentum",
    "weight_decay", "seed",
}
# fmt: on


def run_epochs(trainer: Trainer, writer: SummaryWriter, run_dir: Path, lfw: LfwSet | None) -> None:
    """Train, validate, evaluate and save, epoch by epoch, from wherever the trainer stands."""
    embed = torch_embedder(trainer.model, trainer.device, batch=trainer.cfg.eval_batch)
    while trainer.epoch < trainer.cfg.epochs:
        loss, accuracy = trainer.train_one_epoch(writer)
        line = f"epoch {trainer.epoch}/{trainer.cfg.epochs}  loss {loss:.3f}"
        line += f"  accuracy {accuracy:.2%}"
        score = (accuracy, -loss)
        if len(trainer.valid_positions):
            loss, accuracy = trainer.validate()
            score = (accuracy, -loss)
            trainer.history["valid"].append((trainer.epoch, loss, accuracy))
            writer.add_scalar("valid/loss", loss, trainer.global_step)
            writer.add_scalar("valid/accuracy", accuracy, trainer.global_step)
            line += f"  valid loss {loss:.3f}  valid accuracy {accuracy:.2%}"
        if lfw is not None:
            report = evaluate_lfw(embed, lfw)
            trainer.history["lfw"].append((trainer.epoch, report["accuracy"], report["threshold"]))
            writer.add_scalar("lfw/accuracy", report["accuracy"], trainer.global_step)
            writer.add_scalar("lfw/threshold", report["threshold"], trainer.global_step)
            line += f"  lfw {report['accuracy']:.2%}"
        print(line, flush=True)
        writer.flush()
        is_best = not trainer.best or score > (trainer.best["accuracy"], -trainer.best["loss"])
        if is_best:
            trainer.best = {"epoch": trainer.epoch, "accuracy": score[0], "loss": -score[1]}
            trainer.save(run_dir / "best.pt")
        trainer.save(run_dir / "last.pt")


def open_run(cfg: Config) -> tuple[Path, dict[str, Any] | None]:
    """The folder of a new run, or of the one to go on with and its last checkpoint."""
    if not cfg.resume:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.network}-s{cfg.seed}"
        run_dir = Path(cfg.runs_dir) / name
        return run_dir, None
    path = Path(cfg.resume)
    if cfg.resume == "newest":
        path = newest_run(cfg.runs_dir, "last.pt")
    elif path.is_dir():
        path = path / "last.pt"
    checkpoint = load_checkpoint(path)
    missing = {"config", "head", "optimizer", "history", "random"} - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is no checkpoint of train.py (it has no {min(missing)}).")
    return path.parent, checkpoint


def resumed_config(cfg: Config, checkpoint: dict[str, Any], path: Path) -> Config:
    """The configuration of the run in a checkpoint, with what the command line gave on top.

    Raises UserError where the command line would turn it into another run.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    old = Config(**{k: v for k, v in checkpoint["config"].items() if k in known})
    given = {name: getattr(cfg, name) for name in cfg.given}
    changed = [k for k in given if k in FIXED_ON_RESUME and given[k] != getattr(old, k)]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} (it has {getattr(old, k)})" for k in changed)
        raise UserError(f"{path} cannot go on with another {flags}; start a new run for that.")
    return dataclasses.replace(old, **given, given=cfg.given)


def open_lfw(cfg: Config) -> LfwSet | None:
    """The test set for the number after each epoch, or None where it is not prepared."""
    path = Path(cfg.lfw) if cfg.lfw else find_lfw(cfg.data_dir, cfg.train_set)
    if path is None:
        print("LFW is not prepared, so there will be no LFW accuracy after each epoch.")
        return None
    return load_lfw(path, cfg.pairs or Path(cfg.data_dir, "pairs.txt"), cfg.workers)


def open_training_set(cfg: Config, device: torch.device) -> tuple[ImageStore, Split]:
    """The pictures to train on, decoded into their cache, and their split."""
    folder = Path(cfg.train_set or Path(cfg.data_dir, "faces_webface_112x112"))
    if not folder.exists():
        raise UserError(
            f"There is no training set at {folder}; prepare one (python pre_process.py), name one "
            "with --train-set, or try everything on drawn faces (make demo)."
        )
    reader = RecordReader(folder)
    faces = split(
        reader.labels,
        valid_fraction=cfg.valid_fraction,
        max_classes=cfg.max_classes,
        seed=cfg.seed,
    )
    if faces.num_classes < 2:
        raise UserError(f"{folder} has one identity only; a classifier needs two or more.")
    store = ImageStore(
        reader, faces, device, cache=cfg.cache, workers=cfg.workers, progress="decoding"
    )
    for why in list(store.bad.values())[:5]:
        print(f"Left out: {why}")
    if len(store.bad) > 5:
        print(f"Left out: {len(store.bad) - 5} pictures more.")
    if len(store.good(faces.train)) < 2:
        raise UserError(f"{folder} has no pictures left to train on.")
    return store, faces


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would find no compiler for the device."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise UserError("--compile needs a C++ compiler (g++); install one or leave the flag out.")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the triton package; install it or leave the flag out.")


def config_table(cfg: Config) -> str:
    """The configuration as a Markdown table, for TensorBoard."""
    rows = [f"| {name} | {value} |" for name, value in dataclasses.asdict(cfg).items()]
    return "\n".join(["| knob | value |", "|---|---|", *rows])


def stop_on_signals(trainer: Trainer) -> None:
    """Ctrl-C or SIGTERM: finish the step at hand and keep it; a second one stops at once."""

    def handle(number: int, frame: object) -> None:
        if trainer.stop:  # perhaps in the middle of a step, which nothing could go on from
            print("\nStopped at once; last.pt is as the last epoch left it.", file=sys.stderr)
            raise SystemExit(130)
        trainer.stop = True

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


@exit_with_sentence
def main(cfg: Config) -> None:
    """Train one run from its beginning or from where it stopped."""
    keep_freed_memory()
    run_dir, checkpoint = open_run(cfg)
    if checkpoint is not None:
        cfg = resumed_config(cfg, checkpoint, run_dir)
    device = get_device(cfg.device)
    if cfg.compile:
        check_compiler(device)
    seed_everything(cfg.seed)
    torch.backends.cudnn.benchmark = True  # every training step has the same shapes
    store, faces = open_training_set(cfg, device)
    lfw = open_lfw(cfg)
    trainer = Trainer(cfg, store, faces)
    if checkpoint is not None:
        trainer.load(checkpoint, run_dir / "last.pt")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"Run: {run_dir}\n"
        f"Training set: {len(trainer.train_positions):,} images of {faces.num_classes:,} "
        f"identities, {len(trainer.valid_positions):,} held out; cache: {store.cache}\n"
        f"Network: {cfg.network}, {parameters / 1e6:.2f} M parameters, on {device}, "
        f"{'bfloat16' if trainer.amp else 'float32'}; {trainer.steps:,} steps an epoch"
    )
    if trainer.epoch >= cfg.epochs:
        raise UserError(f"{run_dir} has its {trainer.epoch} epochs; give more with --epochs.")
    run_dir.mkdir(parents=True, exist_ok=checkpoint is not None)
    stop_on_signals(trainer)
    # TensorBoard forgets what was logged after the checkpoint; its own step was logged before it.
    with SummaryWriter(run_dir, purge_step=trainer.global_step + 1) as writer:
        if checkpoint is None:
            writer.add_text("config", config_table(cfg))
        try:
            run_epochs(trainer, writer, run_dir, lfw)
        except KeyboardInterrupt:
            trainer.save(run_dir / "last.pt")
            print(
                f"\nStopped at epoch {trainer.epoch + 1}, step {trainer.step}; "
                "go on with: python train.py --resume ",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
    plot_curves(Path(cfg.images_dir), trainer.history, trainer.steps)
    judged_on = "held-out" if len(trainer.valid_positions) else "training"
    print(
        f"Best on the {judged_on} images: epoch {trainer.best['epoch']}, accuracy "
        f"{trainer.best['accuracy']:.2%}. Wrote {run_dir}/best.pt, last.pt and the curves in "
        f"{cfg.images_dir}/. Next: python lfw_eval.py"
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "train"))
