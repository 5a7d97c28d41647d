"""Train a face embedding with ArcFace on a set that pre_process.py (or InsightFace) prepared.

    python train.py                                    # r50 on data/faces_webface_112x112
    python train.py --network mobilefacenet --batch-size 128 --lr 0.025        # on a laptop
    python train.py --resume                           # go on with the newest run
    torchrun --nproc-per-node=4 train.py               # on the four GPUs of a machine
    tensorboard --logdir=runs                          # watch

It prints what it trains on, a progress bar an epoch and then one line an epoch:

    epoch 1/32  loss 18.402  accuracy 12.31 %  valid loss 15.210 ...

and writes runs/<time>-<network>-s<seed>/last.pt (every epoch and every quarter of an hour; the
one before stays as last-1.pt), best.pt (best on the held-out images) and TensorBoard's events, and
at the end the curves images/train_loss.png, train_acc.png, valid_loss.png and valid_acc.png.
Ctrl-C stops after the step at hand and keeps it in last.pt. However a run ended, --resume takes it
to the very weights and numbers that it would have come to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from config import Config, parse_args
from data_gen import steps_per_epoch
from distributed.collectives import any_rank, run_on_all, run_on_main
from distributed.process_group import (
    is_lost_peer,
    is_main,
    local_device,
    process_group,
    rank,
    seed_per_rank,
    world_size,
)
from evaluation.embedders import torch_embedder
from evaluation.evaluate import evaluate_lfw
from evaluation.figures import plot_curves
from evaluation.pair_sets import PairSet, find_pairs, find_set, load_set
from evaluation.tensorboard_log import log_evaluation, log_projector
from fileio.checkpoint_file import load_checkpoint
from fileio.locks import lock_folder
from fileio.safe_files import describe_write_errors
from training import data_checks as checks
from training.dataset import open_training_set
from training.epochs import log_average, save_best_average
from training.event_log import EventLog, NullEventLog, truncate_events
from training.resume import open_checkpoint, resumed_config, run_folder
from training.run import Trainer
from training.sharded_dataset import ShardStore
from training.step_errors import TrainingError, describe_out_of_memory, gpu_memory
from utils import (
    UserError,
    describe_os_error,
    exit_on_user_error,
    is_out_of_memory,
    keep_freed_memory,
    seed_everything,
)

COMPILED_STEPS = 2000  # compiling takes a minute: it pays in runs of that many steps


def run_epochs(trainer: Trainer, writer: EventLog, run_dir: Path, lfw: PairSet | None) -> None:
    """Train, validate, evaluate and save, epoch by epoch, from wherever the trainer stands."""
    embed = torch_embedder(trainer.learner.model, trainer.device, batch=trainer.cfg.eval_batch)
    while trainer.epoch < trainer.cfg.epochs:
        loss, accuracy = trainer.train_one_epoch(writer, run_dir)
        epoch, step = trainer.epoch + 1, trainer.global_step
        line = f"epoch {epoch}/{trainer.cfg.epochs}  loss {loss:.3f}  accuracy {accuracy:.2%}"
        points: dict[str, list[tuple[float, ...]]] = {"valid": [], "lfw": []}
        if len(trainer.valid_positions):
            loss, accuracy = trainer.validate()
            points["valid"] = [(epoch, loss, accuracy)]
            writer.add_scalar("valid/loss", loss, step)
            writer.add_scalar("valid/accuracy", accuracy, step)
            line += f"  valid loss {loss:.3f}  valid accuracy {accuracy:.2%}"
        if lfw is not None:
            result = evaluate_lfw(embed, lfw)
            report = result.metrics
            points["lfw"] = [(epoch, report["accuracy"], report["threshold"])]
            log_evaluation(writer, result, step)
            if epoch == trainer.cfg.epochs:
                log_projector(writer, result, step)
            line += f"  lfw {report['accuracy']:.2%}"
        if trainer.learner.ema is not None:
            line += log_average(trainer, writer, embed, lfw, points)
        print(line, flush=True)
        # Until here it is the epoch's last step to a checkpoint, and all of this is done again.
        with trainer.finishing_epoch(points):
            checks.warn_if_lfw_at_chance(accuracy, [point[1] for point in trainer.history["lfw"]])
            best = trainer.best
            if not best or (accuracy, -loss) > (best["accuracy"], -best["loss"]):
                trainer.best = {"epoch": epoch, "accuracy": accuracy, "loss": loss}
                trainer.save(run_dir / "best.pt")
            if trainer.learner.ema is not None:
                save_best_average(trainer, run_dir / "best_ema.pt")
        trainer.save_last(run_dir, writer)
        if any_rank(trainer.stop)[0]:
            raise KeyboardInterrupt


@contextlib.contextmanager
def saved_at_the_end(trainer: Trainer, writer: EventLog, run_dir: Path) -> Iterator[None]:
    """Whatever ends the run between two steps, last.pt has them; Ctrl-C ends it with a sentence.

    Within a step the state is no step's, and the checkpoint before stays.
    """
    try:
        yield
    except KeyboardInterrupt:
        at = f"epoch {trainer.epoch + 1}, step {trainer.step}"
        if is_main():
            print(f"\nStopped at {at}; go on with: {again(run_dir)}", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if is_lost_peer(error):
            raise UserError(lost_sentence(trainer, run_dir)) from None
        if isinstance(error, TrainingError) or not trainer.whole:
            raise
        if world_size() == 1:  # the others would have to take part
            trainer.save_last(run_dir, writer)
        why = str(error)
        if is_out_of_memory(error):
            evaluating, cfg = trainer.step == trainer.steps, trainer.cfg
            flag, batch = "--batch-size", cfg.batch_size
            if evaluating:
                flag, batch = "--eval-batch", cfg.eval_batch
            memory = gpu_memory(trainer.device)
            why = describe_out_of_memory(error, batch=batch, flag=flag, memory=memory)
            why = f"{'Evaluating' if evaluating else 'Loading a batch'}, {why}."
        elif isinstance(error, OSError):
            why = describe_os_error(error)
        elif not isinstance(error, UserError):
            raise
        kept = "All steps are kept" if world_size() == 1 else "last.pt is as it was written last"
        raise UserError(f"{why} {kept}; go on with: {again(run_dir)}") from None


def again(run_dir: Path) -> str:
    """The command that goes on with a run."""
    start = "python" if world_size() == 1 else f"torchrun --nproc-per-node={world_size()}"
    return f"{start} train.py --resume {run_dir}"


def lost_sentence(trainer: Trainer, run_dir: Path) -> str:
    """What to say where another process of the group has gone."""
    at = f"epoch {trainer.epoch + 1}, step {trainer.step + 1} of {trainer.steps}"
    return (
        f"Another of the {world_size()} processes has ended or cannot be reached, so this one "
        f"(rank {rank()}) ends, too, at {at}; if it was not killed, what it printed says why. "
        f"last.pt is as it was written last; go on, with any number of processes, with: "
        f"{again(run_dir)}"
    )


def open_lfw(cfg: Config) -> PairSet | None:
    """The test set for the number after each epoch, or None where it is not prepared."""
    path = Path(cfg.lfw) if cfg.lfw else find_set("lfw", cfg.data_dir, cfg.train_set)
    if path is None:
        print("LFW is not prepared, so there will be no LFW accuracy after each epoch.")
        return None
    return load_set(path, find_pairs(path, cfg.data_dir, cfg.pairs), cfg.workers)


def choose_compile(cfg: Config, device: torch.device, steps: int) -> str:
    """Whether a run of so many steps is compiled, "on" or "off".

    Raises UserError where it is asked for and there is no compiler.
    """
    missing = ""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        missing = "a C++ compiler (g++)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "the triton package"
    if missing and cfg.compile == "on":
        raise UserError(
            f"--compile on, given now or when the run began, needs {missing}; install it, or start "
            "a run without."
        )
    if cfg.compile == "off" or (cfg.compile == "auto" and steps < COMPILED_STEPS):
        return "off"
    if missing:
        print(f"Training would be faster with {missing}, which torch.compile needs.")
        return "off"
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled here runs as it is
    return "on"


def config_table(cfg: Config) -> str:
    """The configuration as a Markdown table, for TensorBoard."""
    rows = [f"| {name} | {value} |" for name, value in dataclasses.asdict(cfg).items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def stop_on_signals(trainer: Trainer) -> None:
    """Ctrl-C, SIGTERM or a closed terminal: finish the step at hand and keep it.

    A second one stops at once. What nohup or a background job ignores stays ignored.
    """

    def handle(number: int, frame: object) -> None:
        # Perhaps in the middle of a step, which nothing could go on from. torchrun passes on what
        # the terminal may have sent us as well, so in a group a second signal means nothing.
        if trainer.stop and world_size() == 1:
            print("\nStopped at once; last.pt is as it was written last.", file=sys.stderr)
            raise SystemExit(130)
        trainer.stop = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def open_trainer(cfg: Config) -> Trainer:
    """The training set, checked, and a trainer on it that has not trained yet."""
    device = run_on_all(lambda: local_device(cfg.device))
    seed_everything(cfg.seed)
    torch.backends.cudnn.benchmark = True  # every training step has the same shapes
    store, faces = run_on_all(lambda: open_training_set(cfg, device))
    steps = steps_per_epoch(len(store.good(faces.train)), cfg.batch_size) * cfg.epochs
    cfg = dataclasses.replace(cfg, compile=choose_compile(cfg, device, steps))
    trainer = Trainer(cfg, store, faces)
    seed_per_rank(cfg.seed, 0)
    positions, classes = trainer.train_positions, faces.num_classes
    if isinstance(store, ShardStore):
        some, _ = store.whole_batch(positions, cfg.batch_size, cfg.seed, 0, 0)
        run_on_all(lambda: checks.check_images(store, some[: checks.SAMPLE_SIZE]))
    else:
        run_on_all(lambda: checks.check_training_set(store, positions, classes, cfg.seed))
    return trainer


def train(trainer: Trainer, run_dir: Path, resumed: bool) -> None:
    """Train to the end in a run folder that is this process's own."""
    cfg = trainer.cfg
    lfw = run_on_main(lambda: open_lfw(cfg), broadcast=False)  # rank 0 evaluates for all
    parameters = sum(p.numel() for p in trainer.learner.model.parameters())
    print(
        f"Run: {run_dir}\n"
        f"Training set: {len(trainer.train_positions):,} images of "
        f"{trainer.learner.num_classes:,} identities, {len(trainer.valid_positions):,} held out; "
        f"cache: {trainer.store.cache}\n"
        f"Network: {cfg.network}, {parameters / 1e6:.2f} M parameters, on {trainer.device}, "
        f"{'bfloat16' if trainer.learner.amp else 'float32'}; {trainer.steps:,} steps an epoch"
        + (f"; {world_size()} processes" if world_size() > 1 else "")
        + f"\nRecipe: {cfg.recipe}; {cfg.margin}, s {cfg.margin_s:g}, m {cfg.margin_m:g}; "
        f"learning rate {cfg.lr:g}, {cfg.schedule} schedule, {cfg.epochs} epochs"
    )
    stop_on_signals(trainer)
    if resumed and is_main():
        truncate_events(run_dir, trainer.global_step, epoch_is_open=trainer.step > 0)
    with events_of(run_dir, trainer) as writer:
        if not resumed:
            writer.add_text("config", config_table(cfg))
            trainer.save_last(run_dir, writer)  # from here on, the run can be gone on with
        with saved_at_the_end(trainer, writer, run_dir):
            run_epochs(trainer, writer, run_dir, lfw)


