"""A training set of many record files: its images, and their order, worked out on the fly.

No list of all images is ever made, so that 42 million images start as fast as a thousand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_gen import BatchSlices, ImageStore, Split
from distributed.collectives import rank_slice
from distributed.process_group import world_size
from fileio.shards import ShardReader
from utils import UserError, splitmix64

MAX_LANES = 1024  # largest number of places in the data set that a batch is taken from
SHUFFLE_BUFFER = 1 << 16  # images within which all lanes together shuffle


class ShardOrder:
    """Which images an epoch shows, and when.

    The shards are shuffled and laid end to end, without the held-out images (every k-th of a
    shard). This line is cut into equal lanes, whose number divides the batch size. Every batch
    takes the same number of images from each lane, in runs that are shuffled within themselves. A
    lane belongs to one process, so that each process reads its own part of the files; and since the
    lanes do not depend on the number of processes, neither do the batches.

    Example: three shards with 5, 3 and 4 images, no validation, batches of 4. An epoch puts the
    shards in the order 2, 0, 1; on the line they end at 4, 9 and 12. There are 4 lanes of 3 images,
    0-2, 3-5, 6-8 and 9-11, and each batch has one image of each lane. Position 7 of the line is in
    the second shard of this order, image 7 - 4 = 3 of shard 0. With 2 processes the first has the
    lanes 0 and 1 of each batch.
    """

    def __init__(
        self, starts: np.ndarray, batch_size: int, seed: int, valid_every: int = 0
    ) -> None:
        """`starts` (shards + 1,): each shard's first image, then the number of all images.

        `valid_every` 50 holds out every 50th image of a shard, 0 none.
        """
        self.starts, self.seed, self.valid_every = starts, seed, valid_every
        counts = np.diff(starts)
        self.held_out = counts // valid_every if valid_every else np.zeros_like(counts)
        self.counts = counts - self.held_out  # to train on, per shard
        # Eight images per lane, so that not too many files are open at the same time.
        limit = min(max(batch_size // 8, 16), MAX_LANES)
        self.lanes = max(n for n in range(1, limit + 1) if batch_size % n == 0)
        self.lane_images = batch_size // self.lanes  # of one lane in a batch
        self.run_size = max(1, SHUFFLE_BUFFER // self.lanes)
        self._line = functools.lru_cache(2)(self._shuffled_shards)
        self._run = functools.lru_cache(4 * self.lanes)(self._shuffled_run)

    def __len__(self) -> int:
        """Images per epoch."""
        return int(self.counts.sum())

    def validation(self) -> np.ndarray:
        """The held-out images (n,): with valid_every 5, numbers 4, 9, 14 ... of each shard."""
        images = [
            start + (np.arange(held_out) + 1) * self.valid_every - 1
            for start, held_out in zip(self.starts.tolist(), self.held_out.tolist(), strict=False)
        ]
        return np.concatenate([*images, np.zeros(0, np.int64)])

    def training(self) -> np.ndarray:
        """The images to train on (n,), in the order of the files."""
        return np.setdiff1d(np.arange(self.starts[-1]), self.validation(), assume_unique=True)

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the shards, and where on the line each ends."""
        shards = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _lane_bounds(self, lane: int) -> tuple[int, int]:
        """The part of the line that is a lane: begin, end."""
        return lane * len(self) // self.lanes, (lane + 1) * len(self) // self.lanes

    def _shuffled_run(self, epoch: int, lane: int, run: int) -> np.ndarray:
        """The images of one run of a lane, shuffled."""
        begin, end = self._lane_bounds(lane)
        first, last = begin + run * self.run_size, min(begin + (run + 1) * self.run_size, end)
        rng = np.random.default_rng([self.seed, 5, epoch, lane, run])
        line = first + rng.permutation(last - first)  # positions on the line
        shards, ends = self._line(epoch)
        shard = np.searchsorted(ends, line, "right")  # its place in this epoch's order
        image = line - (ends - self.counts[shards])[shard]
        if self.valid_every:
            # Step over the held-out ones: with valid_every 5, the fifth to train on is image 5,
            # since image 4 is held out.
            image += image // (self.valid_every - 1)
        return self.starts[shards[shard]] + image

    def lane(self, epoch: int, number: int, low: int, high: int) -> np.ndarray:
        """Images `low` to `high` - 1 of a lane in their shuffled order; fewer at its end."""
        begin, end = self._lane_bounds(number)
        high = min(high, end - begin)
        pieces = [np.zeros(0, np.int64)]
        for run in range(low // self.run_size, -(-high // self.run_size)):
            images, offset = self._run(epoch, number, run), run * self.run_size
            pieces.append(images[max(low - offset, 0) : high - offset])
        return np.concatenate(pieces)

    def batch(self, epoch: int, step: int, lanes: slice) -> tuple[np.ndarray, np.ndarray]:
        """The images of a step that some of the lanes give, and which are mirrored: (n,) both."""
        low = step * self.lane_images
        numbers = range(lanes.start, lanes.stop)
        pieces = [self.lane(epoch, number, low, low + self.lane_images) for number in numbers]
        images = np.concatenate([*pieces, np.zeros(0, np.int64)])
        return images, mirror_mask(images, self.seed, epoch)


def mirror_mask(images: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Which images an epoch shows mirrored, about half: a hash of their number decides."""
    salt = np.random.default_rng([seed, 6, epoch]).integers(2**64, dtype=np.uint64)
    return splitmix64(images.astype(np.uint64) + salt) & np.uint64(1) == 1


class LazyBatchSlices(Sequence):
    """A process's slice of an epoch's batches, each worked out when it is asked for."""

    def __init__(self, order: ShardOrder, epoch: int, steps: range, lanes: slice, flip: bool):
        self.steps, self.flip = steps, flip
        # Each is asked for twice: when its images are fetched and when they are used.
        self._batch = functools.lru_cache(4)(lambda step: order.batch(epoch, step, lanes))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        positions, mirrored = self._batch(self.steps[index])
        return positions, mirrored if self.flip else None


class _AllIndices:
    """Stands for np.arange(n), the indices of a set that is used entirely; takes no memory."""

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return positions


class ShardStore(ImageStore):
    """Images of many record files; a position is an image's number through all files.

    Nothing is cached, and labels are read with the images.
    """

    can_cache = False

    def __init__(
        self, reader: ShardReader, order: ShardOrder, device: torch.device, workers: int = 0
    ) -> None:
        split = Split(_AllIndices(), np.zeros(0, np.int64), reader.num_classes, order, order)
        super().__init__(reader, split, device, cache="none", workers=workers)
        self.labels = None
        self.order = order
        if world_size() > order.lanes:
            raise UserError(
                f"{world_size()} processes share batches of {order.lanes} lanes; take a "
                "larger --batch-size, best a power of two."
            )

    def labels_of(self, positions: np.ndarray) -> Tensor:
        """The classes (n,) of images (n,), on the device."""
        labels = torch.from_numpy(self.reader.labels_of(positions))
        return labels.to(self.device, non_blocking=True)  # the host does not wait for the step

    def readable(self, positions: Any) -> Any:
        """All positions: corrupt images are left out as they are encountered."""
        return positions

    def in_file_order(self, positions: ShardOrder) -> np.ndarray:
        """The images (n,) of an order, as in the files."""
        return positions.training()

    def record_ids(self, positions: np.ndarray) -> list[int]:
        """Image numbers, counted through all files."""
        return positions.tolist()

    def global_batch(
        self, positions: ShardOrder, batch_size: int, seed: int, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A step's images, those of all processes, and which are mirrored: (batch_size,) both."""
        return self.order.batch(epoch, step, slice(0, self.order.lanes))

    def batch_slices(
        self,
        positions: ShardOrder,
        batch_size: int,
        seed: int,
        epoch: int,
        steps: range,
        flip: bool,
    ) -> BatchSlices:
        """This process's slice of the batches of an epoch's `steps`: those of its lanes."""
        return LazyBatchSlices(self.order, epoch, steps, rank_slice(self.order.lanes), flip)

    def slice_size(self, batch_size: int) -> int:
        """The size of the largest slice of a batch: of 16 lanes on 3 processes, 6 lanes' images."""
        return -(-self.order.lanes // world_size()) * self.order.lane_images

    def sample(self, positions: ShardOrder, count: int, seed: int) -> np.ndarray:
        """The first images of the first epoch, at most `count` and a batch of them."""
        images, _ = self.order.batch(0, 0, slice(0, self.order.lanes))
        return images[:count]

    def fingerprint(self, train: ShardOrder, valid: np.ndarray) -> str:
        """What identifies the images of a run."""
        return f"{self.reader.fingerprint()} every {self.order.valid_every}"
