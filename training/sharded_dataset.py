"""The order in which an epoch shows a data set of many files, and its images: no lists."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_gen import ImageStore, Parts, Split
from distributed.collectives import rank_slice
from distributed.process_group import world_size
from fileio.shards import ShardReader
from utils import UserError, splitmix64

LANES = 1024  # most places of the data set that a batch is taken from
BUFFER = 1 << 16  # images within which all lanes together shuffle


class ShardOrder:
    """Which images an epoch shows and when, worked out as it goes.

    The shards are shuffled and laid end to end, without the held-out images (every k-th of a
    shard). That line is cut into lanes, as many as divide the batch size; every batch takes as
    many images from each, from runs that are shuffled within themselves. A lane is one
    process's, so that each reads its own part; and since lanes do not depend on how many processes
    there are, neither do the batches.
    """

    def __init__(self, starts: np.ndarray, batch_size: int, seed: int, every: int = 0) -> None:
        """`starts` (shards + 1,): each shard's first image; `every`: 0, none is held out."""
        self.starts, self.seed, self.every = starts, seed, every
        counts = np.diff(starts)
        self.held_out = counts // every if every else np.zeros_like(counts)
        self.counts = counts - self.held_out
        # Eight images a lane keep the files few that are open at a time.
        most = min(max(batch_size // 8, 16), LANES)
        self.lanes = max(n for n in range(1, most + 1) if batch_size % n == 0)
        self.each = batch_size // self.lanes
        self._line = functools.lru_cache(2)(self._shuffled_shards)
        self._run = functools.lru_cache(4 * self.lanes)(self._shuffled_run)

    def __len__(self) -> int:
        """Images an epoch."""
        return int(self.counts.sum())

    def validation(self) -> np.ndarray:
        """The held-out images (n,)."""
        places = [
            start + (np.arange(held) + 1) * self.every - 1
            for start, held in zip(self.starts.tolist(), self.held_out.tolist(), strict=False)
        ]
        return np.concatenate([*places, np.zeros(0, np.int64)])

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the shards, and where on the line each ends."""
        shards = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _shuffled_run(self, epoch: int, lane: int, run: int) -> np.ndarray:
        """The images of one run of a lane."""
        begin, end = (k * len(self) // self.lanes for k in (lane, lane + 1))
        size = max(1, BUFFER // self.lanes)
        first, last = begin + run * size, min(begin + (run + 1) * size, end)
        shuffle = np.random.default_rng([self.seed, 5, epoch, lane, run])
        line = first + shuffle.permutation(last - first)
        shards, ends = self._line(epoch)
        at = np.searchsorted(ends, line, "right")
        place = line - (ends - self.counts[shards])[at]
        if self.every:
            place += place // (self.every - 1)  # step over the held-out ones
        return self.starts[shards[at]] + place

    def lane(self, epoch: int, number: int, low: int, high: int) -> np.ndarray:
        """Images `low` to `high` - 1 of a lane, in order of their coming; fewer at its end."""
        size = max(1, BUFFER // self.lanes)
        begin, end = (k * len(self) // self.lanes for k in (number, number + 1))
        high = min(high, end - begin)
        found = [np.zeros(0, np.int64)]
        for run in range(low // size, -(-high // size)):
            images = self._run(epoch, number, run)
            found.append(images[max(low - run * size, 0) : high - run * size])
        return np.concatenate(found)

    def batch(self, epoch: int, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """The images of a step that the lanes `part` bring, and which are mirrored: (n,) both."""
        low = step * self.each
        lanes = range(part.start, part.stop)
        found = [self.lane(epoch, number, low, low + self.each) for number in lanes]
        positions = np.concatenate([*found, np.zeros(0, np.int64)])
        return positions, mirrored(positions, self.seed, epoch)


def mirrored(numbers: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Which images an epoch shows mirrored, about half: a hash of their number."""
    salt = np.random.default_rng([seed, 6, epoch]).integers(2**64, dtype=np.uint64)
    return splitmix64(numbers.astype(np.uint64) + salt) & np.uint64(1) == 1


class LazyParts(Sequence):
    """A process's part of an epoch's batches, each worked out when it is asked for."""

    def __init__(self, order: ShardOrder, epoch: int, steps: range, part: slice, flip: bool):
        self.steps, self.flip = steps, flip
        # It is asked for when it is fetched and when it is used.
        self.batch = functools.lru_cache(4)(lambda step: order.batch(epoch, step, part))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        positions, turned = self.batch(self.steps[index])
        return positions, turned if self.flip else None


class _Same:
    """Stands for a list of the numbers 0, 1, 2 ...; takes no memory."""

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return numbers


class ShardStore(ImageStore):
    """Images of many record files; a position is an image's number, and nothing is cached."""

    def __init__(
        self, reader: ShardReader, order: ShardOrder, device: torch.device, workers: int = 0
    ) -> None:
        everything = Split(_Same(), np.zeros(0, np.int64), reader.num_classes, order, order)
        super().__init__(reader, everything, device, cache="none", workers=workers)
        self.order = order
        if world_size() > order.lanes:
            raise UserError(
                f"{world_size()} processes share batches of {order.lanes} lanes; take a "
                "larger --batch-size, best a power of two."
            )

    def labels_of(self, positions: np.ndarray) -> Tensor:
        """The classes (n,) of images (n,), on the device."""
        return torch.from_numpy(self.reader.labels_of(positions)).to(self.device)

    def good(self, positions: Any) -> Any:
        """The same: damaged images are met as they come."""
        return positions

    def names(self, positions: np.ndarray) -> list[int]:
        """Image numbers, counted through all files."""
        return positions.tolist()

    def whole_batch(
        self, positions: ShardOrder, batch_size: int, seed: int, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """All processes' part of a batch."""
        return self.order.batch(epoch, step, slice(0, self.order.lanes))

    def parts(
        self,
        positions: ShardOrder,
        batch_size: int,
        seed: int,
        epoch: int,
        steps: range,
        flip: bool,
    ) -> Parts:
        """This process's part of each batch."""
        lanes = rank_slice(self.order.lanes)
        return LazyParts(self.order, epoch, steps, lanes, flip)

    def width(self, batch_size: int) -> int:
        """The most images of a batch that a process computes."""
        return -(-self.order.lanes // world_size()) * self.order.each

    def fingerprint(self) -> str:
        """What identifies the images of a run."""
        return f"{self.reader.fingerprint()} every {self.order.every}"
