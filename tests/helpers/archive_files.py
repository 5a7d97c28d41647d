"""Small archives and folders of "images" in every format, and all that is read from one."""

import io
import tarfile
import zipfile

from fileio.archive_source import ArchiveError, Limits
from fileio.archives import open_source

FILES = {
    "set/b/2.jpg": b"b two",
    "set/b/1.jpg": b"b one" * 1000,
    "set/a/3.jpg": b"",
    "set/张三/照片.jpg": b"chinese",
}

# by (identity, name); 张 comes after every ASCII letter
SORTED = ["set/a/3.jpg", "set/b/1.jpg", "set/b/2.jpg", "set/张三/照片.jpg"]

KINDS = ["zip", "tar", "tar.gz", "tgz", "folder"]


def make_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data, **options)
    return path


def make_tar(path, files, extra=()):
    """A tar; `extra` are (TarInfo) members without data."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def make_folder(path, files):
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def make(kind, folder, files):
    if kind == "folder":
        return make_folder(folder / "source", files)
    return (make_zip if kind == "zip" else make_tar)(folder / f"source.{kind}", files)


def read_all(path, spool_dir=None, **limits):
    """{name: bytes or the reason's word}, sorted names, what was skipped, corruption."""
    with open_source(path, spool_dir, Limits(**limits)) as source:
        entries = source.entries()
        got = {
            entry.name: data.status if isinstance(data, ArchiveError) else data
            for entry, data in source.read(entries)
        }
        return got, [e.name for e in entries], source.skipped.counts, source.corruption
