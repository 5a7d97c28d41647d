"""What archives and folders of images have in common: entries, their order, limits, tallies.

    source = open_source("data/CASIA-WebFace.zip")  # of archives.py, which knows the kinds
    source.entries()  # sorted by identity and name
    source.passed.counts  # {"not_a_picture": 3}

Archives come from strangers: a name is never a path that gets opened, and no list, header or
image file may take more memory than the limits here.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from utils import UserError

NAMES_KEPT = 50  # names listed for each reason
MAX_LIST = 4 << 30  # bytes that a list of names may take: about ten million images
ENTRY_BYTES = 300  # what an image's place in the list takes, without its name
SLACK = 64 << 20  # bytes that anything may unpack to, whatever its ratio

MAX_NAME = 4096  # characters: no file system has longer ones
MAX_DEPTH = 64  # folders in folders
JUNK_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}
# What lies beside images in the usual archives; any other file is tried as an image.
JUNK_SUFFIXES = {
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yml", ".yaml", ".md", ".html", ".pdf", ".doc"),
    *(".lst", ".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".log", ".py", ".m", ".sh"),
    *(".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".mp4", ".avi"),
}


def decode_name(raw: bytes) -> str:
    """A member's name as text: UTF-8, else GB 18030 (Chinese Windows), else cp437, part by part."""
    parts = []
    for part in raw.split(b"/"):
        for encoding in ("utf-8", "gb18030", "cp437"):
            try:
                parts.append(part.decode(encoding))
                break
            except UnicodeDecodeError:
                continue
    return "/".join(parts)


def clean_name(name: str) -> tuple[str, str]:
    """A name without `.` and empty parts, and why it is no image's ("" if it may be one)."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    parts = [p for p in name.split("/") if p not in ("", ".")]
    clean = "/".join(parts)
    if len(name) > MAX_NAME or len(parts) > MAX_DEPTH:
        return name[:MAX_NAME], "unsafe_name"
    absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name)
    if absolute or ".." in parts or "\0" in name:
        return name, "unsafe_name"
    if any(p.startswith(".") or p.lower() in JUNK_NAMES for p in parts):
        return clean, "system_file"
    if PurePosixPath(clean).suffix.lower() in JUNK_SUFFIXES and not name.endswith("/"):
        return clean, "not_a_picture"
    return clean, ""


@dataclass(frozen=True)
class Limits:
    """How large an image file may be, and how many times its packed bytes anything may unpack to.

    Photographs hardly shrink when packed; archive bombs unpack a thousandfold and more.
    """

    file_bytes: int = 200 << 20
    ratio: int = 100


LIMITS = Limits()


class ArchiveError(UserError):
    """A source, or one file of it, cannot be read; `status` is the reason in one word."""

    def __init__(self, sentence: str, status: str = "unreadable"):
        super().__init__(sentence)
        self.status = status


# What the standard library raises for damaged archives: NotImplementedError is an unknown
# compression, RuntimeError a password, the last line what bad numbers in headers lead to.
DAMAGE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
    *(NotImplementedError, RuntimeError),
    *(ValueError, OverflowError, struct.error),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file: its name inside the source, whose it is, its size in bytes."""

    name: str
    identity: str
    size: int
    handle: Any = field(compare=False, repr=False)  # where its source finds it


class Tally:
    """Counts names by reason, and keeps the first `NAMES_KEPT` names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one name."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_KEPT:
            names.append(name)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """`{reason: {"count": n, "names": [...]}}`, for a report."""
        return {r: {"count": n, "names": self.names[r]} for r, n in sorted(self.counts.items())}


class Source:
    """The images of one archive or folder; its kinds differ in `_members` and `_read`.

    `damage` is a sentence where the archive is cut short or damaged (empty where it is whole): what
    can be read of it is there all the same.
    """

    def __init__(self, path: Path, spool_dir: Path | None = None, limits: Limits = LIMITS):
        self.path = path
        self.spool_dir = spool_dir
        self.limits = limits
        self.passed = Tally()
        self.damage = ""
        self._entries: list[Entry] | None = None

    def entries(self) -> list[Entry]:
        """All image files, sorted by (identity, name).  Raises ArchiveError."""
        if self._entries is None:
            self._entries = self._list()
        return self._entries

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | ArchiveError]]:
        """Each entry with its bytes or the reason why it has none, sorted, one at a time."""
        wanted = sorted(entries, key=lambda e: (e.identity, e.name))
        most = self.limits.file_bytes
        contents = self._read([e for e in wanted if e.size <= most])
        for entry in wanted:
            if entry.size <= most:
                yield entry, next(contents)
            else:
                sentence = (
                    f"{entry.name} in {self.path} has {entry.size:,} bytes, more than "
                    f"--max-file-mb allows ({most >> 20:,} MB)."
                )
                yield entry, ArchiveError(sentence, "too_large")

    def fingerprint(self) -> str:
        """A hash of all names and sizes: the same images give the same one."""
        digest = hashlib.sha256()
        for entry in self.entries():
            digest.update(f"{entry.name}\0{entry.size}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _members(self) -> Iterator[tuple[str, str, int, Any]]:
        """(name, kind, size, handle) of everything; kind is "file", "folder" or a reason."""
        raise NotImplementedError

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        """The bytes of each entry, in the order given."""
        raise NotImplementedError

    def _list(self) -> list[Entry]:
        files: dict[str, tuple[int, Any]] = {}
        folders: set[str] = set()
        listed = 0
        for raw, kind, size, handle in self._members():
            name, reason = clean_name(raw)
            listed += ENTRY_BYTES + len(name)
            if listed > MAX_LIST:
                raise ArchiveError(
                    f"{self.path} names so many files that their list alone would take more than "
                    f"{MAX_LIST >> 30} GB of memory; split it."
                )
            if kind == "folder" and not reason:
                folders.add(name)
            elif kind != "folder":
                if reason or kind != "file":
                    self.passed.add(reason or kind, name)
                elif "/" not in name:
                    self.passed.add("no_identity_folder", name)
                else:
                    if name in files:  # the later one counts, as when extracting
                        self.passed.add("duplicate_name", name)
                    files[name] = (size, handle)
        self._count_empty(folders, files)
        parents: dict[str, set[str]] = {}
        for name in files:
            parent = name.rpartition("/")[0]
            parents.setdefault(parent.rpartition("/")[2], set()).add(parent)
        entries = []
        for name, (size, handle) in files.items():
            parent = name.rpartition("/")[0]
            base = parent.rpartition("/")[2]
            identity = base if len(parents[base]) == 1 else parent
            entries.append(Entry(name, identity, size, handle))
        return sorted(entries, key=lambda e: (e.identity, e.name))

    def _count_empty(self, folders: set[str], files: Iterable[str]) -> None:
        """Count the innermost folders without an image."""
        empty = folders - {""}
        for name in [*files, *folders]:
            parent = name.rpartition("/")[0]
            while parent and empty:
                empty.discard(parent)
                parent = parent.rpartition("/")[0]
        for name in sorted(empty):
            self.passed.add("empty_folder", name)

    def _refuse_bomb(self, packed: int, unpacked: int) -> None:
        if unpacked > SLACK + self.limits.ratio * packed:
            raise ArchiveError(
                f"{self.path} unpacks to more than {self.limits.ratio} times its size, as archive "
                "bombs do; raise --max-ratio if you trust it."
            )

    def _error(self, entry: Entry, error: Exception | str) -> ArchiveError:
        reason = str(error) or type(error).__name__
        return ArchiveError(f"{entry.name} in {self.path} cannot be read ({reason}).")
