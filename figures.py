"""The curves of a training run, drawn without a screen."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def plot_curves(folder: Path, history: dict[str, list[tuple[float, ...]]], steps: int) -> None:
    """Draw train_loss.png, train_acc.png, valid_loss.png and valid_acc.png into `folder`.

    `history` is a Trainer's; `steps` is the number of steps in an epoch.
    """
    train = [
        (epoch + step / steps, loss, right) for epoch, step, loss, right, _ in history["train"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, points in (("train", train), ("valid", history["valid"])):
        epochs = [point[0] for point in points]
        for column, short, title in ((1, "loss", "loss"), (2, "acc", "accuracy")):
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            marker = "o" if len(points) < 40 else ""
            axes.plot(epochs, [point[column] for point in points], marker=marker, markersize=3)
            axes.set(xlabel="epoch", ylabel=title, title=f"{name} {title}")
            axes.grid(alpha=0.3)
            figure.savefig(folder / f"{name}_{short}.png", dpi=100)
