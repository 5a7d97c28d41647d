"""What bench.gpu has each process of a group do: three steps on its slice of one batch.

    torchrun --nproc-per-node=2 -m bench.gpu_group LOSSES.json NETWORK IMAGES SAMPLE_RATE

Rank 0 writes the losses to the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import without_tf32
from bench.train import make_batch, make_engine
from distributed.collectives import rank_slice
from distributed.process_group import is_main, local_device, process_group, world_size

LR = 0.01


def group_losses(
    device: torch.device, network: str, images: int, sample_rate: float = 1.0
) -> list[float]:
    """Losses of three float32 steps on this process's slice; batch statistics are of all slices."""
    engine = make_engine(
        network,
        images,
        device,
        compile="off",
        amp=False,
        dropout=0.0,
        sync_bn=world_size() > 1,
        sample_rate=sample_rate,
    )
    engine.train()
    batch, labels = make_batch(images, device)
    rows = rank_slice(images)
    with without_tf32():
        steps = [engine.train_step(batch[rows], labels[rows], LR / 10, i).loss for i in range(3)]
    return [float(loss) for loss in steps]


def main(argv: Sequence[str]) -> None:
    """Join the group, train, write the losses."""
    path, network, images, sample_rate = argv
    with process_group("cuda"):
        losses = group_losses(local_device("cuda"), network, int(images), float(sample_rate))
        if is_main():
            Path(path).write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1:])
