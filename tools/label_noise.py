"""Find wrong labels with a trained model, by each image's angle to its own and other classes.

    python -m tools.label_noise             # the newest run's last.pt and its training set
    python -m tools.label_noise --checkpoint runs/<run>/best.pt --train-set data/faces_other_112x112
    python -m tools.label_noise --checkpoint model.onnx --input-mean 0.485 0.456 0.406 \\
        --input-std 0.229 0.224 0.225           # any model of 112x112 faces; the better, the better
    python train.py --keep data/keep.tsv        # without the images that were dropped

It writes a line per image: record id, label (both as in train.rec), angle in degrees to the centre
of its class, the nearest other class, the angle to that, and kept, 0 or 1. An image is dropped if
it is --nearer-by degrees nearer to another class than to its own, or further from its own than
--max-angle. For another rule, edit the last column.

The centre of a class is the mean direction of its kept images without the image that is compared:
no image votes for itself, and wrong labels that the head has memorised have no influence. The image
of a class of one is kept, since there is nothing to compare it with. Of a class of two, whose
images are equally far from each other, the one that resembles another class is dropped, if any; the
other is then alone.

A run of --margin subcenter is judged as in its paper (Deng et al., ECCV 2020): the centre is the
sub-center to which most images of the class are nearest, and --max-angle is 75 degrees.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from config import Config, parse_args, setting
from utils import UserError, exit_on_user_error, get_device, keep_freed_memory, newest_run

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data_gen import ImageStore, Split
    from evaluation.class_centres import CentreAngles
    from evaluation.evaluated_model import EvaluatedModel


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Label noise"""

    SHARED: ClassVar[str] = (
        "data_dir runs_dir train_set device network use_se eval_batch checkpoint input_mean "
        "input_std bgr"
    )
    output: str = setting("", "list to write; default: data_dir/keep.tsv")
    nearer_by: float = setting(
        12.0,
        "drop images nearer to another class than to their own by this, degrees",
        low=0,
        high=180,
    )
    max_angle: float = setting(
        90.0, "and those further from their class centre, degrees; subcenter: 75", low=0, high=180
    )


DOMINANT_ANGLE = 75.0  # degrees, sub-center ArcFace's


def open_run(cfg: Settings, model: EvaluatedModel) -> tuple[dict[str, Any], Config]:
    """The checkpoint of a model of ours (else empty), and the settings of the training set.

    That is the run's training set as the run used it, or all of the one that --train-set names.
    """
    from fileio.checkpoint_file import load_checkpoint
    from training.resume import check_run, resumed_config

    if not model.is_ours:
        return {}, cfg
    path = model.checkpoint
    checkpoint = load_checkpoint(path)
    check_run(checkpoint, path)
    for name in ("network", "use_se"):
        own = checkpoint["config"][name]
        if name in cfg.given and getattr(cfg, name) != own:
            raise UserError(
                f"{path} was written by train.py and has its own --{name.replace('_', '-')} "
                f"({own}); leave the flag out, it is for third-party state dicts."
            )
    run = resumed_config(cfg, checkpoint["config"], path)
    if "train_set" in cfg.given and run.margin != "subcenter":
        run = dataclasses.replace(run, keep="", hold_out="", max_classes=0)
    return checkpoint, run


def head_rows(
    checkpoint: dict[str, Any], path: Path, store: ImageStore, faces: Split, subcenters: int
) -> Tensor:
    """The centres of a checkpoint's head, (classes·subcenters, d).

    UserError unless they are those of these images' classes.
    """
    images = store.fingerprint(store.readable(faces.train), store.readable(faces.valid))
    if checkpoint["pictures"] != images:
        raise UserError(
            f"{path} was trained on other images than {store.reader.path} gives it now, and its "
            "centres are theirs; give the set it was trained on (--train-set), its --keep and "
            "--hold-out lists as they were."
        )
    weight = checkpoint["head"]["weight"].cpu()
    if len(weight) != faces.num_classes * subcenters:
        raise UserError(
            f"{path} is corrupt: it has {len(weight):,} centres for {faces.num_classes:,} classes "
            f"of {subcenters} each; train again, or give another --checkpoint."
        )
    return weight


