"""Read the pictures of a .zip, .tar, .tar.gz/.tgz or a folder in place, in a fixed order.

    with open_source("data/CASIA-WebFace.zip") as source:
        for entry, data in source.read(source.entries()):
            ...  # data: the file's bytes, or an ArchiveError that says why there are none

Nothing is extracted: names inside an archive are data, never paths that get opened.  An entry's
identity is the name of the folder it lies in; where two folders in different places share a name,
both go by their whole path inside the source, so that no two people are merged.  Whatever is not a
picture file (links, devices, `..` and absolute names, lists, system files, empty folders) is passed
over and counted with its reason in `source.passed`.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from archive_names import clean_name, decode_name
from utils import UserError

MAX_BYTES = 200 << 20  # a picture file larger than this is no picture that we want
MAX_HEADER = 16 << 20  # the longest single read that tar headers may ask for
IN_MEMORY = 64 << 20  # an unsorted .tgz is put in order in memory up to here, then on disk
NAMES_KEPT = 50  # names listed for each reason


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
    """One picture file: its name inside the source, whose it is, its size in bytes."""

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
    """The pictures of one archive or folder; its kinds differ in `_members` and `_read`.

    `damage` is a sentence where the archive is cut short or damaged (empty where it is whole): what
    can be read of it is there all the same.
    """

    def __init__(self, path: Path, spool_dir: Path | None = None):
        self.path = path
        self.spool_dir = spool_dir
        self.passed = Tally()
        self.damage = ""
        self._entries: list[Entry] | None = None

    def entries(self) -> list[Entry]:
        """All picture files, sorted by (identity, name).  Raises ArchiveError."""
        if self._entries is None:
            self._entries = self._list()
        return self._entries

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, bytes | ArchiveError]]:
        """Each entry with its bytes or the reason why it has none, sorted, one at a time."""
        wanted = sorted(entries, key=lambda e: (e.identity, e.name))
        small = [e for e in wanted if e.size <= MAX_BYTES]
        contents = self._read(small)
        for entry in wanted:
            if entry.size <= MAX_BYTES:
                yield entry, next(contents)
            else:
                sentence = f"{entry.name} in {self.path} has {entry.size:,} bytes."
                yield entry, ArchiveError(sentence, "too_large")

    def fingerprint(self) -> str:
        """A hash of all names and sizes: the same pictures give the same one."""
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
        for raw, kind, size, handle in self._members():
            name, reason = clean_name(raw)
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
        """Count the innermost folders without a picture."""
        used: set[str] = set()
        for name in [*files, *folders]:
            parent = name.rpartition("/")[0]
            while parent and parent not in used:
                used.add(parent)
                parent = parent.rpartition("/")[0]
        for name in sorted(folders - used - {""}):
            self.passed.add("empty_folder", name)

    def _error(self, entry: Entry, error: Exception | str) -> ArchiveError:
        reason = str(error) or type(error).__name__
        return ArchiveError(f"{entry.name} in {self.path} cannot be read ({reason}).")


class FolderSource(Source):
    """A folder of identity folders; links in it are not followed."""

    def _members(self) -> Iterator[tuple[str, str, int, Any]]:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            try:
                found = list(os.scandir(self.path / folder))
            except OSError:
                yield folder, "unreadable_folder", 0, None
                continue
            for item in found:
                name = f"{folder}/{item.name}" if folder else item.name
                if item.is_symlink():
                    yield name, "link", 0, None
                elif item.is_dir():
                    waiting.append(name)
                    yield name, "folder", 0, None
                elif item.is_file():
                    yield name, "file", item.stat().st_size, item.path
                else:
                    yield name, "not_a_regular_file", 0, None

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            try:
                yield Path(entry.handle).read_bytes()
            except OSError as error:
                yield self._error(entry, error)


class ZipSource(Source):
    """A .zip archive, read through its central directory."""

    def __init__(self, path: Path, spool_dir: Path | None = None):
        super().__init__(path, spool_dir)
        try:
            self.zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise ArchiveError(
                f"{path} is cut short or damaged: it has no list of contents that can be read "
                f"({error}); fetch it again."
            ) from None

    def _members(self) -> Iterator[tuple[str, str, int, Any]]:
        for info in self.zip.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)
            name = info.filename
            if not info.flag_bits & 0x800:  # not marked as UTF-8: bytes that Python took for cp437
                name = decode_name(info.orig_filename.encode("cp437", "surrogateescape"))
            if "/" not in name:
                name = name.replace("\\", "/")  # written by some Windows tools
            if name.endswith("/"):
                yield name, "folder", 0, None
            elif mode not in (0, stat.S_IFREG):
                yield name, "link" if mode == stat.S_IFLNK else "not_a_regular_file", 0, None
            else:
                yield name, "file", info.file_size, info

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            try:
                # zipfile stops at the declared size and then checks the sum: no bomb goes off here.
                yield self.zip.read(entry.handle)
            except DAMAGE as error:
                yield self._error(entry, error)

    def close(self) -> None:
        """Close the archive."""
        self.zip.close()


class TarSource(Source):
    """A .tar or .tar.gz archive.

    A compressed one cannot be sought in.  It is gone through once for the list; pictures that stand
    in sorted order (as LFW's do) are then streamed.  Others are copied, one after the other, into a
    temporary file without a name (in memory when small), which holds pictures alone and vanishes
    with the process however that ends.
    """

    def __init__(self, path: Path, spool_dir: Path | None = None):
        super().__init__(path, spool_dir)
        with path.open("rb") as file:
            self.compressed = file.read(2) == b"\x1f\x8b"

    def _open(self) -> _Bounded:
        return _Bounded(gzip.open(self.path) if self.compressed else self.path.open("rb"))

    def _members(self) -> Iterator[tuple[str, str, int, Any]]:
        with self._open() as file:
            try:
                tar = tarfile.TarFile(fileobj=file)
            except DAMAGE as error:
                raise ArchiveError(
                    f"{self.path} is not a tar archive that can be read ({error}); fetch it again."
                ) from None
            try:
                place = -1
                while (info := tar.next()) is not None:
                    if info.size < 0 or info.offset <= place:  # would go round for ever
                        raise tarfile.ReadError(
                            f"the header at byte {info.offset:,} makes no sense"
                        )
                    place = info.offset
                    tar.members = []  # or it keeps half a million of them
                    yield from self._member(info)
                self._check_end(file, tar.offset)
            except DAMAGE as error:
                self.damage = f"{self.path} is damaged or cut short ({error or 'no more data'})."

    def _member(self, info: tarfile.TarInfo) -> Iterator[tuple[str, str, int, Any]]:
        name = decode_name(info.name.encode("utf-8", "surrogateescape"))
        if info.isdir():
            yield name, "folder", 0, None
        elif info.issym() or info.islnk():
            yield name, "link", 0, None
        elif info.isreg() and not info.issparse():
            yield name, "file", info.size, info.offset_data
        else:
            yield name, "not_a_regular_file", 0, None

    def _check_end(self, file: _Bounded, offset: int) -> None:
        """Raise unless the archive ends as it should: tarfile takes a spoilt header for the end."""
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            raise tarfile.ReadError("its end mark is missing")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {offset:,} makes no sense")
        while self.compressed and file.read(1 << 20):
            pass  # on to gzip's check sum

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        offsets = [e.handle for e in entries]
        if not self.compressed or offsets == sorted(offsets):
            with self._open() as file:
                yield from self._read_from(file, entries)
            return
        total = sum(e.size for e in entries)
        folder = self.spool_dir or Path(tempfile.gettempdir())
        if total > IN_MEMORY and total > shutil.disk_usage(folder).free:
            raise ArchiveError(
                f"{self.path} is not in order; sorting it takes {total:,} free bytes in {folder}."
            )
        with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=folder) as spool:
            places = {}
            by_offset = sorted(entries, key=lambda e: e.handle)
            with self._open() as file:
                for entry, data in zip(by_offset, self._read_from(file, by_offset), strict=True):
                    failed = isinstance(data, ArchiveError)
                    places[entry.name] = data if failed else spool.tell()
                    if not failed:
                        spool.write(data)
            for entry in entries:
                place = places[entry.name]
                if isinstance(place, int):
                    spool.seek(place)
                    place = spool.read(entry.size)
                yield place

    def _read_from(self, file: _Bounded, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        broken: Exception | None = None
        for entry in entries:
            data = b""
            if broken is None:
                try:
                    file.seek(entry.handle)
                    data = file.read(entry.size)
                except DAMAGE as error:
                    broken = error  # a compressed stream gives nothing after its first damage
            if len(data) == entry.size:
                yield data
            else:
                yield self._error(entry, broken or "the archive ends before it does")


class _Bounded:
    """A binary file that refuses the huge reads that a malicious tar header can ask for."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > max(MAX_HEADER, MAX_BYTES):
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self.file.read(size)

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *unused: object) -> None:
        self.file.close()


def open_source(path: Path | str, spool_dir: Path | None = None) -> Source:
    """The source at `path`, its kind told by its first bytes; `spool_dir` is for temporary files.

    Raises ArchiveError if there is nothing, or nothing of a kind that is read here.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, spool_dir)
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be opened ({error.strerror}).") from None
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipSource(path, spool_dir)
    if head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar" or path.suffix == ".tar":
        return TarSource(path, spool_dir)
    raise ArchiveError(
        f"{path} is neither a folder nor a .zip, .tar or .tar.gz archive"
        + (" but empty." if not head else "; unpack it, or fetch it again if its name says so.")
    )
