"""archives.py on archives made here byte by byte, whole, malicious and broken."""

import contextlib
import functools
import gzip
import io
import os
import random
import socket
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fileio import archive_source, tar_archives
from fileio.archive_source import ArchiveError, Entry, Limits, clean_name, decode_name
from fileio.archives import open_source
from fileio.images import ImageError, decode_image
from tests.helpers.bounded import within

FILES = {
    "set/b/2.jpg": b"b two",
    "set/b/1.jpg": b"b one" * 1000,
    "set/a/3.jpg": b"",
    "set/张三/照片.jpg": b"chinese",
}
# by (identity, name); 张 comes after every ASCII letter
SORTED = ["set/a/3.jpg", "set/b/1.jpg", "set/b/2.jpg", "set/张三/照片.jpg"]


def make_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data, **options)
    return path


def make_tar(path, files, extra=()):
    """A tar; `extra` are (TarInfo) members without data."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def make_folder(path, files):
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def make(kind, folder, files):
    if kind == "folder":
        return make_folder(folder / "source", files)
    return (make_zip if kind == "zip" else make_tar)(folder / f"source.{kind}", files)


def read_all(path, spool_dir=None, **limits):
    """{name: bytes or the reason's word}, the sorted names, and the source's tally and damage."""
    with open_source(path, spool_dir, Limits(**limits)) as source:
        entries = source.entries()
        got = {
            entry.name: data.status if isinstance(data, ArchiveError) else data
            for entry, data in source.read(entries)
        }
        return got, [e.name for e in entries], source.skipped.counts, source.corruption


KINDS = ["zip", "tar", "tar.gz", "tgz", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images_in_sorted_order(kind, tmp_path):
    got, names, passed, damage = read_all(make(kind, tmp_path, FILES))
    assert names == SORTED == list(got)
    assert got == FILES
    assert not passed
    assert not damage


@pytest.mark.parametrize("kind", KINDS)
def test_any_subset_can_be_read(kind, tmp_path):
    with open_source(make(kind, tmp_path, FILES)) as source:
        some = [e for e in source.entries() if e.identity == "b"]
        for _ in range(2):
            assert [data for _, data in source.read(reversed(some))] == [b"b one" * 1000, b"b two"]


@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_unsorted_tgz_is_put_in_order(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_archives, "MAX_SPOOL_MEMORY", in_memory)
    files = {f"set/{i * 7 % 10}/{i}.jpg": os.urandom(50) for i in range(30)}
    path = make_tar(tmp_path / "x.tgz", files)
    spool = tmp_path / "spool"
    spool.mkdir()
    got, names, _, _ = read_all(path, spool)
    assert names == sorted(files, key=lambda n: (n.split("/")[1], n)) != list(files)
    assert got == files
    assert not list(spool.iterdir())


def test_unsorted_tgz_without_room_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_archives, "MAX_SPOOL_MEMORY", 1)
    monkeypatch.setattr(tar_archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    path = make_tar(tmp_path / "x.tgz", {"s/b/1.jpg": b"12345", "s/a/1.jpg": b"12345"})
    with pytest.raises(ArchiveError, match="takes 10 free bytes"):
        read_all(path)


def test_sorted_tgz_is_streamed_once(tmp_path, monkeypatch):
    files = {f"s/{i:03d}/1.jpg": os.urandom(100) for i in range(50)}
    with open_source(make_tar(tmp_path / "x.tgz", files)) as source:
        source.entries()
        opened = []
        real = gzip.open
        monkeypatch.setattr(tar_archives.gzip, "open", lambda p: opened.append(p) or real(p))
        assert {e.name: d for e, d in source.read(source.entries())} == files
        assert len(opened) == 1


def test_folders_of_one_name_are_not_merged(tmp_path):
    files = {"x/001/a.jpg": b"1", "y/001/a.jpg": b"2", "y/002/a.jpg": b"3"}
    with open_source(make_zip(tmp_path / "x.zip", files)) as source:
        identities = {e.name: e.identity for e in source.entries()}
    assert identities == {
        "x/001/a.jpg": "x/001",
        "y/001/a.jpg": "y/001",
        "y/002/a.jpg": "002",
    }


def test_a_folder_in_a_folder_is_an_identity_of_its_own(tmp_path):
    files = {"s/001/a.jpg": b"1", "s/001/more/b.jpg": b"2"}
    with open_source(make_folder(tmp_path / "s", files)) as source:
        assert [(e.identity, e.name) for e in source.entries()] == [
            ("001", "s/001/a.jpg"),
            ("more", "s/001/more/b.jpg"),
        ]


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_names_are_never_paths(kind, tmp_path):
    evil = {
        "../../up/1.jpg": b"x",
        "/abs/1.jpg": b"x",
        "s/../../../1.jpg": b"x",
        "C:/windows/1.jpg": b"x",
        "s/a/1.jpg": b"good",
        "./s/a//2.jpg": b"good too",
    }
    inner = tmp_path / "deep" / "deeper"
    inner.mkdir(parents=True)
    path = make(kind, inner, evil)
    before = sorted(tmp_path.rglob("*"))
    got, _, passed, _ = read_all(path, inner)
    assert got == {"s/a/1.jpg": b"good", "s/a/2.jpg": b"good too"}
    assert passed == {"unsafe_name": 4}
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_a_tar(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    extra = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"s/a/{kind.decode()}.jpg")
        info.type, info.linkname = kind, str(secret)
        extra.append(info)
    got, _, passed, _ = read_all(make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}, extra))
    assert got == {"s/a/1.jpg": b"1"}
    assert passed == {"link": 2, "not_a_regular_file": 2}


def test_links_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("s/a/link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
        archive.writestr("s/a/1.jpg", b"1")
    got, _, passed, _ = read_all(tmp_path / "x.zip")
    assert got == {"s/a/1.jpg": b"1"}
    assert passed == {"link": 1}


def test_links_and_pipes_in_a_folder(tmp_path):
    outside = make_folder(tmp_path / "outside", {"a/secret.jpg": b"secret"})
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1"})
    (root / "a" / "link.jpg").symlink_to(outside / "a" / "secret.jpg")
    (root / "linked").symlink_to(outside)
    os.mkfifo(root / "a" / "pipe.jpg")
    got, _, passed, _ = read_all(root)
    assert got == {"a/1.jpg": b"1"}
    assert passed == {"link": 2, "not_a_regular_file": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_image_is_counted(kind, tmp_path):
    files = {
        "s/a/1.jpg": b"1",
        "s/a/.DS_Store": b"",
        "__MACOSX/s/a/._1.jpg": b"",
        "s/a/Thumbs.db": b"",
        "s/list.txt": b"",
        "loose.jpg": b"",
        "s/a/no_suffix": b"tried as an image",
    }
    got, _, passed, _ = read_all(make(kind, tmp_path, files))
    assert set(got) == {"s/a/1.jpg", "s/a/no_suffix"}
    assert passed == {"system_file": 3, "not_a_picture": 1, "no_identity_folder": 1}


def test_empty_folders_are_counted(tmp_path):
    root = make_folder(tmp_path / "root", {"s/a/1.jpg": b"1"})
    (root / "s" / "empty" / "inner").mkdir(parents=True)
    info = tarfile.TarInfo("s/empty/inner")
    info.type = tarfile.DIRTYPE
    tar = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}, [info])
    zipped = make_zip(tmp_path / "x.zip", {"s/a/1.jpg": b"1", "s/empty/inner/": b""})
    for path in (root, tar, zipped):
        got, _, passed, _ = read_all(path)
        assert got == {"s/a/1.jpg": b"1"}
        assert passed == {"empty_folder": 1}


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_name_twice_means_the_later_one(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
        for data in (b"old", b"newer"):
            info = tarfile.TarInfo("s/a/1.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    got, _, passed, _ = read_all(path)
    assert got == {"s/a/1.jpg": b"newer"}
    assert passed == {"duplicate_name": 1}


def test_chinese_names_of_all_encodings(tmp_path):
    path = tmp_path / "x.zip"
    # A Windows tool writes GBK without the UTF-8 flag: patch it into a name of the same length.
    name = "s/张三/1.jpg".encode("gbk")
    make_zip(path, {"s/XXXX/1.jpg": b"1", "s/李四/1.jpg": b"2"})
    path.write_bytes(path.read_bytes().replace(b"s/XXXX/1.jpg", name))
    got, *_ = read_all(path)
    assert got == {"s/张三/1.jpg": b"1", "s/李四/1.jpg": b"2"}
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w", encoding="gbk", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("s/王五/1.jpg")
        archive.addfile(info)
    assert list(read_all(tar)[0]) == ["s/王五/1.jpg"]


def test_names_that_are_no_text_at_all_can_still_be_written(tmp_path):
    root = tmp_path / "root"
    make_folder(root, {os.fsdecode(b"a/\xff\xfe.jpg"): b"1"})
    got, *_ = read_all(root)
    assert list(got.values()) == [b"1"]
    assert [name.encode("utf-8") for name in got]


def test_decode_and_clean_name():
    assert decode_name("é/张".encode()) == "é/张"
    assert decode_name("张/a".encode("gbk") + b"/Jos\x82") == "张/a/José"  # cp437's é
    assert clean_name("./a//b.jpg") == ("a/b.jpg", "")
    assert clean_name("a/../b.jpg")[1] == "unsafe_name"
    assert clean_name("a/..b/c.jpg")[1] == "system_file"
    assert clean_name("d:a.jpg")[1] == "unsafe_name"


# ------------------------------------------------------------------------------ broken archives


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


def test_one_damaged_member_of_a_zip(tmp_path):
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
    assert read_all(path)[0] == {"s/a/1.jpg": b"1", "s/a/2.jpg": "unreadable"}


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_cut_tar_gives_what_is_there(kind, tmp_path):
    files = {f"s/{i}/1.jpg": os.urandom(3000) for i in range(8)}
    path = make_tar(tmp_path / f"x.{kind}", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    got, _, _, damage = read_all(path)
    whole = {name: data for name, data in got.items() if isinstance(data, bytes)}
    assert whole == {name: files[name] for name in whole}
    assert 3 <= len(whole) <= 5
    assert len(got) - len(whole) <= 1
    assert "cut short" in damage


def test_cut_unsorted_tgz(tmp_path):
    files = {f"s/{9 - i}/1.jpg": os.urandom(3000) for i in range(8)}
    path = make_tar(tmp_path / "x.tgz", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 55 // 100])
    got, _, _, damage = read_all(path)
    assert 3 <= sum(isinstance(data, bytes) for data in got.values()) <= 5
    assert damage


def test_tar_cut_between_members_is_noticed(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1", "s/b/1.jpg": b"2"})
    path.write_bytes(path.read_bytes()[:1024])
    got, _, _, damage = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "end mark" in damage


def test_spoilt_header_in_a_tar_is_no_silent_end(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1", "s/b/1.jpg": b"2", "s/c/1.jpg": b"3"})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # in the second header's check sum
    path.write_bytes(data)
    got, _, _, damage = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "header at byte 1,024" in damage


def test_wrong_check_sum_of_a_tgz_is_noticed(tmp_path):
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
    got, _, _, damage = read_all(path)
    assert got == {"s/a/1.jpg": b"1"}
    assert damage


def test_too_large_is_told_from_the_size_alone(tmp_path):
    files = {"s/a/1.jpg": bytes(1001), "s/a/2.jpg": bytes(1000)}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        path = make(kind, tmp_path / kind, files)
        assert read_all(path, file_bytes=1000)[0] == files | {"s/a/1.jpg": "too_large"}
        assert read_all(path, file_bytes=1001)[0] == files


def declare(path, size, name=b""):
    """Have the last member of a zip (or that called `name`) say that it unpacks to `size` bytes."""
    data = bytearray(path.read_bytes())
    for signature, at, length in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
        place = data.rfind(signature)
        while name and data[place + length : place + length + len(name)] != name:
            place = data.rfind(signature, 0, place)
        data[place + at : place + at + 4] = struct.pack("<I", size)
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


# ------------------------------------------------------------------------------ bombs


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


def test_members_of_a_zip_that_overlap_are_passed_over(tmp_path):
    """The directory names one compressed block three times over (Fifield, 2019)."""
    path = make_zip(tmp_path / "x.zip", {f"s/a/{i}.jpg": bytes(9000) for i in range(3)})
    data = bytearray(path.read_bytes())
    place = len(data)
    for _ in range(3):
        place = data.rfind(b"PK\x01\x02", 0, place)
        data[place + 42 : place + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    got, _, passed, _ = read_all(path)
    assert not got
    assert passed == {"overlapping": 3}
    # One that merely swallows its neighbour is the only one to go.
    make_zip(path, {f"s/a/{i}.jpg": os.urandom(500) for i in range(3)})
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02", 0, data.rfind(b"PK\x01\x02"))
    data[place + 20 : place + 24] = struct.pack("<I", 600)
    path.write_bytes(data)
    got, _, passed, _ = read_all(path)
    assert set(got) == {"s/a/0.jpg", "s/a/2.jpg"}
    assert passed == {"overlapping": 1}


def test_an_archive_in_an_archive_stays_packed(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", FILES).read_bytes()
    path = make_zip(tmp_path / "x.zip", {"s/a/r.zip": inner, "s/a/r.jpg": inner})
    got, _, passed, _ = read_all(path)
    assert got == {"s/a/r.jpg": inner}
    assert passed == {"not_a_picture": 1}
    with pytest.raises(ImageError) as error:
        decode_image(inner)
    assert error.value.status == "not_an_image"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_headers_of_a_tar_without_end(tmp_path, kind):
    """Names of a gigabyte, and a chain of headers that never comes to a file."""
    info = tarfile.TarInfo("s")
    info.type, info.size = kind, 1 << 30
    path = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"})
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + info.tobuf())
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    got, _, _, damage = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "headers of more than" in damage
    info.size = 1024
    path.write_bytes(whole[:1024] + (info.tobuf() + bytes(1024)) * 30_000)
    got, _, _, damage = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert damage


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
    got, _, _, damage = within(100, read_all, path)
    assert got == {"s/a/1.jpg": b"1"}
    assert "headers of more than" in damage


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
    got, _, _, damage = read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(got) == 50
    assert not damage
    assert peak < 5_000_000


def test_a_header_of_digits_is_no_work_for_hours(tmp_path):
    """Python before 3.11.10 looks for a word in it in quadratic time (CVE-2024-6232)."""
    info = tarfile.TarInfo("s")
    info.type, info.size = tarfile.XHDTYPE, 1 << 19
    whole = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:1024] + info.tobuf() + b"1" * (1 << 19) + bytes(1024))
    got, _, _, damage = read_all(tmp_path / "x.tar")
    assert got == {"s/a/1.jpg": b"1"}
    assert "digits" in damage


def test_more_names_than_memory_holds_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_source, "MAX_LIST_BYTES", 5000)
    path = make_zip(tmp_path / "x.zip", {f"s/a/{i}.jpg": b"" for i in range(20)})
    with pytest.raises(ArchiveError, match="names so many files"):
        read_all(path)


def test_names_of_no_use_are_passed_over(tmp_path):
    deep, long, null = "d/" * 70 + "1.jpg", "s/" + "n" * 5000 + "/1.jpg", "s/a/1.jpg\0.txt"
    assert {clean_name(name)[1] for name in (deep, long, null)} == {"unsafe_name"}
    got, _, passed, _ = read_all(make_tar(tmp_path / "x.tar", {deep: b"", long: b"", "s/a/1": b""}))
    assert list(got) == ["s/a/1"]
    assert passed == {"unsafe_name": 2}


def test_hard_links_and_sockets_in_a_folder(tmp_path):
    """A hard link is a file like any other; a socket is none."""
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1"})
    (root / "a" / "2.jpg").hardlink_to(root / "a" / "1.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "a" / "3.jpg"))
        got, _, passed, _ = read_all(root)
    assert got == {"a/1.jpg": b"1", "a/2.jpg": b"1"}
    assert passed == {"not_a_regular_file": 1}


def test_a_device_or_a_pipe_for_an_archive_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "x.zip")
    for path in (tmp_path / "x.zip", Path("/dev/zero")):
        with pytest.raises(ArchiveError, match="device or a pipe"):
            open_source(path)


def test_a_file_that_grows_is_read_as_far_as_it_was_listed(tmp_path):
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"123"})
    with open_source(root) as source:
        entries = source.entries()
        (root / "a" / "1.jpg").write_bytes(bytes(9999))
        assert [data for _, data in source.read(entries)] == [bytes(3)]


# ------------------------------------------------------------------------------ damage


def test_a_file_that_vanishes_is_counted(tmp_path):
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1", "a/2.jpg": b"2"})
    with open_source(root) as source:
        entries = source.entries()
        Path(entries[0].handle).unlink()
        (_, first), (_, second) = source.read(entries)
    assert isinstance(first, ArchiveError)
    assert second == b"2"


def test_random_damage_never_escapes(tmp_path):
    """Bytes changed anywhere give images, reasons or an ArchiveError; nothing else."""
    rng = random.Random(0)
    files = {f"s/{i}/1.jpg": rng.randbytes(200) for i in range(4)}
    for kind in ("zip", "tar", "tgz"):
        path = make(kind, tmp_path, files)
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
            with contextlib.suppress(ArchiveError):
                read_all(path)


def test_fingerprint_follows_names_and_sizes(tmp_path):
    paths = [make(kind, tmp_path, FILES) for kind in ("zip", "tar", "tgz")]
    prints = set()
    for path in paths:
        with open_source(path) as source:
            prints.add(source.fingerprint())
    assert len(prints) == 1
    with open_source(make_zip(tmp_path / "y.zip", FILES | {"set/b/2.jpg": b"longer"})) as source:
        assert source.fingerprint() not in prints


def test_entries_compare_by_what_they_are():
    assert Entry("a/1", "a", 3, 17) == Entry("a/1", "a", 3, 99)


def test_real_archives(real_faces):
    with open_source(real_faces / "CASIA-WebFace.zip") as source:
        entries = source.entries()
        assert (len(entries), len({e.identity for e in entries})) == (638, 32)
        assert all(data.startswith(b"\xff\xd8") for _, data in source.read(entries[::50]))
