"""Deal the images of a training set out at random to many record files.

    python -m tools.make_shards --source data/faces_webface_112x112 --output data/webface_shards

fileio/shards.py describes the folder that it writes; train.py --train-set reads it file by file.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

from config import Config, parse_args, setting
from utils import UserError, exit_on_user_error


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Shards"""

    SHARED: ClassVar[str] = "data_dir seed"
    source: str = setting("", "folder with train.rec; default: data_dir/faces_webface_112x112")
    output: str = setting("", "folder to write; default: data_dir/faces_webface_shards")
    shard_images: int = setting(50000, "images per file", low=1)


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Deal a set's images out to shards of about --shard-images."""
    # Imported here, so that --help answers at once.
    from tqdm import tqdm

    from fileio.recordio import RecordReader
    from fileio.shards import write_shards

    source = cfg.source or Path(cfg.data_dir, "faces_webface_112x112")
    output = Path(cfg.output or Path(cfg.data_dir, "faces_webface_shards"))
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give another --output, or delete it.")
    reader = RecordReader(source)
    count = max(1, round(len(reader) / cfg.shard_images))
    jpegs = (reader.encoded(i) for i in tqdm(range(len(reader)), unit="img"))
    write_shards(output, jpegs, reader.labels, count, cfg.seed)
    print(
        f"{len(reader):,} images of {reader.num_classes:,} identities in {count:,} files, "
        f"{output}. Next: python train.py --train-set {output}"
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "make_shards", Settings, __doc__))
