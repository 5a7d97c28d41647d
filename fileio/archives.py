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

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fileio.archive_source import (
    DAMAGE,
    LIMITS,
    ArchiveError,
    Entry,
    Limits,
    Source,
    Tally,
    decode_name,
)
from fileio.tar_archives import TarSource

__all__ = ["ArchiveError", "Entry", "Limits", "Source", "Tally", "open_source"]

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
