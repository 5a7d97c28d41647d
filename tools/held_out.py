"""Test on identities that were held out of the training set: pairs of them, and all their pairs.

    python -m tools.held_out --make-pairs 6000        # data/held_out.txt and data/held_out.bin
    python train.py --hold-out data/held_out.txt --lfw data/held_out.bin
    python lfw_eval.py --sets lfw,held_out
    python -m tools.held_out                          # TAR at FAR 1e-3 to 1e-6 over all their pairs

The first writes the list of identities and, as InsightFace's .bin, pairs of them: ten folds that
share nobody, half of each matched. --hard-negatives takes for mismatched ones the stranger in the
fold whom --checkpoint finds most alike; it makes the test harder for that model than for others,
so let no model that is compared choose. The last embeds every image of the identities and
compares each with each; it prints a line a FAR and writes runs/<run>/held_out.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from config import Config, parse_args, setting
from evaluation.all_pairs import low_far
from evaluation.embed_records import embed_images
from evaluation.embedders import Embed, InputSpec, load_embedder
from evaluation.pair_making import FOLDS, choose_identities, make_pairs
from evaluation.templates import tar_line
from fileio.bin_sets import write_bin
from fileio.checkpoint_file import load_checkpoint
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder
from fileio.shards import is_sharded
from training.sample_lists import read_held_out, write_held_out
from utils import UserError, exit_on_user_error, get_device, keep_freed_memory, newest_run


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


def open_model(cfg: Settings) -> tuple[Embed, dict[str, Any], Path]:
    """The model that is tested, or that finds strangers alike; what it is, and its file."""
    checkpoint = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt"))
    embed, about = load_embedder(
        checkpoint,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        flip=cfg.flip,
        batch=cfg.eval_batch,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
    )
    print(f"Model: {checkpoint} ({about['network']})")
    return embed, about, checkpoint


def write_pairs(cfg: Settings, reader: RecordReader, list_path: Path) -> None:
    """Choose the identities and write their list and their pairs."""
    identities = choose_identities(reader.labels, cfg.held_out_identities, cfg.seed)
    places = np.flatnonzero(np.isin(reader.labels, identities))
    embeddings = None
    if cfg.hard_negatives:
        whole, embeddings = embed_images(reader, places, open_model(cfg)[0], cfg.workers)
        places = places[whole]
    pairs = make_pairs(reader.labels[places], cfg.make_pairs, cfg.seed, embeddings)
    if len(pairs) < 2 * FOLDS:
        raise UserError(
            f"There are {len(pairs)} pairs in ten folds that share nobody; ask for 20 or more, and "
            f"hold out at least {2 * FOLDS} identities (--held-out-identities)."
        )
    write_held_out(list_path, reader, identities)
    output = list_path.with_suffix(".bin")
    jpegs = [reader.encoded(int(places[side])) for pair, _ in pairs for side in pair]
    write_bin(output, jpegs, [same for _, same in pairs])
    hard = "each an image and its nearest stranger" if cfg.hard_negatives else "by chance"
    print(
        f"Wrote {list_path}: {len(identities):,} of {len(np.unique(reader.labels)):,} identities, "
        f"{len(places):,} images\nWrote {output}: {len(pairs):,} pairs in {FOLDS} folds, half "
        f"of them matched, the mismatched ones {hard}\n"
        f"Next: python train.py --hold-out {list_path} --lfw {output}"
    )


def table(found: dict[str, Any]) -> str:
    """What the script prints of a result."""
    lines = [
        f"{found['pictures']:,} images of {found['identities']:,} identities: "
        f"{found['matched_pairs']:,} matched and {found['mismatched_pairs']:,} mismatched pairs"
    ]
    lines += [tar_line(far, point) for far, point in found["tar_at_far"].items()]
    return "\n".join(lines + found["refused"])


def evaluate(cfg: Settings, reader: RecordReader, list_path: Path) -> None:
    """Compare all images of the identities with each other, print a table, write the JSON."""
    identities = read_held_out(list_path, reader)
    embed, about, checkpoint = open_model(cfg)
    ours = about["kind"] == "ours"
    if ours and not load_checkpoint(checkpoint)["config"].get("hold_out"):
        print("Warning: this model was trained without --hold-out; it may know these identities.")
    places = np.flatnonzero(np.isin(reader.labels, identities))
    whole, embeddings = embed_images(reader, places, embed, cfg.workers)
    start = time.perf_counter()
    found = low_far(embeddings, reader.labels[places[whole]])
    seconds = round(time.perf_counter() - start, 2)
    print(table(found))
    path = (checkpoint.parent if ours else Path(cfg.runs_dir) / checkpoint.stem) / "held_out.json"
    report = found | about | {"checkpoint": str(checkpoint), "list": str(list_path)}
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        json.dump(report | {"flip": cfg.flip, "seconds": seconds}, file, indent=1)
    print(f"Compared in {seconds} s; wrote {path}.")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Make the pairs, or test on all of them."""
    keep_freed_memory()
    folder = Path(cfg.train_set or Path(cfg.data_dir, "faces_webface_112x112"))
    if is_sharded(folder):
        raise UserError(
            f"Identities are held out of a set in one train.rec; {folder} is in shards."
        )
    reader = RecordReader(folder)
    list_path = Path(cfg.hold_out or Path(cfg.data_dir, "held_out.txt"))
    (write_pairs if cfg.make_pairs else evaluate)(cfg, reader, list_path)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "held_out", Settings, __doc__))
