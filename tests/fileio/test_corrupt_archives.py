"""Archives that are cut short, corrupt or encrypted: what can be read is, the rest is named."""

import contextlib
import gzip
import os
import random
import struct
from pathlib import Path

import pytest

from fileio.archive_source import ArchiveError
from fileio.archives import open_source
from tests.helpers.archive_files import (
    FILES,
    KINDS,
    make,
    make_folder,
    make_tar,
    make_zip,
    read_all,
)


def test_zip_without_its_list_is_a_sentence(tmp_path):
    path = make_zip(tmp_path / "x.zip", FILES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match="download it again"):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"<html>quota exceeded</html>" * 50])
def test_what_is_no_archive_is_a_sentence(content, tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="neither a folder nor"):
        open_source(path)
    with pytest.raises(ArchiveError, match="cannot be opened"):
        open_source(tmp_path / "missing.zip")
    (tmp_path / "x.tgz").write_bytes(gzip.compress(content))
    with (
        pytest.raises(ArchiveError, match="not a tar archive"),
        open_source(tmp_path / "x.tgz") as source,
    ):
        source.entries()


def test_one_corrupt_member_of_a_zip(tmp_path):
    files = {"s/a/1.jpg": os.urandom(999), "s/a/2.jpg": os.urandom(999), "s/a/3.jpg": b"3"}
    path = make_zip(tmp_path / "x.zip", files)
    data = bytearray(path.read_bytes())
    data[data.find(files["s/a/2.jpg"][:20]) + 500] ^= 1
    path.write_bytes(data)
    got, *_ = read_all(path)
    assert got == files | {"s/a/2.jpg": "unreadable"}


def test_an_encrypted_member(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"s/a/1.jpg": b"1", "s/a/2.jpg": b"2"})
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02", 0, data.rfind(b"s/a/2.jpg"))
    local = data.rfind(b"PK\x03\x04", 0, data.find(b"s/a/2.jpg"))
    data[entry + 8] |= 1
    data[local + 6] |= 1
    path.write_bytes(data)
    got, _, skipped, _ = read_all(path)
    assert (got, skipped) == ({"s/a/1.jpg": b"1"}, {"encrypted": 1})


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_cut_tar_gives_what_is_there(kind, tmp_path):
    files = {f"s/{i}/1.jpg": os.urandom(3000) for i in range(8)}
    path = make_tar(tmp_path / f"x.{kind}", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    got, _, _, corruption = read_all(path)
    complete = {name: data for name, data in got.items() if isinstance(data, bytes)}
    assert complete == {name: files[name] for name in complete}
    assert 3 <= len(complete) <= 5
    assert len(got) - len(complete) <= 1
    assert "cut short" in corruption


def test_cut_unsorted_tgz(tmp_path):
    files = {f"s/{9 - i}/1.jpg": os.urandom(3000) for i in range(8)}
    path = make_tar(tmp_path / "x.tgz", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    got, _, _, corruption = read_all(path)
    assert 3 <= sum(isinstance(data, bytes) for data in got.values()) <= 5
    assert corruption


def test_tar_cut_between_members_is_noticed(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1", "s/b/1.jpg": b"2"})
    path.write_bytes(path.read_bytes()[:1024])
    got, _, _, corruption = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "end mark" in corruption


def test_corrupt_header_in_a_tar_is_no_silent_end(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1", "s/b/1.jpg": b"2", "s/c/1.jpg": b"3"})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # in the second header's checksum
    path.write_bytes(data)
    got, _, _, corruption = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "header at byte 1,024" in corruption


def test_wrong_checksum_of_a_tgz_is_noticed(tmp_path):
    path = make_tar(tmp_path / "x.tgz", {"s/a/1.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the CRC stands before the last four bytes
    path.write_bytes(data)
    assert "corrupt" in read_all(path)[3]


def test_negative_size_in_a_tar_does_not_loop(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1", "s/b/1.jpg": b"2"})
    data = bytearray(path.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" + struct.pack(">q", -1024).rjust(11, b"\xff")  # base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    path.write_bytes(data)
    got, _, _, corruption = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert corruption


def test_too_large_is_told_from_the_size_alone(tmp_path):
    files = {"s/a/1.jpg": bytes(1001), "s/a/2.jpg": bytes(1000)}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        path = make(kind, tmp_path / kind, files)
        assert read_all(path, file_bytes=1000)[0] == files | {"s/a/1.jpg": "too_large"}
        assert read_all(path, file_bytes=1001)[0] == files


def test_a_file_that_vanishes_is_counted(tmp_path):
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1", "a/2.jpg": b"2"})
    with open_source(root) as source:
        entries = source.entries()
        Path(entries[0].handle).unlink()
        (_, first), (_, second) = source.read(entries)
    assert isinstance(first, ArchiveError)
    assert second == b"2"


def test_random_corruption_never_escapes(tmp_path):
    """Bytes changed anywhere give images, reasons or an ArchiveError; nothing else."""
    rng = random.Random(0)
    files = {f"s/{i}/1.jpg": rng.randbytes(200) for i in range(4)}
    for kind in ("zip", "tar", "tgz"):
        path = make(kind, tmp_path, files)
        complete = path.read_bytes()
        for _ in range(150):
            data = bytearray(complete)
            for _ in range(rng.randint(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
            with contextlib.suppress(ArchiveError):
                read_all(path)