def events_of(run_dir: Path, trainer: Trainer) -> contextlib.AbstractContextManager:
    """TensorBoard's writer for a run, in rank 0."""
    if not is_main():
        return contextlib.nullcontext(NullEventLog())
    # A TensorBoard that is looking on forgets, too, what was logged after the checkpoint.
    return EventLog(run_dir, trainer.global_step + 1)


@exit_on_user_error
def main(cfg: Config) -> None:
    """Train one run from its beginning or from where it stopped."""
    keep_freed_memory()
    with process_group(cfg.device):
        run(cfg)


def open_for_all(cfg: Config, run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from and its path: rank 0 chooses, every process reads it."""
    opened = run_on_main(lambda: open_checkpoint(cfg, run_dir), broadcast=False)
    path = run_on_main(lambda: opened[1])
    return opened[0] if is_main() else load_checkpoint(path), path


def begin_run(run_dir: Path, own: Callable[[Path], None]) -> None:
    """Make the folder of a new run this process's own."""
    with describe_write_errors(run_dir):
        run_dir.mkdir(parents=True)
    own(run_dir)


def run(cfg: Config) -> None:
    """Open or make the run, train it to its end and draw its curves, as one of the processes."""
    with contextlib.ExitStack() as stack:

        def own(run_dir: Path) -> None:
            stack.enter_context(lock_folder(run_dir, "train.py"))

        run_dir = run_on_main(lambda: run_folder(cfg))
        if cfg.resume:
            run_on_main(lambda: own(run_dir))
            checkpoint, path = open_for_all(cfg, run_dir)
            cfg = resumed_config(cfg, checkpoint, run_dir)
            history, best, steps = (checkpoint[name] for name in ("history", "best", "steps"))
        if not cfg.resume or checkpoint["epoch"] < cfg.epochs:
            trainer = open_trainer(cfg)
            if cfg.resume:
                run_on_all(lambda: trainer.load(checkpoint, path))
                del checkpoint
            else:
                run_on_main(lambda: begin_run(run_dir, own))
            train(trainer, run_dir, resumed=bool(cfg.resume))
            history, best, steps = trainer.history, trainer.best, trainer.steps
        else:
            print(
                f"{run_dir} has its {checkpoint['epoch']} epochs; for more of them give --epochs."
            )
    if not is_main():
        return
    plot_curves(Path(cfg.images_dir), history, steps)
    judged_on = "held-out" if history["valid"] else "training"
    print(
        f"Best on the {judged_on} images: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}. "
        f"Wrote {run_dir}/best.pt, last.pt and the curves in {cfg.images_dir}/. "
        "Next: python lfw_eval.py"
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "train", doc=__doc__))
