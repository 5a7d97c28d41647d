"""Test on identities that were held out of the training set: pairs of them, and all their pairs.

    python -m tools.held_out --make-pairs 6000        # data/held_out.txt and data/held_out.bin
    python train.py --hold-out data/held_out.txt --lfw data/held_out.bin
    python lfw_eval.py --sets lfw,held_out
    python -m tools.held_out                          # TAR at FAR 1e-3 to 1e-6 over all their pairs

The first command writes the list of identities and, as InsightFace's .bin, pairs of them: ten folds
that share no identity, half of each genuine. With --hard-negatives an impostor pair is an image and
its hardest impostor in the fold, as --checkpoint sees it. That makes the test harder for this model
than for others, so choose a model that is not compared. The last command embeds every image of the
identities and compares all pairs; it prints a line per FAR and writes runs/<run>/held_out.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from config import Config, parse_args, setting
from utils import UserError, exit_on_user_error, get_device, keep_freed_memory, newest_run

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    from evaluation.evaluated_model import EvaluatedModel
    from fileio.recordio import RecordReader


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Held-out identities"""

    SHARED: ClassVar[str] = (
        "data_dir runs_dir device workers seed train_set flip network use_se eval_batch checkpoint "
        "input_mean input_std bgr"
    )
    make_pairs: int = setting(
        0, "choose identities and write so many pairs; 0: test on all pairs of those chosen", low=0
    )
    held_out_identities: int = setting(500, "identities to hold out", low=20)
    hard_negatives: bool = setting(
        False, "impostor pairs: an image and its hardest impostor under --checkpoint"
    )
    hold_out: str = setting("", "list of the identities; default: data_dir/held_out.txt")


def open_evaluated_model(cfg: Settings) -> EvaluatedModel:
    """The model that is tested, or that chooses the hardest impostors."""
    from evaluation.embedders import InputSpec
    from evaluation.evaluated_model import open_model

    model = open_model(
        Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt")),
        runs_dir=cfg.runs_dir,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        batch=cfg.eval_batch,
        flip=cfg.flip,
    )
    print(f"Model: {model}")
    return model


def write_held_out_pairs(cfg: Settings, reader: RecordReader, list_path: Path) -> None:
    """Choose the identities, write their list and their pairs."""
    import numpy as np

    from evaluation.embed_records import embed_records
    from evaluation.pair_making import (
        NUM_FOLDS,
        choose_held_out_identities,
        make_verification_pairs,
    )
    from fileio.bin_sets import write_bin
    from training.sample_lists import write_held_out

    identities = choose_held_out_identities(reader.labels, cfg.held_out_identities, cfg.seed)
    indices = np.flatnonzero(np.isin(reader.labels, identities))
    embeddings = None
    if cfg.hard_negatives:
        model = open_evaluated_model(cfg)
        decoded, embeddings = embed_records(reader, indices, model.embed, cfg.workers)
        indices = indices[decoded]
    pairs = make_verification_pairs(reader.labels[indices], cfg.make_pairs, cfg.seed, embeddings)
    if len(pairs) < 2 * NUM_FOLDS:
        raise UserError(
            f"There are {len(pairs)} pairs in ten folds that share no identity; ask for 20 or "
            f"more, and hold out at least {2 * NUM_FOLDS} identities (--held-out-identities)."
        )
    write_held_out(list_path, reader, identities)
    output = list_path.with_suffix(".bin")
    images = [reader.encoded(int(indices[end])) for pair, _ in pairs for end in pair]
    write_bin(output, images, [same for _, same in pairs])
    choice = "an image and its hardest impostor" if cfg.hard_negatives else "two images at random"
    print(
        f"Wrote {list_path}: {len(identities):,} of {len(np.unique(reader.labels)):,} identities, "
        f"{len(indices):,} images\nWrote {output}: {len(pairs):,} pairs in {NUM_FOLDS} folds, "
        f"half of them genuine; an impostor pair is {choice}\n"
        f"Next: python train.py --hold-out {list_path} --lfw {output}"
    )


def evaluate_all_pairs(cfg: Settings, reader: RecordReader, list_path: Path) -> None:
    """Compare all images of the held-out identities, print the table, write the JSON."""
    import numpy as np

    from evaluation.all_pairs import all_pairs_table, tar_at_low_fars
    from evaluation.embed_records import embed_records
    from fileio.checkpoint_file import load_checkpoint
    from fileio.safe_files import atomic_write, make_folder
    from training.sample_lists import read_held_out

    identities = read_held_out(list_path, reader)
    model = open_evaluated_model(cfg)
    if model.is_ours and not load_checkpoint(model.checkpoint)["config"].get("hold_out"):
        print("Warning: this model was trained without --hold-out; it may know these identities.")
    indices = np.flatnonzero(np.isin(reader.labels, identities))
    decoded, embeddings = embed_records(reader, indices, model.embed, cfg.workers)
    start = time.perf_counter()
    metrics = tar_at_low_fars(embeddings, reader.labels[indices[decoded]])
    seconds = round(time.perf_counter() - start, 2)
    print(all_pairs_table(metrics))
    content = {
        **metrics,
        **model.info,
        "checkpoint": str(model.checkpoint),
        "list": str(list_path),
        "flip": cfg.flip,
        "seconds": seconds,
    }
    path = model.folder / "held_out.json"
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)
    print(f"Compared in {seconds} s; wrote {path}.")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Make the pairs, or test on all of them."""
    from fileio.recordio import RecordReader
    from fileio.shards import is_sharded

    keep_freed_memory()
    folder = Path(cfg.train_set or Path(cfg.data_dir, "faces_webface_112x112"))
    if is_sharded(folder):
        raise UserError(
            f"Identities are held out of a set in one train.rec; {folder} is in shards."
        )
    reader = RecordReader(folder)
    list_path = Path(cfg.hold_out or Path(cfg.data_dir, "held_out.txt"))
    if cfg.make_pairs:
        write_held_out_pairs(cfg, reader, list_path)
    else:
        evaluate_all_pairs(cfg, reader, list_path)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "held_out", Settings, __doc__))
