"""The end of an epoch: evaluation of the raw and of the EMA weights, logging, best.pt, last.pt.

    lfw = open_lfw("", "data", batch=256, device=device)
    finish_epoch(run, log, lfw, train_loss, train_accuracy)

TensorBoard's tags begin with "valid/" and "lfw/", by which event_log.truncate_events knows them.
"""

from __future__ import annotations

from typing import NamedTuple

from distributed.collectives import run_on_main
from distributed.data_parallel import broadcast_buffers
from evaluation.embedders import torch_embedder
from evaluation.shared_set import SharedSet, evaluate_shared
from evaluation.tensorboard_log import log_evaluation, log_projector
from fileio.checkpoint_file import save_checkpoint
from training.data_checks import warn_if_lfw_at_chance
from training.event_log import EventLog
from training.run import Run
from training.run_state import Points

# What resuming needs and evaluation does not; beside EMA weights it would be wrong.
NOT_IN_BEST_EMA = {"head", "optimizer", "ema", "scaler", "random", "random_of_others", "window"}


class EpochResult(NamedTuple):
    """What one set of weights, raw or EMA, achieves at the end of an epoch."""

    text: str  # for the line that is printed
    points: dict[str, Points]  # for the history
    valid: tuple[float, float] | None  # loss and accuracy on the held-out images


def finish_epoch(
    run: Run, log: EventLog, lfw: SharedSet | None, train_loss: float, train_accuracy: float
) -> None:
    """Evaluate, log, print and save an epoch whose steps are done; every process must call it."""
    epoch, ema = run.epoch + 1, run.engine.ema
    text = f"epoch {epoch}/{run.epochs}  loss {train_loss:.3f}  accuracy {train_accuracy:.2%}"
    if skipped := run.engine.scaler.skipped_steps:
        text += f"  skipped steps {skipped}"
    result = evaluate_weights(run, log, lfw)
    text, points = text + result.text, result.points
    if ema is not None:
        with ema.applied():
            ema_result = evaluate_weights(run, log, lfw, ema=True)
        text, points = text + ema_result.text, points | ema_result.points
    print(text, flush=True)
    loss, accuracy = result.valid or (train_loss, train_accuracy)
    # Up to here a checkpoint has the epoch's last step: a resumed run evaluates it again.
    with run.finishing_epoch(points):
        warn_if_lfw_at_chance(accuracy, [point[1] for point in run.history["lfw"]])
        if run.update_best(loss, accuracy):
            run.save("best.pt")
        if ema is not None:
            save_best_ema(run)
    run.save_last(log)


def evaluate_weights(
    run: Run, log: EventLog, lfw: SharedSet | None, ema: bool = False
) -> EpochResult:
    """Evaluate the weights that the network has now, and log the result.

    `ema` says that they are the EMA weights, for the names of what is logged.
    """
    epoch, step = run.epoch + 1, run.global_step
    name, tag = ("ema ", "ema_") if ema else ("", "")
    text, valid, points, result = "", None, {}, None
    if len(run.valid_positions):
        loss, accuracy = valid = run.validate()
        points["ema" if ema else "valid"] = [(epoch, loss, accuracy)]
        log.add_scalar(f"valid/{tag}loss", loss, step)
        log.add_scalar(f"valid/{tag}accuracy", accuracy, step)
        text += f"  {name}valid loss {loss:.3f}  {name}valid accuracy {accuracy:.2%}"
    if lfw is not None:
        broadcast_buffers(run.engine.model)  # all embed with rank 0's running statistics
        embed = torch_embedder(run.engine.model, run.device, batch=run.eval_batch)
        result = evaluate_shared(embed, lfw)
    if result is not None:  # in rank 0
        accuracy, threshold = result.metrics["accuracy"], result.metrics["threshold"]
        points["ema_lfw" if ema else "lfw"] = [(epoch, accuracy, threshold)]
        if ema:
            log.add_scalar("lfw/ema_accuracy", accuracy, step)
            log.add_scalar("lfw/ema_threshold", threshold, step)
        else:
            log_evaluation(log, result, step)
            if epoch == run.epochs:
                log_projector(log, result, step)
        text += f"  {name}lfw {accuracy:.2%}"
    return EpochResult(text, points, valid)


def save_best_ema(run: Run) -> None:
    """Write best_ema.pt if the EMA weights are the best so far on the held-out images.

    Without such images they are the newest. Every process must call it.
    """
    ranking = [(accuracy, -loss) for _, loss, accuracy in run.history.get("ema", [])]
    if ranking and any(earlier >= ranking[-1] for earlier in ranking[:-1]):
        return
    with run.engine.ema.applied():
        state = {k: v for k, v in run.state_dict().items() if k not in NOT_IN_BEST_EMA}
        run_on_main(lambda: save_checkpoint(run.folder / "best_ema.pt", state))
