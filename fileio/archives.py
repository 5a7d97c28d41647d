"""Read the images of a .zip, .tar, .tar.gz/.tgz or a folder in place, in a fixed order.

    with open_source("data/CASIA-WebFace.zip") as source:
        for entry, data in source.read(source.entries()):
            ...  # data: the file's bytes, or an ArchiveError that says why there are none

Nothing is extracted: names inside an archive are data, never paths that get opened. An entry's
identity is the name of the folder it lies in. Whatever is no image file (links, devices, `..` and
absolute names, lists, system files, empty folders) is skipped and counted by reason in
`source.skipped`. Archive bombs are refused, by the `Limits` that --max-file-mb and --max-ratio of
pre_process.py raise. An archive inside an archive is no image and stays packed.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fileio.archive_source import (
    ARCHIVE_ERRORS,
    DEFAULT_LIMITS,
    ArchiveError,
    Entry,
    Limits,
    Member,
    Source,
    decode_name,
)
from fileio.tar_archives import TarSource

DEFLATE_MAX_RATIO = 1032  # Deflate emits at most 258 bytes for 2 bits
LOCAL_HEADER_BYTES = 30  # before a zip's member, without its name and extra field
UTF8_FLAG = 0x800  # bit 11 of a member's flags: its name is UTF-8 (APPNOTE.TXT, 4.4.4)


class FolderSource(Source):
    """A folder of identity folders; links in it are not followed."""

    def _members(self) -> Iterator[Member]:
        to_visit = [""]  # paths inside the source
        while to_visit:
            folder = to_visit.pop()
            try:
                items = list(os.scandir(self.path / folder))
            except OSError:
                yield Member(folder, "unreadable_folder")
                continue
            for item in items:
                name = f"{folder}/{item.name}" if folder else item.name
                try:
                    status = item.stat(follow_symlinks=False)
                except OSError:  # deleted in the meantime
                    continue
                if stat.S_ISLNK(status.st_mode):
                    yield Member(name, "link")
                elif stat.S_ISDIR(status.st_mode):
                    to_visit.append(name)
                    yield Member(name, "folder")
                elif stat.S_ISREG(status.st_mode):
                    yield Member(name, "file", status.st_size, item.path)
                else:
                    yield Member(name, "not_a_regular_file")

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            try:
                with Path(entry.handle).open("rb") as file:
                    # The size is the one that was listed: the file may have grown since, past
                    # the limit on files.
                    yield file.read(entry.size)
            except OSError as error:
                yield self._error(entry, error)


class ZipSource(Source):
    """A .zip archive, read through its central directory.

    The directory stands at the end and is the list of members; each member has a second header of
    its own (the local one) before its data. Both are untrusted, and they need not agree.
    """

    def __init__(self, path: Path, spool_dir: Path | None = None, limits: Limits = DEFAULT_LIMITS):
        super().__init__(path, spool_dir, limits)
        try:
            self.zip = zipfile.ZipFile(path)
        except ARCHIVE_ERRORS as error:
            raise ArchiveError(
                f"{path} is cut short or corrupt: its list of contents cannot be read ({error}); "
                "download it again."
            ) from None

    def _members(self) -> Iterator[Member]:
        overlapping = self._overlapping()
        for info in self.zip.infolist():
            name = info.filename
            if not info.flag_bits & UTF8_FLAG:
                # Python decoded the bytes as cp437, as the standard says; few tools keep to it.
                name = decode_name(info.orig_filename.encode("cp437", "surrogateescape"))
            if "/" not in name:
                name = name.replace("\\", "/")  # written by some Windows tools
            # The upper half of the attributes is the Unix file mode, 0 from other systems.
            file_type = stat.S_IFMT(info.external_attr >> 16)
            if name.endswith("/"):
                yield Member(name, "folder")
            elif file_type == stat.S_IFLNK:
                yield Member(name, "link")
            elif file_type not in (0, stat.S_IFREG):
                yield Member(name, "not_a_regular_file")
            elif info.header_offset in overlapping:
                yield Member(name, "overlapping")
            else:
                yield Member(name, "file", info.file_size, info)

    def _list(self) -> list[Entry]:
        entries = super()._list()
        # Too large files are never unpacked, so they do not count.
        infos = [entry.handle for entry in entries if entry.size <= self.limits.file_bytes]
        packed = sum(info.compress_size for info in infos)
        # A member that claims more than Deflate can produce is corrupt, not a bomb: reading it
        # will say so.
        unpacked = sum(
            min(info.file_size, DEFLATE_MAX_RATIO * (info.compress_size + 1)) for info in infos
        )
        self._refuse_bomb(packed, unpacked)
        return entries

    def _overlapping(self) -> set[int]:
        """Offsets of the members that reach into the next one, as only bombs and corruption do.

        The densest bombs (Fifield, "A better zip bomb", WOOT 2019) have thousands of directory
        entries for one block of compressed data; without overlaps, the total is bounded by the
        size of the archive.
        """
        infos = sorted(self.zip.infolist(), key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos] + [self.zip.start_dir]
        return {
            info.header_offset
            for info, end in zip(infos, ends[1:], strict=True)
            if info.header_offset + LOCAL_HEADER_BYTES + info.compress_size > end
        }

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            info = entry.handle
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks bzip2 and LZMA without a limit; images gain nothing by them.
                yield self._error(entry, "it is not compressed by Deflate")
                continue
            try:
                with self.zip.open(info) as file:
                    # Always with a size: without one, zipfile unpacks all there is, up to 2 GB,
                    # and then cuts it to the declared size. The CRC is checked when that size is
                    # reached.
                    yield file.read(entry.size)
            except ARCHIVE_ERRORS as error:
                yield self._error(entry, error)

    def close(self) -> None:
        """Close the archive."""
        self.zip.close()


def open_source(
    path: Path | str, spool_dir: Path | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """The source at `path`, its format told by its first bytes; `spool_dir` is for temporary files.

    Raises ArchiveError if there is nothing, or nothing in a format that is known.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path, spool_dir, limits)
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ArchiveError(f"{path} is a device or a pipe; name a folder or an archive.")
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be opened ({error.strerror}).") from None
    # A zip begins with a member's local header, or with the end record if it has no members.
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipSource(path, spool_dir, limits)
    # gzip's magic number, or "ustar" at byte 257; tars older than POSIX have no magic at all.
    if head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar" or path.suffix == ".tar":
        return TarSource(path, spool_dir, limits)
    if not head:
        raise ArchiveError(f"{path} is empty, neither a folder nor an archive; download it again.")
    raise ArchiveError(
        f"{path} is neither a folder nor a .zip, .tar or .tar.gz archive; unpack it, or download "
        "it again if its name says that it is one."
    )
