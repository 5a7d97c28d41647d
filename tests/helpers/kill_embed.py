"""tools.embed in blocks as small as --detect-batch, killed as it begins to write its n-th file.

python tests/helpers/kill_embed.py n FOLDER --flags
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import parse_args
from evaluation import photo_gallery
from preprocessing import pipeline
from tools import embed

save, left = photo_gallery.save_gallery, int(sys.argv[1])


def deadly_save(path, gallery):
    """save_gallery, but for the last call."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, gallery)


if __name__ == "__main__":
    pipeline.BLOCK_IMAGES = 4
    photo_gallery.save_gallery = deadly_save
    embed.main(parse_args(sys.argv[2:], "embed", embed.Settings))
