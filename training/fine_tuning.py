"""A run that begins with the backbone of another checkpoint, and class centres that fit it.

    base = open_base("runs/<run>/best.pt", {"network": "r50", "use_se": False, "emb_size": 512})
    initialise(run, base.weights)

The head is new, for the classes of the new training set. A centre begins as the mean L2-normalised
embedding of its class, where a random one would first pull the backbone away from what it knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_gen import valid_batches
from distributed.collectives import all_reduce_sum
from distributed.process_group import is_main, world_size
from evaluation.embedders import in_batches_that_fit, load_network
from evaluation.embedding_cache import file_checksum
from training.run import Run
from utils import UserError

CLASSES_AT_A_TIME = 1 << 16  # whose sums are added up over the processes: 134 MB of 512 numbers


class Base(NamedTuple):
    """A checkpoint to begin with."""

    settings: dict[str, Any]  # those of Config that follow from the file
    weights: dict[str, Tensor]


def open_base(init: str, asked: Mapping[str, Any], given: Collection[str] = ()) -> Base:
    """The backbone of --init: a checkpoint of train.py, or third-party weights (no ONNX model).

    `asked` are --network, --use-se and --emb-size, which a checkpoint of ours says itself; `given`
    are the names of the flags that were given, and have to agree. Raises UserError if the file
    cannot be read or holds another network. Without a file, both parts are empty.
    """
    if not init:
        if "freeze_epochs" in given:
            raise UserError("--freeze-epochs is for the backbone that --init names; name one.")
        return Base({}, {})
    path = Path(init)
    if path.suffix.lower() == ".onnx":
        raise UserError(
            f"{path} is an ONNX model, which cannot be trained; give --init a checkpoint of "
            "train.py or a state dict."
        )
    loaded = load_network(path, network=asked["network"], use_se=asked["use_se"])
    model, info = loaded.model, loaded.info
    use_se = any(".se." in name for name in model.state_dict())
    found = {"network": info["network"], "use_se": use_se, "emb_size": len(model.fc.weight)}
    for name, value in found.items():
        if name in given and asked[name] != value:
            flag = name.replace("_", "-")
            raise UserError(
                f"{path} has {flag.replace('-', ' ')} {value}, not {asked[name]}; leave --{flag} "
                "out, or give another --init."
            )
    for note in info.get("notes", []):
        print(f"{path}: {note}")
    checksum = {"init": init, "init_sha256": file_checksum(path)}
    return Base(found | checksum, model.state_dict())


def initialise(run: Run, weights: Mapping[str, Tensor]) -> None:
    """Give a new run these weights, if any, and centres that fit; every process must call it."""
    if not weights:
        return
    engine = run.engine
    engine.model.load_state_dict(weights, strict=True)
    if engine.ema is not None:
        engine.ema.load_state_dict(engine.ema.live)

    def sums(size: int) -> Tensor:
        return class_sums(run, size)

    # A batch that is too large for one process would have to be made smaller for all.
    total = sums(run.eval_batch) if world_size() > 1 else in_batches_that_fit(sums, run.eval_batch)
    engine.head.set_centres(total)


@torch.inference_mode()
def class_sums(run: Run, batch_size: int) -> Tensor:
    """The sums of the L2-normalised embeddings of each class's training images, (classes, d).

    In float32 on the CPU, over the images of all processes, in evaluation mode and without mirror
    images. The network computes in the run's number format, for which the sum of many is exact
    enough: in float32 it would take as long as an epoch on a GPU.
    """
    engine = run.engine
    engine.train(False)
    width = engine.head.weight.shape[1]
    total = torch.zeros(run.split.num_classes, width)
    positions = run.store.in_file_order(run.train_positions)
    steps = -(-len(positions) // batch_size)
    batches = valid_batches(run.store, positions, batch_size=batch_size)
    for batch in tqdm(batches, "class centres", steps, leave=False, disable=not is_main()):
        embedding = F.normalize(engine.embed(batch.images, engine.model).float())
        total.index_add_(0, batch.labels.cpu(), embedding.cpu())
    if world_size() > 1:
        for rows in total.split(CLASSES_AT_A_TIME):
            rows.copy_(all_reduce_sum(rows.to(run.device)))
    return total
