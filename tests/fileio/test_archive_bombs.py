"""Archives made to fill memory, disk or time: they are refused, or take little of any."""

import functools
import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from fileio import archive_source
from fileio.archive_source import ArchiveError, clean_name
from fileio.images import ImageError, decode_image
from tests.helpers.archive_files import FILES, make_tar, make_zip, read_all
from tests.helpers.bounded import within


def declare(path, size, name=b""):
    """Have the last member of a zip (or that called `name`) say that it unpacks to `size` bytes."""
    data = bytearray(path.read_bytes())
    for signature, at, length in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
        position = data.rfind(signature)
        while name and data[position + length : position + length + len(name)] != name:
            position = data.rfind(signature, 0, position)
        data[position + at : position + at + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


@functools.cache
def zeros(how: int) -> bytes:
    """A zip of one member that unpacks to 100 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive, archive.open("s/a/1.jpg", "w") as member:
        for _ in range(100):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("declared", [0, 10, 10 << 20])
@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_that_lies_about_its_size(tmp_path, declared, how):
    """A member that unpacks to more than it says is neither unpacked further nor believed."""
    path = tmp_path / "x.zip"
    path.write_bytes(zeros(how))
    got = within(50, read_all, declare(path, declared))[0]
    assert got == {"s/a/1.jpg": "unreadable" if declared or how == zipfile.ZIP_LZMA else b""}


def test_a_zip_that_says_more_than_it_has(tmp_path):
    path = declare(make_zip(tmp_path / "x.zip", {"s/a/1.jpg": b"1", "s/a/2.jpg": b"2"}), 100 << 20)
    got = within(100, read_all, path)[0]
    assert got["s/a/1.jpg"] == b"1"
    assert got["s/a/2.jpg"] in (b"2", "unreadable")


def test_a_zip_bomb_is_refused_and_a_flag_admits_it(tmp_path):
    files = {f"s/a/{i}.jpg": bytes(30 << 20) for i in range(3)}
    path = make_zip(tmp_path / "x.zip", files)
    with pytest.raises(ArchiveError, match=r"more than 100 times its size.*--max-ratio"):
        within(100, read_all, path)
    assert read_all(path, ratio=2000)[0] == files


@pytest.mark.parametrize("name", ["s/a/1.jpg", "s/list.txt"])
def test_a_tgz_that_expands_without_end_is_refused(tmp_path, name):
    """One member of 200 MB of zeros, whether it is an image or skipped."""
    info = tarfile.TarInfo(name)
    info.size = 200 << 20
    with gzip.open(tmp_path / "x.tgz", "wb", 1) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(bytes(1 << 20))
    with pytest.raises(ArchiveError, match=r"more than 100 times its size.*--max-ratio"):
        within(150, read_all, tmp_path / "x.tgz")
    assert "end mark" in read_all(tmp_path / "x.tgz", ratio=2000, file_bytes=1)[3]


def test_members_of_a_zip_that_overlap_are_skipped(tmp_path):
    """The directory names one compressed block three times over (Fifield, 2019)."""
    path = make_zip(tmp_path / "x.zip", {f"s/a/{i}.jpg": bytes(9000) for i in range(3)})
    data = bytearray(path.read_bytes())
    position = len(data)
    for _ in range(3):
        position = data.rfind(b"PK\x01\x02", 0, position)
        data[position + 42 : position + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    got, _, skipped, _ = read_all(path)
    assert not got
    assert skipped == {"overlapping": 3}
    # One that swallows its neighbour is the only one to go.
    make_zip(path, {f"s/a/{i}.jpg": os.urandom(500) for i in range(3)})
    data = bytearray(path.read_bytes())
    position = data.rfind(b"PK\x01\x02", 0, data.rfind(b"PK\x01\x02"))
    data[position + 20 : position + 24] = struct.pack("<I", 600)
    path.write_bytes(data)
    got, _, skipped, _ = read_all(path)
    assert set(got) == {"s/a/0.jpg", "s/a/2.jpg"}
    assert skipped == {"overlapping": 1}


def test_an_archive_in_an_archive_stays_packed(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", FILES).read_bytes()
    path = make_zip(tmp_path / "x.zip", {"s/a/r.zip": inner, "s/a/r.jpg": inner})
    got, _, skipped, _ = read_all(path)
    assert got == {"s/a/r.jpg": inner}
    assert skipped == {"not_a_picture": 1}
    with pytest.raises(ImageError) as error:
        decode_image(inner)
    assert error.value.status == "not_an_image"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_headers_of_a_tar_without_end(tmp_path, kind):
    """Names of a gigabyte, and a chain of headers that never comes to a file."""
    info = tarfile.TarInfo("s")
    info.type, info.size = kind, 1 << 30
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"})
    complete = path.read_bytes()
    path.write_bytes(complete[:1024] + info.tobuf())
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    got, _, _, corruption = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "headers of more than" in corruption
    info.size = 1024
    path.write_bytes(complete[:1024] + (info.tobuf() + bytes(1024)) * 30_000)
    got, _, _, corruption = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert corruption


def test_a_sparse_map_without_end(tmp_path):
    """An old GNU sparse header may go on in as many blocks as it likes."""
    head = bytearray(tarfile.TarInfo("s/a/0.jpg").tobuf(tarfile.GNU_FORMAT))
    head[156:157] = b"S"
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    block = (b"00000000001\0" * 42 + b"\1").ljust(512, b"\0")
    path = tmp_path / "x.tgz"
    with gzip.open(path, "wb", 1) as file:
        file.write(make_tar(tmp_path / "y.tar", {"s/a/1.jpg": b"1"}).read_bytes()[:1024])
        file.write(bytes(head) + block * 50_000)
    got, _, _, corruption = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "headers of more than" in corruption


def test_global_headers_do_not_pile_up(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(50):
            value = f"{i:03d}x" * 75_000
            info = tarfile.TarInfo(f"s/a/{i}.jpg")
            header = info.create_pax_global_header({f"key{i}": value})
            archive.fileobj.write(header)
            archive.offset += len(header)
            archive.addfile(info)
    tracemalloc.start()
    got, _, _, corruption = read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(got) == 50
    assert not corruption
    assert peak < 5_000_000


def test_a_header_of_digits_is_no_work_for_hours(tmp_path):
    """Python before 3.11.10 looks for a word in it in quadratic time (CVE-2024-6232)."""
    info = tarfile.TarInfo("s")
    info.type, info.size = tarfile.XHDTYPE, 1 << 19
    complete = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}).read_bytes()
    (tmp_path / "x.tar").write_bytes(
        complete[:1024] + info.tobuf() + b"1" * (1 << 19) + bytes(1024)
    )
    got, _, _, corruption = read_all(tmp_path / "x.tar")
    assert got == {"s/a/1.jpg": b"1"}
    assert "digits" in corruption


def test_more_names_than_memory_holds_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_source, "MAX_LIST_BYTES", 5000)
    path = make_zip(tmp_path / "x.zip", {f"s/a/{i}.jpg": b"" for i in range(20)})
    with pytest.raises(ArchiveError, match="names so many files"):
        read_all(path)


def test_useless_names_are_skipped(tmp_path):
    deep, long, null = "d/" * 70 + "1.jpg", "s/" + "n" * 5000 + "/1.jpg", "s/a/1.jpg\0.txt"
    assert {clean_name(name)[1] for name in (deep, long, null)} == {"unsafe_name"}
    got, _, skipped, _ = read_all(
        make_tar(tmp_path / "x.tar", {deep: b"", long: b"", "s/a/1": b""})
    )
    assert list(got) == ["s/a/1"]
    assert skipped == {"unsafe_name": 2}
