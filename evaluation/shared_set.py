"""A test set whose faces are embedded by all processes of a group, each its part of them.

    lfw = open_lfw("", "data", batch=256, device=device)   # None in all if there is none
    result = evaluate_shared(embed, lfw)                   # None but in rank 0

Each function must be called by every process. A single process has all faces.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.collectives import gather_to_main, run_on_all, run_on_main, scatter_from_main
from distributed.process_group import world_size
from evaluation.embedders import Embed, embedding_batch
from evaluation.evaluate import verify_embeddings
from evaluation.pair_sets import PairSet, SetResult, find_pairs, find_set, load_set
from utils import FACE_SIZE


class SharedSet(NamedTuple):
    """A test set and this process's part of its faces."""

    test_set: PairSet | None  # None but in rank 0, which measures
    faces: Tensor  # (m, 112, 112, 3) uint8 RGB
    slices: list[slice]  # of all faces, by rank


def open_lfw(
    lfw: str,
    data_dir: str,
    train_set: str = "",
    workers: int = 0,
    *,
    batch: int,
    device: torch.device,
) -> SharedSet | None:
    """The test set that train.py evaluates after each epoch, None if it is not prepared.

    `lfw` is --lfw, a folder or a .bin set; empty: LFW in data_dir or beside the training set.
    """

    def load() -> PairSet | None:
        path = Path(lfw) if lfw else find_set("lfw", data_dir, train_set)
        return load_set(path, find_pairs(path, data_dir), workers) if path else None

    shared = share_set(run_on_main(load, broadcast=False), batch, device)
    if shared is None:
        print("LFW is not prepared, so there will be no LFW accuracy after each epoch.")
    return shared


def share_set(test_set: PairSet | None, batch: int, device: torch.device) -> SharedSet | None:
    """Give each process its part of rank 0's faces; None in all processes if rank 0 has no set.

    Only rank 0 reads files, so the other machines of a group need none. `batch` is how many faces
    are to be embedded at a time on `device`.
    """
    count = run_on_main(lambda: None if test_set is None else len(test_set.images))
    if count is None:
        return None
    slices = batch_slices(count, embedding_batch(device, batch), world_size())
    nothing = torch.empty(0, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
    faces = scatter_from_main(nothing if test_set is None else test_set.images, slices)
    return SharedSet(test_set, faces, slices)


def batch_slices(count: int, batch: int, parts: int) -> list[slice]:
    """`count` faces in `parts` slices of whole batches; the first has at least one batch.

    Each batch is then one that a single process computes too, so that embeddings are the same to
    the last bit. 1,000 faces in batches of 256 on 3 processes: 0 to 512, 512 to 768, 768 to 1000.
    """
    batches = -(-count // batch)
    ends = [min(-(-batches * part // parts) * batch, count) for part in range(parts + 1)]
    return [slice(*bounds) for bounds in itertools.pairwise(ends)]


def evaluate_shared(embed: Embed, shared: SharedSet) -> SetResult | None:
    """evaluate_lfw by all processes: the result in rank 0, None in the others.

    If embedding fails in one of them, all end.
    """
    faces = shared.faces
    # Of fewer batches than processes, some get none.
    part = run_on_all(lambda: embed(faces).float().cpu() if len(faces) else torch.empty(0))
    embeddings = gather_to_main(part, shared.slices[-1].stop, shared.slices)
    return run_on_main(lambda: verify_embeddings(embeddings, shared.test_set), broadcast=False)
