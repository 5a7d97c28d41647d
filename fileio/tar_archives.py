"""Tar archives, plain or compressed by gzip, read in place.

A tar is a sequence of blocks of 512 bytes: for each member a header (name, size, type, checksum),
then its data, padded to whole blocks; two blocks of zeros end it. Some headers come in several
members: a long name, a pax header or a sparse map precede the member that they describe. There is
no list of contents, so `entries` walks through the whole file.
"""

from __future__ import annotations

import gzip
import itertools
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fileio.archive_source import (
    ARCHIVE_ERRORS,
    ArchiveError,
    Entry,
    Member,
    Source,
    decode_name,
    link_target,
)

MAX_HEADER_BYTES = 1 << 20  # what the headers of one member may take, long names and maps included
MAX_SPOOL_MEMORY = 64 << 20  # an unsorted .tgz is sorted in memory up to this size, then on disk
SEEK_BLOCK = 1 << 20  # bytes that are unpacked at a time to move forward


class TarSource(Source):
    """A .tar or .tar.gz archive.

    In a compressed one, moving back means unpacking from the beginning. It is unpacked once for the
    list; images that stand in sorted order (as LFW's do) are then streamed. Others are copied, in
    the archive's order, into a temporary file without a name (in memory if small), which holds
    only images and vanishes with the process, even if that is killed.
    """

    def __init__(self, path: Path, *options: Any, **keywords: Any):
        super().__init__(path, *options, **keywords)
        with path.open("rb") as file:
            self.compressed = file.read(2) == b"\x1f\x8b"

    def _open(self) -> _Stream:
        return _Stream(self.path, self.compressed, self._refuse_bomb)

    def _members(self) -> Iterator[Member]:
        with self._open() as file:
            try:
                tar = tarfile.TarFile(fileobj=file)
            except ARCHIVE_ERRORS as error:
                raise ArchiveError(
                    f"{self.path} is not a tar archive that can be read ({error}); download it "
                    "again."
                ) from None
            try:
                last_offset = -1
                while (info := tar.next()) is not None:
                    # A negative size would lead back to an earlier header, in an endless loop.
                    if info.size < 0 or info.offset <= last_offset:
                        raise tarfile.ReadError(
                            f"the header at byte {info.offset:,} makes no sense"
                        )
                    last_offset = info.offset
                    # TarFile remembers all members and all that global headers say of them, which
                    # grows without limit; nothing here needs either.
                    tar.members, tar.pax_headers = [], {}
                    file.allow(MAX_HEADER_BYTES, header=True)
                    yield self._member(info)
                file.allow(MAX_HEADER_BYTES)
                self._check_end(file, tar.offset)
            except ARCHIVE_ERRORS as error:
                self.corruption = (
                    f"{self.path} is corrupt or cut short ({error or 'no more data'})."
                )

    def _member(self, info: tarfile.TarInfo) -> Member:
        # tarfile decodes as UTF-8 and keeps what is none of it as surrogates: back to bytes.
        name = decode_name(info.name.encode("utf-8", "surrogateescape"))
        if info.isdir():
            return Member(name, "folder")
        if info.issym() or info.islnk():
            # A hard link names its target from the root, a symbolic one from its own folder.
            target = decode_name(info.linkname.encode("utf-8", "surrogateescape"))
            return Member(name, "link", 0, link_target(name if info.issym() else "", target))
        if info.isreg() and not info.issparse():
            return Member(name, "file", info.size, info.offset_data, int(info.mtime))
        return Member(name, "not_a_regular_file")

    def _check_end(self, file: _Stream, offset: int) -> None:
        """Raise ReadError unless the archive ends as it should.

        tarfile takes a corrupt header for the end, silently, and so all images after it for absent.
        """
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            raise tarfile.ReadError("its end mark is missing")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {offset:,} makes no sense")
        if self.compressed:
            file.seek(sys.maxsize)  # to gzip's CRC, which it checks when it comes to it

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        offsets = [entry.handle for entry in entries]
        # Strictly: of two links to one file, the second would lead back.
        if not self.compressed or all(a < b for a, b in itertools.pairwise(offsets)):
            with self._open() as file:
                yield from self._read_from(file, entries)
        else:
            yield from self._read_spooled(entries)

    def _read_spooled(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        """Sort through a temporary file: one pass over the archive, then random access."""
        total = sum(entry.size for entry in entries)
        folder = self.spool_dir or Path(tempfile.gettempdir())
        if total > MAX_SPOOL_MEMORY and total > shutil.disk_usage(folder).free:
            raise ArchiveError(
                f"{self.path} is not in sorted order; sorting it takes {total:,} free bytes in "
                f"{folder}."
            )
        with tempfile.SpooledTemporaryFile(max_size=MAX_SPOOL_MEMORY, dir=folder) as spool:
            positions: dict[int, int] = {}  # in the spool, by offset in the archive
            errors: dict[int, ArchiveError] = {}
            once = {entry.handle: entry for entry in entries}  # links share their file's offset
            by_offset = [once[offset] for offset in sorted(once)]
            with self._open() as file:
                for entry, data in zip(by_offset, self._read_from(file, by_offset), strict=True):
                    if isinstance(data, ArchiveError):
                        errors[entry.handle] = data
                    else:
                        positions[entry.handle] = spool.tell()
                        spool.write(data)
            for entry in entries:
                if entry.handle in errors:
                    yield errors[entry.handle]
                else:
                    spool.seek(positions[entry.handle])
                    yield spool.read(entry.size)

    def _read_from(self, file: _Stream, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        stream_error: Exception | None = None
        for entry in entries:
            data = b""
            if stream_error is None:
                try:
                    file.seek(entry.handle)
                    file.allow(entry.size)
                    data = file.read(entry.size)
                except ARCHIVE_ERRORS as error:
                    # A compressed stream gives nothing more after the first corrupt byte.
                    stream_error = error
            if len(data) == entry.size:
                yield data
            else:
                yield self._error(entry, stream_error or "the archive ends before it does")


class _Stream:
    """The bytes of a tar, unpacked; reads no more than was allowed, and checks for bombs.

    The sizes in headers are untrusted: tarfile would read a name of a gigabyte into memory, and
    follow long names, pax headers and sparse maps that never end. So each read is taken from a
    budget, set by `allow`. `check` is called with the bytes packed and unpacked so far.
    """

    def __init__(self, path: Path, compressed: bool, check: Callable[[int, int], None]):
        self.raw = path.open("rb")
        self.compressed, self.check = compressed, check
        self.file: Any = gzip.open(self.raw) if compressed else self.raw  # noqa: SIM115
        self.tell = self.file.tell
        self.allow(MAX_HEADER_BYTES, header=True)

    def allow(self, size: int, header: bool = False) -> None:
        """Let the next reads take `size` bytes together, of headers or of contents."""
        self.budget, self.header = size, header

    def read(self, size: int) -> bytes:
        self.budget -= size
        if self.budget < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES:,} bytes")
        data = self.file.read(size)
        if self.compressed:
            self.check(self.raw.tell(), self.tell())
        # tarfile's regular expression for pax headers takes hours on a long run of digits, in
        # Python before 3.11.10 (CVE-2024-6232).
        if self.header and re.search(rb"\d{1000}", data):
            raise tarfile.ReadError("a header of digits alone")
        return data

    def seek(self, offset: int) -> None:
        if not self.compressed or offset < self.tell():
            self.file.seek(offset)
            return
        # Forward in a compressed file means unpacking, in blocks: GzipFile.seek would unpack
        # without end and never call `check`.
        while (left := offset - self.tell()) > 0 and self.file.read(min(left, SEEK_BLOCK)):
            self.check(self.raw.tell(), self.tell())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *unused: object) -> None:
        self.file.close()
        self.raw.close()
