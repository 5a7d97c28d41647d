"""What a run says of its averaged weights after an epoch, and best_ema.pt.

TensorBoard's tags begin with "valid/" and "lfw/" like those of the raw weights, by which
event_log.truncate_events knows them.
"""

from __future__ import annotations

from pathlib import Path

from distributed.collectives import run_on_main
from evaluation.embedders import Embed
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_sets import PairSet
from fileio.checkpoint_file import save_checkpoint
from training.event_log import EventLog
from training.run import Trainer

# What going on with a run needs and evaluation does not; with averaged weights it would be wrong.
NOT_KEPT = {"head", "optimizer", "ema", "random", "random_of_others", "window"}


def log_average(
    trainer: Trainer,
    writer: EventLog,
    embed: Embed,
    lfw: PairSet | None,
    points: dict[str, list[tuple[float, ...]]],
) -> str:
    """Evaluate the averaged weights at an epoch's end; what the epoch's line says of them.

    `embed` must use the trainer's network. `points`, which go into the history, get "ema" (epoch,
    loss, accuracy) on the held-out images and "ema_lfw" (epoch, accuracy, threshold).
    """
    epoch, step, line = trainer.epoch + 1, trainer.global_step, ""
    with trainer.learner.ema.applied():
        if len(trainer.valid_positions):
            loss, accuracy = trainer.validate()
            points["ema"] = [(epoch, loss, accuracy)]
            writer.add_scalar("valid/ema_loss", loss, step)
            writer.add_scalar("valid/ema_accuracy", accuracy, step)
            line += f"  ema valid loss {loss:.3f}  ema valid accuracy {accuracy:.2%}"
        if lfw is not None:
            report = evaluate_lfw(embed, lfw).metrics
            points["ema_lfw"] = [(epoch, report["accuracy"], report["threshold"])]
            writer.add_scalar("lfw/ema_accuracy", report["accuracy"], step)
            writer.add_scalar("lfw/ema_threshold", report["threshold"], step)
            line += f"  ema lfw {report['accuracy']:.2%}"
    return line


def save_best_average(trainer: Trainer, path: Path) -> None:
    """Write the averaged weights, to be evaluated, if they are the best on the held-out images.

    Without such images they are the newest. Every process must call it.
    """
    ranks = [(accuracy, -loss) for _, loss, accuracy in trainer.history.get("ema", [])]
    if ranks and any(earlier >= ranks[-1] for earlier in ranks[:-1]):
        return
    with trainer.learner.ema.applied():
        state = {k: v for k, v in trainer.state().items() if k not in NOT_KEPT}
        run_on_main(lambda: save_checkpoint(path, state))
