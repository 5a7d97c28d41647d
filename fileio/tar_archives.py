"""Tar archives, plain or compressed by gzip, read in place."""

from __future__ import annotations

import gzip
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fileio.archive_source import DAMAGE, LIMITS, ArchiveError, Entry, Limits, Source, decode_name

MAX_HEADER = 1 << 20  # bytes that tar may read between one image and the next
IN_MEMORY = 64 << 20  # an unsorted .tgz is put in order in memory up to here, then on disk
STEP = 1 << 20  # bytes that are passed over at a time


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
