"""Read the images of a .zip, .tar, .tar.gz/.tgz or a folder in place, in a fixed order.

    with open_source("data/CASIA-WebFace.zip") as source:
        for entry, data in source.read(source.entries()):
            ...  # data: the file's bytes, or an ArchiveError that says why there are none

Nothing is extracted: names inside an archive are data, never paths that get opened. An entry's
identity is a folder that it lies in (fileio/identities.py). Links are followed as far as they stay
in the source. Whatever is no image file (devices, `..` and absolute names, lists, system files,
empty folders) or cannot be read (encrypted members, links that lead outside) is skipped and counted
by reason in `source.skipped`. Archive bombs are refused, by the `Limits` that --max-file-mb and
--max-ratio of pre_process.py raise. An archive inside an archive is no image and stays packed.
"""

from __future__ import annotations

import bz2
import copy
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fileio.archive_source import (
    ARCHIVE_ERRORS,
    DEFAULT_LIMITS,
    MAX_NAME_LENGTH,
    ArchiveError,
    Entry,
    Limits,
    Member,
    Source,
    decode_name,
    link_target,
)
from fileio.tar_archives import TarSource

DEFLATE_MAX_RATIO = 1032  # Deflate emits at most 258 bytes for 2 bits
LOCAL_HEADER_BYTES = 30  # before a zip's member, without its name and extra field
ENCRYPTED_FLAG, UTF8_FLAG = 0x1, 0x800  # of a member: its data, its name (APPNOTE.TXT, 4.4.4)
METHODS_READ = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
METHOD_NAMES = {9: "deflate64", 93: "zstandard", 95: "xz", 98: "ppmd"}  # APPNOTE.TXT, 4.4.5
PACKING_BYTES = 1 << 16  # what packing may add to a file that cannot be packed
LZMA_MEMORY = 256 << 20  # bytes that an LZMA dictionary may take


class FolderSource(Source):
    """A folder of identity folders; links are followed as far as they stay in it."""

    def _members(self) -> Iterator[Member]:
        root = os.path.realpath(self.path)
        # Paths inside the source, each with the real folders that it leads through.
        to_visit: list[tuple[str, tuple[str, ...]]] = [("", (root,))]
        while to_visit:
            folder, way = to_visit.pop()
            try:
                items = list(os.scandir(self.path / folder))
            except OSError:
                yield Member(_as_text(folder), "unreadable_folder")
                continue
            for item in items:
                path = f"{folder}/{item.name}" if folder else item.name
                is_link = item.is_symlink()
                real = os.path.realpath(item.path) if is_link else way[-1] + os.sep + item.name
                member = self._member(item, path, real, root, way)
                if member is None:
                    continue
                if member.kind == "folder":
                    to_visit.append((path, (*way, real)))
                yield member

    def _member(
        self, item: os.DirEntry, path: str, real: str, root: str, way: tuple[str, ...]
    ) -> Member | None:
        """One item of a folder; None if it was deleted in the meantime."""
        name = _as_text(path)
        if not _is_inside(real, root):
            return Member(name, "link_outside")
        try:
            status = item.stat()
        except OSError:
            return Member(name, "broken_link") if item.is_symlink() else None
        if stat.S_ISDIR(status.st_mode):
            is_loop = any(_is_inside(around, real) for around in way)
            return Member(name, "link_loop" if is_loop else "folder")
        if stat.S_ISREG(status.st_mode):
            return Member(name, "file", status.st_size, item.path, int(status.st_mtime))
        return Member(name, "not_a_regular_file")

    def _read(self, entries: list[Entry]) -> Iterator[bytes | ArchiveError]:
        for entry in entries:
            try:
                with Path(entry.handle).open("rb") as file:
                    # The size is the one that was listed: the file may have grown since, past
                    # the limit on files.
                    yield file.read(entry.size)
            except OSError as error:
                yield self._error(entry, error)


def _is_inside(path: str, folder: str) -> bool:
    return f"{path}{os.sep}".startswith(folder.rstrip(os.sep) + os.sep)


def _as_text(path: str) -> str:
    """A path of the file system, of whatever encoding, as the same text as in an archive."""
    return decode_name(os.fsencode(path))


