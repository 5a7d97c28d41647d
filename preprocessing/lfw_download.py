"""Downloads LFW and its pairs from scikit-learn's mirror: the data set's own host is gone.

    python pre_process.py --download-lfw

keeps the funneled archive packed in data/lfw_home/ (where scikit-learn's own `fetch_lfw_pairs`
finds it with `data_home="data"`) and copies pairs.txt to data/.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fileio.safe_files import atomic_write, make_folder
from utils import UserError

DOWNLOAD_TIMEOUT = 30  # seconds that the host may be silent
RETRY_DELAYS = (1, 5, 15)  # seconds before each further attempt
CHUNK_BYTES = 1 << 20
DOWNLOAD_ERRORS = (OSError, http.client.HTTPException)  # urllib's URLError is an OSError


class RemoteFile(NamedTuple):
    """A file to download, and the SHA-256 that its bytes must have."""

    url: str
    sha256: str


# The addresses and checksums that scikit-learn publishes (sklearn/datasets/_lfw.py, BSD).
LFW_FILES = {
    "lfw-funneled.tgz": RemoteFile(
        "https://ndownloader.figshare.com/files/5976015",
        "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a",
    ),
    "pairs.txt": RemoteFile(
        "https://ndownloader.figshare.com/files/5976006",
        "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592",
    ),
}


def download_lfw(data_dir: Path | str) -> Path:
    """LFW's funneled images, an archive or a folder; data_dir/pairs.txt exists afterwards.

    What scikit-learn has downloaded before is used, below data_dir or in its own data folder
    (SCIKIT_LEARN_DATA). Everything downloaded is checked against its SHA-256. Raises UserError if
    the host cannot be reached or sends something else.
    """
    data = Path(data_dir)
    home = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    folders = [data / "lfw_home", home / "lfw_home"]
    images = _first(folders, "lfw_funneled") or _first(folders, "lfw-funneled.tgz")
    pairs = _first([data, *folders], "pairs.txt")
    if images is None or pairs is None:
        make_folder(folders[0])
        # The small file first: if the host cannot be reached, that is known at once.
        pairs = pairs or download("pairs.txt", folders[0])
        images = images or download("lfw-funneled.tgz", folders[0])
    if not (data / "pairs.txt").exists():
        make_folder(data)
        with atomic_write(data / "pairs.txt") as file:
            file.write(pairs.read_bytes())
    print(f"LFW: {images} and {data / 'pairs.txt'}")
    return images


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def download(name: str, folder: Path) -> Path:
    """Download one of LFW_FILES to a folder, with retries; UserError if that fails."""
    remote, path = LFW_FILES[name], folder / name
    print(f"downloading {name} from {remote.url} ...", flush=True)
    for delay in RETRY_DELAYS:
        try:
            return _download_once(remote, path)
        except DOWNLOAD_ERRORS as error:
            print(f"  {error}; trying again in {delay} s", flush=True)
            time.sleep(delay)
    try:
        return _download_once(remote, path)
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"{name} could not be downloaded from {remote.url} ({error}); try again later, or put "
            "lfw-funneled.tgz and pairs.txt into the data folder yourself."
        ) from None


def _download_once(remote: RemoteFile, path: Path) -> Path:
    """Download a file to `path`; one of DOWNLOAD_ERRORS if the host or the checksum fails.

    It gets its name only once its checksum is right: until then it is a temporary file, which
    atomic_write removes. A disk that fails is a UserError, which no retry would cure.
    """
    digest = hashlib.sha256()
    with urllib.request.urlopen(remote.url, timeout=DOWNLOAD_TIMEOUT) as response:
        size = response.headers.get("Content-Length")
        total = int(size) if size else None
        with (
            atomic_write(path) as file,
            tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar,
        ):
            while chunk := response.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != remote.sha256:
                raise OSError(
                    f"SHA-256 is {digest.hexdigest()}, not {remote.sha256}: the file is incomplete "
                    "or not the one expected"
                )
    return path
