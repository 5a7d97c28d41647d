"""archives.py: the images of archives made byte by byte; their order, names and identities."""

import gzip
import io
import os
import socket
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fileio import tar_archives
from fileio.archive_source import ArchiveError, Entry, clean_name, decode_name
from fileio.archives import open_source
from tests.helpers.archive_files import (
    FILES,
    KINDS,
    SORTED,
    make,
    make_folder,
    make_tar,
    make_zip,
    read_all,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images_in_sorted_order(kind, tmp_path):
    got, names, skipped, corruption = read_all(make(kind, tmp_path, FILES))
    assert names == SORTED == list(got)
    assert got == FILES
    assert not skipped
    assert not corruption


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


def test_the_level_of_identities_can_be_chosen(tmp_path):
    files = {f"s/{i}/{k}/a.jpg": b"1" for i in (1, 2, 3) for k in ("front", "side")}
    path = make_folder(tmp_path / "s", files)
    prints = set()
    for level, expected in {"auto": 3, "1": 2, "2": 3, "path": 6}.items():
        with open_source(path, identity_level=level) as source:
            assert len({entry.identity for entry in source.entries()}) == expected
            prints.add(source.fingerprint())
    assert len(prints) == 3  # what was prepared with other identities is not this set


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
    got, _, skipped, _ = read_all(path, inner)
    assert got == {"s/a/1.jpg": b"good", "s/a/2.jpg": b"good too"}
    assert skipped == {"unsafe_name": 4}
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_a_tar(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    extra = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"s/a/{kind.decode()}.jpg")
        info.type, info.linkname = kind, str(secret)
        extra.append(info)
    got, _, skipped, _ = read_all(make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}, extra))
    assert got == {"s/a/1.jpg": b"1"}
    assert skipped == {"link_outside": 2, "not_a_regular_file": 2}


