"""What train.py prints before and after training, and draws at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed.process_group import is_main, world_size
from evaluation.figures import plot_curves
from training.run import Run
from training.run_state import Points


def print_header(run: Run) -> None:
    """What is trained, on what, and how."""
    settings, engine = run.settings, run.engine
    parameters = sum(p.numel() for p in engine.model.parameters())
    processes = f"; {world_size()} processes" if world_size() > 1 else ""
    base = ""
    if settings["init"]:
        base = f"Base: {settings['init']}, SHA-256 {settings['init_sha256']}; backbone's learning "
        base += f"rate x {settings['backbone_lr_factor']:g}"
        if run.frozen_epochs:
            base += f"; the head alone: {min(run.frozen_epochs, run.epochs)} of {run.epochs} epochs"
        base += "\n"
    print(
        f"Run: {run.folder}\n{base}"
        f"Training set: {len(run.train_positions):,} images of {run.split.num_classes:,} "
        f"identities, {len(run.valid_positions):,} held out; cache: {run.store.cache}\n"
        f"Network: {settings['network']}, {parameters / 1e6:.2f} M parameters, on {run.device}, "
        f"{engine.number_format}; {run.steps:,} steps per epoch{processes}\n"
        f"Recipe: {settings['recipe']}; {settings['margin']}, s {settings['margin_s']:g}, "
        f"m {settings['margin_m']:g}; learning rate {settings['lr']:g}, {settings['schedule']} "
        f"schedule, {run.epochs} epochs"
    )


def settings_table(settings: dict[str, Any]) -> str:
    """The settings as a Markdown table, for TensorBoard."""
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def report_result(
    folder: Path, images_dir: Path, history: dict[str, Points], best: dict[str, float], steps: int
) -> None:
    """Draw the curves of a run that is done, `steps` per epoch, and print its best epoch.

    Every process may call it; rank 0 alone does something.
    """
    if not is_main():
        return
    plot_curves(images_dir, history, steps)
    judged_on = "held-out" if history["valid"] else "training"
    print(
        f"Best on the {judged_on} images: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}. "
        f"Wrote {folder}/best.pt, last.pt and the curves in {images_dir}/. "
        "Next: python lfw_eval.py"
    )
