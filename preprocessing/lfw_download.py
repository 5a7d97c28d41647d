"""LFW and its pairs through scikit-learn's downloader: the archive's own host is gone.

    python pre_process.py --download-lfw

keeps the funneled archive packed in data/lfw_home/ (where scikit-learn's own `fetch_lfw_pairs`
finds it with `data_home="data"`) and puts pairs.txt into data/.
"""

from __future__ import annotations

import http.client
import os
import warnings
from pathlib import Path

from fileio.safe_files import atomic_write, make_folder
from utils import UserError


def download_lfw(data_dir: Path | str) -> Path:
    """LFW's funneled images, an archive or a folder; data_dir/pairs.txt is there afterwards.

    What scikit-learn fetched before is used, be it below data_dir or in its own data folder
    (SCIKIT_LEARN_DATA).  Everything fetched is checked against scikit-learn's SHA-256 sums.
    Raises UserError if the host cannot be reached or sends something else.
    """
    data = Path(data_dir)
    home = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    folders = [data / "lfw_home", home / "lfw_home"]
    images = _first(folders, "lfw_funneled") or _first(folders, "lfw-funneled.tgz")
    pairs = _first([data, *folders], "pairs.txt")
    if images is None or pairs is None:
        make_folder(folders[0])
        pairs = pairs or _fetch("pairs.txt", folders[0])
        images = images or _fetch("lfw-funneled.tgz", folders[0])
    if not (data / "pairs.txt").exists():
        make_folder(data)
        with atomic_write(data / "pairs.txt") as file:
            file.write(pairs.read_bytes())
    print(f"LFW: {images} and {data / 'pairs.txt'}")
    return images


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _fetch(name: str, folder: Path) -> Path:
    """Fetch one of scikit-learn's LFW files.

    Its public functions would unpack the archive to 13,233 files, and take a folder that a kill
    left half unpacked for whole; hence the function beneath them.
    """
    from sklearn.datasets import _lfw  # a second to import, and needed here alone

    remote = next(r for r in (_lfw.FUNNELED_ARCHIVE, *_lfw.TARGETS) if r.filename == name)
    print(f"fetching {name} from {remote.url} ...", flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each retry
            return Path(_lfw._fetch_remote(remote, dirname=folder))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{name} could not be fetched from {remote.url} ({error}); try again later, or put "
            "lfw-funneled.tgz and pairs.txt into the data folder yourself."
        ) from None
