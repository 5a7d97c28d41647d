"""Read the images of a .zip, .tar, .tar.gz/.tgz or a folder in place, in a fixed order.

    with open_source("data/CASIA-WebFace.zip") as source:
        for entry, data in source.read(source.entries()):
            ...  # data: the file's bytes, or an ArchiveError that says why there are none

Nothing is extracted: names inside an archive are data, never paths that get opened.  An entry's
identity is the name of the folder it lies in; where two folders in different places share a name,
both go by their whole path inside the source, so that no two people are merged.  Whatever is not a
image file (links, devices, `..` and absolute names, lists, system files, empty folders) is passed
over and counted with its reason in `source.passed`.  Archive bombs are refused: `Limits` says what
they are, and --max-file-mb and --max-ratio of pre_process.py raise it.  A zip in a zip is no
image and stays packed.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fileio.archive_names import decode_name
from fileio.archive_source import DAMAGE, LIMITS, ArchiveError, Entry, Limits, Source, Tally

__all__ = ["ArchiveError", "Entry", "Limits", "Source", "Tally", "open_source"]

MAX_HEADER = 1 << 20  # bytes that tar may read between one image and the next
IN_MEMORY = 64 << 20  # an unsorted .tgz is put in order in memory up to here, then on disk
STEP = 1 << 20  # bytes that are passed over at a time
DEFLATE = 1032  # bytes that one may unpack to, at most
LOCAL_HEADER = 30  # bytes before a zip's member, or more


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
                try:
                    about = item.stat(follow_symlinks=False)
                except OSError:  # it has vanished since
                    continue
                mode = about.st_mode
                if stat.S_ISLNK(mode):
                    yield name, "link", 0, None
                elif stat.S_ISDIR(mode):
                    waiting.append(name)
                    yield name, "folder", 0, None
                elif stat.S_ISREG(mode):
                    yield name, "file", about.st_size, item.path
                else:
                    yield name, "not_a_regular_file", 0, None

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            try:
                with Path(entry.handle).open("rb") as file:
                    yield file.read(entry.size)  # no more, whatever it has become since
            except OSError as error:
                yield self._error(entry, error)


class ZipSource(Source):
    """A .zip archive, read through its central directory."""

    def __init__(self, path: Path, spool_dir: Path | None = None, limits: Limits = LIMITS):
        super().__init__(path, spool_dir, limits)
        try:
            self.zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise ArchiveError(
                f"{path} is cut short or damaged: it has no list of contents that can be read "
                f"({error}); fetch it again."
            ) from None

    def _members(self) -> Iterator[tuple[str, str, int, Any]]:
        overlapping = self._overlapping()
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
            elif info.header_offset in overlapping:
                yield name, "overlapping", 0, None
            else:
                yield name, "file", info.file_size, info

    def _list(self) -> list[Entry]:
        entries = super()._list()
        small = [e for e in entries if e.size <= self.limits.file_bytes]
        packed = [e.handle.compress_size for e in small]
        # What claims more than Deflate can do is damage, to be told when it is read.
        unpacked = [min(e.size, DEFLATE * (n + 1)) for e, n in zip(small, packed, strict=True)]
        self._refuse_bomb(sum(packed), sum(unpacked))
        return entries

    def _overlapping(self) -> set[int]:
        """Where members begin that reach into the next one, as only bombs and damage have them."""
        infos = sorted(self.zip.infolist(), key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos] + [self.zip.start_dir]
        return {
            info.header_offset
            for info, end in zip(infos, ends[1:], strict=True)
            if info.header_offset + LOCAL_HEADER + info.compress_size > end
        }

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            info = entry.handle
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks those with no limit; images gain nothing by them.
                yield self._error(entry, "it is compressed by other means than Deflate")
                continue
            try:
                with self.zip.open(info) as file:
                    # Never without a number: zipfile would unpack all there is, up to 2 GB, then
                    # cut it to the declared size.  It checks the sum where that size is reached.
                    yield file.read(entry.size)
            except DAMAGE as error:
                yield self._error(entry, error)

    def close(self) -> None:
        """Close the archive."""
        self.zip.close()


class TarSource(Source):
    """A .tar or .tar.gz archive.

    A compressed one cannot be sought in.  It is gone through once for the list; images that stand
    in sorted order (as LFW's do) are then streamed.  Others are copied, one after the other, into a
    temporary file without a name (in memory when small), which holds images alone and vanishes
    with the process however that ends.
    """

    def __init__(self, path: Path, spool_dir: Path | None = None, limits: Limits = LIMITS):
        super().__init__(path, spool_dir, limits)
        with path.open("rb") as file:
            self.compressed = file.read(2) == b"\x1f\x8b"

    def _open(self) -> _Stream:
        return _Stream(self.path, self.compressed, self._refuse_bomb)

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
                    # Or it keeps half a million members, and what global headers say of them all.
                    tar.members, tar.pax_headers = [], {}
                    file.allow(MAX_HEADER, header=True)
                    yield from self._member(info)
                file.allow(MAX_HEADER)
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

    def _check_end(self, file: _Stream, offset: int) -> None:
        """Raise unless the archive ends as it should: tarfile takes a spoilt header for the end."""
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            raise tarfile.ReadError("its end mark is missing")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {offset:,} makes no sense")
        if self.compressed:
            file.seek(sys.maxsize)  # on to gzip's check sum

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

    def _read_from(self, file: _Stream, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        broken: Exception | None = None
        for entry in entries:
            data = b""
            if broken is None:
                try:
                    file.seek(entry.handle)
                    file.allow(entry.size)
                    data = file.read(entry.size)
                except DAMAGE as error:
                    broken = error  # a compressed stream gives nothing after its first damage
            if len(data) == entry.size:
                yield data
            else:
                yield self._error(entry, broken or "the archive ends before it does")


class _Stream:
    """A tar file, unpacked: reads no more than was allowed, and calls `check` as it unpacks.

    Headers can ask for huge reads, and name tables and sparse maps that go on for ever.
    """

    def __init__(self, path: Path, compressed: bool, check: Callable[[int, int], None]):
        self.raw = path.open("rb")
        self.compressed, self.check = compressed, check
        self.file: Any = gzip.open(self.raw) if compressed else self.raw  # noqa: SIM115
        self.tell = self.file.tell
        self.allow(MAX_HEADER, header=True)

    def allow(self, size: int, header: bool = False) -> None:
        """Let the next reads take so many bytes together, of headers or of contents."""
        self.allowed, self.header = size, header

    def read(self, size: int) -> bytes:
        self.allowed -= size
        if self.allowed < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER:,} bytes")
        data = self.file.read(size)
        if self.compressed:
            self.check(self.raw.tell(), self.tell())
        if self.header and re.search(rb"\d{1000}", data):  # tarfile takes hours (CVE-2024-6232)
            raise tarfile.ReadError("a header of digits alone")
        return data

    def seek(self, offset: int) -> None:
        if not self.compressed or offset < self.tell():
            self.file.seek(offset)
            return
        while (left := offset - self.tell()) > 0 and self.file.read(min(left, STEP)):
            self.check(self.raw.tell(), self.tell())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *unused: object) -> None:
        self.file.close()
        self.raw.close()


def open_source(path: Path | str, spool_dir: Path | None = None, limits: Limits = LIMITS) -> Source:
    """The source at `path`, its kind told by its first bytes; `spool_dir` is for temporary files.

    Raises ArchiveError if there is nothing, or nothing of a kind that is read here.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, spool_dir, limits)
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ArchiveError(f"{path} is a device or a pipe; name a folder or an archive.")
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be opened ({error.strerror}).") from None
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipSource(path, spool_dir, limits)
    if head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar" or path.suffix == ".tar":
        return TarSource(path, spool_dir, limits)
    raise ArchiveError(
        f"{path} is neither a folder nor a .zip, .tar or .tar.gz archive"
        + (" but empty." if not head else "; unpack it, or fetch it again if its name says so.")
    )
