"""What archives and folders of images have in common: entries, their order, names, limits.

    source = open_source("data/CASIA-WebFace.zip")  # fileio.archives: opens any of them
    source.entries()  # sorted by identity and name
    source.skipped.counts  # {"not_a_picture": 3}

Archives are untrusted input: a member's name is data, never a path that gets opened, and no list of
names, header or image file may take more memory than the limits here.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import lzma
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fileio.identities import find_identities, own_folders
from utils import UserError

MAX_NAMES_LISTED = 50  # names kept for each reason; the rest are only counted
MAX_LIST_BYTES = 4 << 30  # memory for the list of entries: enough for about ten million images
ENTRY_BYTES = 300  # memory that an entry takes in that list, without its name
MIN_BOMB_BYTES = 64 << 20  # what unpacks to less than this is no bomb, whatever its ratio

MAX_NAME_LENGTH = 4096  # characters: no file system has longer ones
MAX_FOLDER_DEPTH = 64  # folders inside folders
JUNK_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}
# Files that lie beside the images in common archives. Any other file is tried as an image, since
# data sets have images with odd suffixes or none.
JUNK_SUFFIXES = (
    {".txt", ".csv", ".tsv", ".json", ".xml", ".yml", ".yaml", ".md", ".html", ".pdf", ".doc"}
    | {".lst", ".mat", ".npy", ".npz", ".pkl", ".db", ".ini", ".log", ".py", ".m", ".sh"}
    | {".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".mp4", ".avi"}
)


@dataclass(frozen=True)
class Limits:
    """The largest image file, and the largest ratio of unpacked to packed bytes.

    Photographs hardly shrink when packed (a ratio near 1); archive bombs have ratios of a thousand
    and more, blank images of perhaps 100.
    """

    file_bytes: int = 200 << 20
    ratio: int = 100


DEFAULT_LIMITS = Limits()


class ArchiveError(UserError):
    """A source, or one file in it, cannot be read; `status` is the reason in one word."""

    def __init__(self, sentence: str, status: str = "unreadable"):
        super().__init__(sentence)
        self.status = status


# What the standard library raises for corrupt archives.
ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,  # an unknown compression
    RuntimeError,  # a password is needed
    ValueError,  # these three: numbers in headers that make no sense
    OverflowError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file: its name in the source, its identity, its size in bytes."""

    name: str
    identity: str
    size: int
    # How its source finds it: a path, a ZipInfo or an offset.
    handle: Any = field(compare=False, repr=False)
    stamp: int = field(default=0, compare=False, repr=False)  # see Source.STAMP


class Member(NamedTuple):
    """Anything that a source lists; `kind` is "file", "folder", "link" or the reason to skip it."""

    name: str
    kind: str
    size: int = 0
    handle: Any = None  # of a link: what it points to, from the source's root
    stamp: int = 0


class Tally:
    """Counts names by reason, and keeps the first `MAX_NAMES_LISTED` names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one name."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < MAX_NAMES_LISTED:
            names.append(name)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """`{reason: {"count": n, "names": [...]}}`, for report.json."""
        return {
            reason: {"count": count, "names": self.names[reason]}
            for reason, count in sorted(self.counts.items())
        }


# ------------------------------------------------------------------------------ names


def decode_name(raw: bytes) -> str:
    """A member's name as text: UTF-8, else GB 18030 (Chinese Windows), else cp437 (DOS).

    Each part between slashes is decoded by itself: an archive packed twice may mix encodings.
    """
    parts = []
    for part in raw.split(b"/"):
        for encoding in ("utf-8", "gb18030", "cp437"):  # cp437 has a character for every byte
            try:
                parts.append(part.decode(encoding))
                break
            except UnicodeDecodeError:
                continue
    return "/".join(parts)


def clean_name(name: str) -> tuple[str, str]:
    """The name without `.` and empty parts, and the reason to skip it ("" if it may be an image).

    clean_name("./set//a/1.jpg") == ("set/a/1.jpg", "")
    clean_name("set/../../1.jpg") == ("set/../../1.jpg", "unsafe_name")
    """
    # Bytes that are no text become \\xff and the like: the name will be written to UTF-8 files.
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    clean = "/".join(parts)
    if len(name) > MAX_NAME_LENGTH or len(parts) > MAX_FOLDER_DEPTH:
        return name[:MAX_NAME_LENGTH], "unsafe_name"
    is_absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name)
    if is_absolute or ".." in parts or "\0" in name:
        return name, "unsafe_name"
    if any(part.startswith(".") or part.lower() in JUNK_NAMES for part in parts):
        return clean, "system_file"
    if posixpath.splitext(clean)[1].lower() in JUNK_SUFFIXES and not name.endswith("/"):
        return clean, "not_a_picture"
    return clean, ""


def link_target(name: str, target: str) -> str:
    """What a symbolic link of this name points to, from the root of the archive.

    link_target("a/b/link", "../c") == "a/c"; what begins with ".." or "/" is outside.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(clean_name(name)[0]), target))