def test_links_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("s/a/link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
        archive.writestr("s/a/1.jpg", b"1")
    got, _, skipped, _ = read_all(tmp_path / "x.zip")
    assert got == {"s/a/1.jpg": b"1"}
    assert skipped == {"link_outside": 1}


def test_links_and_pipes_in_a_folder(tmp_path):
    outside = make_folder(tmp_path / "outside", {"a/secret.jpg": b"secret"})
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1"})
    (root / "a" / "link.jpg").symlink_to(outside / "a" / "secret.jpg")
    (root / "linked").symlink_to(outside)
    os.mkfifo(root / "a" / "pipe.jpg")
    got, _, skipped, _ = read_all(root)
    assert got == {"a/1.jpg": b"1"}
    assert skipped == {"link_outside": 2, "not_a_regular_file": 1}


LINKS = {  # name: target
    "s/b/link.jpg": "../a/1.jpg",
    "s/c": "a",  # a folder
    "s/b/chain.jpg": "link.jpg",
    "s/b/up.jpg": "../../../up.jpg",
    "s/b/gone.jpg": "nothing.jpg",
    "s/a/loop": "..",
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tgz"])
def test_links_inside_are_followed(kind, tmp_path):
    """To files, folders and other links; no further than the source, and no loop is endless."""
    files = {"s/a/1.jpg": b"one", "s/a/2.jpg": b"two", "s/b/3.jpg": b"three"}
    path = make(kind, tmp_path, files)
    if kind == "folder":
        make_folder(tmp_path, {"up.jpg": b"secret"})
        for name, target in LINKS.items():
            (path / name).symlink_to(target)
    elif kind == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            for name, target in LINKS.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, target)
    else:
        extra = []
        for name, target in LINKS.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            extra.append(info)
        info = tarfile.TarInfo("s/b/hard.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "s/a/2.jpg"
        make_tar(path, files, [*extra, info])
    got, names, skipped, _ = read_all(path, tmp_path)
    expected = files | {"s/b/link.jpg": b"one", "s/b/chain.jpg": b"one"}
    expected |= {"s/c/1.jpg": b"one", "s/c/2.jpg": b"two"}
    if kind.startswith("t"):
        expected["s/b/hard.jpg"] = b"two"
    assert got == expected
    assert sorted(names) == sorted(expected)
    loop = {"link_loop": 2} if kind == "folder" else {"broken_link": 1}
    skipped = dict(skipped)
    assert skipped.pop("link_outside") == 1
    assert sum(skipped.values()) == 1 + sum(loop.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_other_packers_are_read(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    got, names, skipped, _ = read_all(tmp_path / "x.zip")
    assert (got, names, skipped) == (FILES, SORTED, {})


@pytest.mark.parametrize(
    ("method", "flag", "reason"),
    [(9, 0, "packed_by_deflate64"), (97, 0, "packed_by_97"), (8, 1, "encrypted")],
)
def test_zips_that_cannot_be_read_say_why(method, flag, reason, tmp_path):
    path = make_zip(tmp_path / "x.zip", {"s/a/1.jpg": b"1", "s/a/2.jpg": b"2"})
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")  # the second one's entry in the directory
    data[entry + 8 : entry + 12] = struct.pack("<HH", flag, method)
    path.write_bytes(data)
    got, _, skipped, _ = read_all(path)
    assert (got, skipped) == ({"s/a/1.jpg": b"1"}, {reason: 1})


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
    got, _, skipped, _ = read_all(make(kind, tmp_path, files))
    assert set(got) == {"s/a/1.jpg", "s/a/no_suffix"}
    assert skipped == {"system_file": 3, "not_a_picture": 1, "no_identity_folder": 1}


def test_empty_folders_are_counted(tmp_path):
    root = make_folder(tmp_path / "root", {"s/a/1.jpg": b"1"})
    (root / "s" / "empty" / "inner").mkdir(parents=True)
    info = tarfile.TarInfo("s/empty/inner")
    info.type = tarfile.DIRTYPE
    tar = make_tar(tmp_path / "x.tar", {"s/a/1.jpg": b"1"}, [info])
    zipped = make_zip(tmp_path / "x.zip", {"s/a/1.jpg": b"1", "s/empty/inner/": b""})
    for path in (root, tar, zipped):
        got, _, skipped, _ = read_all(path)
        assert got == {"s/a/1.jpg": b"1"}
        assert skipped == {"empty_folder": 1}


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_name_twice_means_the_later_one(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
        for data in (b"old", b"newer"):
            info = tarfile.TarInfo("s/a/1.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    got, _, skipped, _ = read_all(path)
    assert got == {"s/a/1.jpg": b"newer"}
    assert skipped == {"duplicate_name": 1}


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


def test_chinese_folders_as_unzip_leaves_them(tmp_path):
    """GBK bytes in names: the same entries as of an archive of the folder."""
    make_folder(tmp_path / "root", {os.fsdecode("王芳/照片.jpg".encode("gbk")): b"1"})
    make_tar(tmp_path / "x.tar", {"王芳/照片.jpg": b"1"})
    prints = set()
    for path in (tmp_path / "root", tmp_path / "x.tar"):
        with open_source(path) as source:
            assert [(e.identity, e.name) for e in source.entries()] == [("王芳", "王芳/照片.jpg")]
            assert [data for _, data in source.read(source.entries())] == [b"1"]
            prints.add(source.fingerprint())
    assert len(prints) == 1


def test_decode_and_clean_name():
    assert decode_name("é/张".encode()) == "é/张"
    assert decode_name("张/a".encode("gbk") + b"/Jos\x82") == "张/a/José"  # cp437's é
    assert clean_name("./a//b.jpg") == ("a/b.jpg", "")
    assert clean_name("a/../b.jpg")[1] == "unsafe_name"
    assert clean_name("a/..b/c.jpg")[1] == "system_file"
    assert clean_name("d:a.jpg")[1] == "unsafe_name"


def test_hard_links_and_sockets_in_a_folder(tmp_path):
    """A hard link is a file like any other; a socket is none."""
    root = make_folder(tmp_path / "root", {"a/1.jpg": b"1"})
    (root / "a" / "2.jpg").hardlink_to(root / "a" / "1.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "a" / "3.jpg"))
        got, _, skipped, _ = read_all(root)
    assert got == {"a/1.jpg": b"1", "a/2.jpg": b"1"}
    assert skipped == {"not_a_regular_file": 1}


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
