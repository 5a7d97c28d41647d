"""Write a test set as InsightFace's .bin: a folder of aligned faces and its pairs in one file.

    python -m tools.make_bin    # data/faces_lfw_112x112 and data/pairs.txt to data/lfw.bin
    python -m tools.make_bin --lfw my_faces --pairs my_pairs.txt --output my_set.bin

The folder is one that pre_process.py has prepared, or holds images of 112x112; the pairs are in a
form that docs/evaluation.md names. They are written fold by fold and encoded images are copied byte
for byte, so that the .bin, whose folds are contiguous tenths, gives the same metrics as the folder.
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
    """Test set"""

    SHARED: ClassVar[str] = "data_dir pairs"
    lfw: str = setting("", "folder of aligned faces; default: data_dir/faces_lfw_112x112")
    output: str = setting("", "file to write; default: data_dir/<set>.bin")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Check that the folder makes a test set, write the .bin, and print what is in it."""
    # Imported here, so that --help answers at once.
    import numpy as np

    from evaluation.face_folders import open_face_folder
    from evaluation.pair_sets import find_pairs, load_set, set_name
    from fileio.bin_sets import write_bin
    from fileio.safe_files import make_folder

    folder = Path(cfg.lfw or Path(cfg.data_dir, "faces_lfw_112x112"))
    if not folder.is_dir():
        raise UserError(
            f"There is no folder of aligned faces at {folder}; prepare one (python pre_process.py) "
            "or name one with --lfw."
        )
    pairs_path = find_pairs(folder, cfg.data_dir, cfg.pairs)
    test_set = load_set(folder, pairs_path)  # decodes every image, so none is corrupt
    pairs, reader = test_set.pairs, open_face_folder(folder).reader
    images = [reader.encoded(int(i)) for i in test_set.positions]
    order = np.stack([pairs.first, pairs.second], 1).ravel()
    output = Path(cfg.output or Path(cfg.data_dir, f"{set_name(folder)}.bin"))
    make_folder(output.parent)
    write_bin(output, [images[face] for face in order], pairs.same.tolist())
    print(
        f"Wrote {output}: {len(pairs.same):,} pairs of {len(images):,} faces, "
        f"{int(pairs.same.sum()):,} of them genuine, {output.stat().st_size / 1e6:.1f} MB."
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "make_bin", Settings, __doc__))