def judge(
    cfg: Settings, embeddings: Tensor, labels: Tensor, classes: int, head: Tensor | None
) -> tuple[CentreAngles, np.ndarray]:
    """Angles of n images and which to keep, (n,) bool; head: the sub-centers, if there are any."""
    from evaluation.class_centres import angles_to_centres, dominant_centres, leave_one_out

    device = get_device(cfg.device)
    if head is None:
        return leave_one_out(
            embeddings,
            labels,
            classes,
            nearer_by=cfg.nearer_by,
            max_angle=cfg.max_angle,
            device=device,
        )
    centres = dominant_centres(embeddings, labels, head, classes)
    angles = angles_to_centres(embeddings, labels, centres.to(device))
    return angles, angles.keep_mask(cfg.nearer_by, cfg.max_angle)


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Score a training set by a model's embeddings of it, and write the list."""
    import numpy as np
    import torch

    from evaluation.embed_records import embed_store
    from evaluation.embedders import InputSpec
    from evaluation.evaluated_model import open_model
    from training.dataset import DEFAULT_SET, open_training_set
    from training.sample_lists import KeepList, write_keep_list

    keep_freed_memory()
    path = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "last.pt"))
    model = open_model(
        path,
        runs_dir=cfg.runs_dir,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        batch=cfg.eval_batch,
    )
    print(f"Model: {model}")
    checkpoint, run = open_run(cfg, model)
    store, faces = open_training_set(
        Path(run.train_set or Path(run.data_dir, DEFAULT_SET)),
        get_device(cfg.device),
        batch_size=run.batch_size,
        seed=run.seed,
        valid_fraction=run.valid_fraction,
        max_classes=run.max_classes,
        keep=run.keep,
        hold_out=run.hold_out,
        workers=run.workers,
    )
    if store.labels is None:
        raise UserError("tools.label_noise needs a training set in one train.rec, not shards.")
    head = None
    if checkpoint and run.margin == "subcenter":
        head = head_rows(checkpoint, path, store, faces, int(run.margin_options["subcenters"]))
        if "max_angle" not in cfg.given:
            cfg = dataclasses.replace(cfg, max_angle=DOMINANT_ANGLE)
    positions = store.readable(np.arange(len(faces.indices)))
    embeddings = embed_store(store, positions, model.embed)
    # Without a cache, images that cannot be decoded are found only while they are embedded.
    decoded = np.isin(positions, store.readable(positions))
    positions, embeddings = positions[decoded], embeddings[torch.from_numpy(decoded)]
    labels = torch.from_numpy(faces.labels[positions])
    angles, keep = judge(cfg, embeddings, labels, faces.num_classes, head)
    output = Path(cfg.output or Path(cfg.data_dir, "keep.tsv"))
    # Training renumbers the classes that it uses; the list has the labels of train.rec.
    original = np.zeros(faces.num_classes, np.int64)
    original[faces.labels] = store.reader.labels[faces.indices]
    rows = KeepList(
        store.reader.keys[faces.indices[positions]],
        original[faces.labels[positions]],
        angles.angle,
        original[angles.other],
        angles.other_angle,
        keep,
    )
    write_keep_list(output, rows)
    nearer, far = angles.nearer_to_other() > cfg.nearer_by, angles.angle > cfg.max_angle
    print(
        f"{len(keep):,} images, {np.median(angles.angle):.1f} degrees from their class in the "
        f"median; {nearer.sum():,} are {cfg.nearer_by:g} degrees nearer to another class, "
        f"{far.sum():,} further than {cfg.max_angle:g} degrees from their own\n"
        f"Wrote {output}: {int(keep.sum()):,} kept, {int((~keep).sum()):,} dropped. "
        f"Next: python train.py --keep {output}"
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "label_noise", Settings, __doc__))