# ------------------------------------------------------------------------------ sources


class Source:
    """The images of one archive or folder; subclasses implement `_members` and `_read`.

    `skipped` counts what is no image, by reason. `corruption` is a sentence if the archive is
    corrupt or cut short (else empty); what can be read of it is listed all the same.
    `identity_notice` is a sentence if the identities may be others than meant. All are complete
    once `entries` has returned.
    """

    # What an entry's `stamp` is; it may tell images of one name and size apart. Times in whole
    # seconds, as many file systems keep no more.
    STAMP = "mtime"

    def __init__(
        self,
        path: Path,
        spool_dir: Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
        identity_level: str = "auto",
    ):
        self.path = path
        self.spool_dir = spool_dir
        self.limits = limits
        self.identity_level = identity_level
        self.skipped = Tally()
        self.corruption = ""
        self.identity_notice = ""
        self._own_folders = True  # whether the identities are what `own_folders` says
        self.needs_identities = True  # else images outside of any folder are entries, too
        self._entries: list[Entry] | None = None

    def entries(self) -> list[Entry]:
        """All image files, sorted by (identity, name). Raises ArchiveError."""
        if self._entries is None:
            self._entries = self._list()
        return self._entries

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | ArchiveError]]:
        """Each entry with its bytes, or with the error that prevents them; sorted, one at a time.

        Too large files get an ArchiveError of status "too_large" and are not read.
        """
        in_order = sorted(entries, key=lambda entry: (entry.identity, entry.name))
        max_bytes = self.limits.file_bytes
        contents = self._read([entry for entry in in_order if entry.size <= max_bytes])
        for entry in in_order:
            if entry.size <= max_bytes:
                yield entry, next(contents)
            else:
                sentence = (
                    f"{entry.name} in {self.path} has {entry.size:,} bytes, more than "
                    f"--max-file-mb allows ({max_bytes >> 20:,} MB)."
                )
                yield entry, ArchiveError(sentence, "too_large")

    def restricted_to(self, entries: list[Entry]) -> Source:
        """This source with these of its entries alone, sorted as they are in it."""
        part = copy.copy(self)
        part._entries = entries
        return part

    def fingerprint(self) -> str:
        """A hash of all names and sizes: equal for the same images in any kind of archive.

        Identities are hashed only where they do not follow from each image's own folder.
        """
        digest = hashlib.sha256()
        for entry in self.entries():
            identity = "" if self._own_folders else f"\0{entry.identity}"
            digest.update(f"{entry.name}\0{entry.size}{identity}\n".encode())
        return digest.hexdigest()

    def stamps(self) -> str:
        """The kind of the entries' stamps, and a hash of all of them."""
        digest = hashlib.sha256()
        for entry in self.entries():
            digest.update(f"{entry.name}\0{entry.stamp}\n".encode())
        return f"{self.STAMP} {digest.hexdigest()}"

    def close(self) -> None:
        """Close the archive's file, if one is open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _members(self) -> Iterator[Member]:
        """Everything in the source, in any order."""
        raise NotImplementedError

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        """The bytes of each entry, in the order given."""
        raise NotImplementedError

    def _list(self) -> list[Entry]:
        files: dict[str, Member] = {}  # by clean name
        folders: set[str] = set()
        links: dict[str, str] = {}
        self._list_bytes = 0
        for member in self._members():
            name, reason = clean_name(member.name)
            self._count_memory(name)
            if member.kind == "folder":
                if not reason:
                    folders.add(name)
            elif reason or member.kind not in ("file", "link"):
                self.skipped.add(reason or member.kind, name)
            elif member.kind == "link":
                links[name] = member.handle
            elif self.needs_identities and "/" not in name:
                self.skipped.add("no_identity_folder", name)
            else:
                if name in files:  # the later one counts, as when extracting
                    self.skipped.add("duplicate_name", name)
                files[name] = member
        self._follow(links, files)
        self._count_empty(folders, files)
        return self._with_identities(files)

    def _count_memory(self, name: str) -> None:
        self._list_bytes += ENTRY_BYTES + len(name)
        if self._list_bytes > MAX_LIST_BYTES:
            raise ArchiveError(
                f"{self.path} names so many files that their list alone would take more than "
                f"{MAX_LIST_BYTES >> 30} GB of memory; split it."
            )

    def _follow(self, links: dict[str, str], files: dict[str, Member]) -> None:
        """Add what the links of an archive point to, files and whole folders, under their names."""
        names = sorted(files)
        for name, target in links.items():
            for _ in range(MAX_FOLDER_DEPTH):  # a link to a link
                target = links.get(target, target)
            # What is in a folder sorts between "folder/" and "folder0", as 0 follows / in ASCII.
            begin, end = (bisect.bisect_left(names, target + after) for after in "/0")
            if target.startswith(("..", "/")):
                self.skipped.add("link_outside", name)
            elif target in files:
                files.setdefault(name, files[target])
            elif begin == end or name.startswith(f"{target}/"):
                self.skipped.add("broken_link", name)
            else:
                for file in names[begin:end]:
                    self._count_memory(file)
                    files.setdefault(name + file[len(target) :], files[file])

    def _with_identities(self, files: dict[str, Member]) -> list[Entry]:
        """The sorted entries."""
        folders = {name.rpartition("/")[0] for name in files}
        identities, self.identity_notice = {}, ""
        if folders:
            identities, self.identity_notice = find_identities(folders, self.identity_level)
            self._own_folders = identities == own_folders(folders)
        entries = [
            Entry(name, identities[name.rpartition("/")[0]], file.size, file.handle, file.stamp)
            for name, file in files.items()
        ]
        return sorted(entries, key=lambda entry: (entry.identity, entry.name))

    def _count_empty(self, folders: set[str], files: Iterable[str]) -> None:
        """Count the innermost folders without an image.

        Of a/ with nothing but a/b/ in it, a/b is counted and a is not.
        """
        empty = folders - {""}
        for name in [*files, *folders]:
            folder = name.rpartition("/")[0]
            while folder and empty:
                empty.discard(folder)
                folder = folder.rpartition("/")[0]
        for name in sorted(empty):
            self.skipped.add("empty_folder", name)

    def _refuse_bomb(self, packed: int, unpacked: int) -> None:
        """Raise ArchiveError if so many packed bytes unpack to too many."""
        if unpacked > MIN_BOMB_BYTES + self.limits.ratio * packed:
            raise ArchiveError(
                f"{self.path} unpacks to more than {self.limits.ratio} times its size, as archive "
                "bombs do; raise --max-ratio if you trust it."
            )

    def _error(self, entry: Entry, error: Exception | str) -> ArchiveError:
        reason = str(error) or type(error).__name__
        return ArchiveError(f"{entry.name} in {self.path} cannot be read ({reason}).")