class ZipSource(Source):
    """A .zip archive, read through its central directory.

    The directory stands at the end and is the list of members; each member has a second header of
    its own (the local one) before its data. Both are untrusted, and they need not agree.
    """

    STAMP = "crc32"

    def __init__(self, path: Path, *options: Any, **keywords: Any):
        super().__init__(path, *options, **keywords)
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
            elif file_type not in (0, stat.S_IFREG, stat.S_IFLNK):
                yield Member(name, "not_a_regular_file")
            elif info.header_offset in overlapping:
                yield Member(name, "overlapping")
            elif info.flag_bits & ENCRYPTED_FLAG:
                yield Member(name, "encrypted")
            elif info.compress_type not in METHODS_READ:
                method = METHOD_NAMES.get(info.compress_type, info.compress_type)
                yield Member(name, f"packed_by_{method}")
            elif file_type == stat.S_IFLNK:
                yield self._link(name, info)
            else:
                yield Member(name, "file", info.file_size, info, info.CRC)

    def _link(self, name: str, info: zipfile.ZipInfo) -> Member:
        """A symbolic link, whose data are its target."""
        if info.file_size > MAX_NAME_LENGTH:
            return Member(name, "broken_link")
        (target,) = self._read([Entry(name, "", info.file_size, info)])
        if isinstance(target, ArchiveError):
            return Member(name, "broken_link")
        return Member(name, "link", 0, link_target(name, decode_name(target)))

    def _list(self) -> list[Entry]:
        entries = super()._list()
        # Too large files are never unpacked, so they do not count.
        infos = [entry.handle for entry in entries if entry.size <= self.limits.file_bytes]
        packed = sum(info.compress_size for info in infos)
        # A member that claims more than Deflate can produce is corrupt, not a bomb: reading it
        # will say so.
        unpacked = sum(
            min(info.file_size, DEFLATE_MAX_RATIO * (info.compress_size + 1))
            if info.compress_type == zipfile.ZIP_DEFLATED
            else info.file_size
            for info in infos
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
            try:
                if info.compress_type in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
                    yield self._unpack(info)
                    continue
                with self.zip.open(info) as file:
                    # Always with a size: without one, zipfile unpacks all there is, up to 2 GB,
                    # and then cuts it to the declared size. The CRC is checked when that size is
                    # reached.
                    yield file.read(entry.size)
            except ARCHIVE_ERRORS as error:
                yield self._error(entry, error)

    def _unpack(self, info: zipfile.ZipInfo) -> bytes:
        """A member packed by bzip2 or LZMA, which zipfile would unpack without a limit."""
        if info.compress_size > info.file_size + PACKING_BYTES:
            raise zipfile.BadZipFile("it is longer packed than unpacked")
        as_stored = copy.copy(info)
        as_stored.compress_type, as_stored.file_size = zipfile.ZIP_STORED, info.compress_size
        del as_stored.CRC  # that of the unpacked data
        with self.zip.open(as_stored) as file:
            packed = file.read(info.compress_size)
        if info.compress_type == zipfile.ZIP_BZIP2:
            unpacker: Any = bz2.BZ2Decompressor()
        else:
            # A version (2) and the length of the properties (2) precede those (5: APPNOTE.TXT,
            # 5.8.8); a .lzma file has the length unpacked after them, or -1 if an end mark tells.
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY)
            packed = packed[4:9] + b"\xff" * 8 + packed[9:]
        data = unpacker.decompress(packed, info.file_size)
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile("its checksum is wrong")
        return data

    def close(self) -> None:
        """Close the archive."""
        self.zip.close()


def open_source(
    path: Path | str,
    spool_dir: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    identity_level: str = "auto",
) -> Source:
    """The source at `path`, its format told by its first bytes; `spool_dir` is for temporary files.

    `identity_level` says which folder is an image's identity (fileio/identities.py).

    Raises ArchiveError if there is nothing, or nothing in a format that is known.
    """
    path = Path(path)
    options = (path, spool_dir, limits, identity_level)
    if path.is_dir():
        return FolderSource(*options)
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ArchiveError(f"{path} is a device or a pipe; name a folder or an archive.")
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be opened ({error.strerror}).") from None
    # A zip begins with a member's local header, or with the end record if it has no members.
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipSource(*options)
    # gzip's magic number, or "ustar" at byte 257; tars older than POSIX have no magic at all.
    if head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar" or path.suffix == ".tar":
        return TarSource(*options)
    if not head:
        raise ArchiveError(f"{path} is empty, neither a folder nor an archive; download it again.")
    raise ArchiveError(
        f"{path} is neither a folder nor a .zip, .tar or .tar.gz archive; unpack it, or download "
        "it again if its name says that it is one."
    )
