"""Data sets prepared in parts, and the parts merged."""

import json
import shutil

import pytest

import pre_process
from config import Config
from preprocessing import pipeline, prepare
from preprocessing.merge_parts import find_parts, part_folder
from tests.helpers.synthetic_faces import casia_files, image_without_face, write_zip

FILES = ("train.rec", "train.idx", "property", "index.tsv")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """26 images of 6 identities, two without a face, in a zip of 7 blocks of 4."""
    files = casia_files(6, 4) | {
        f"CASIA-WebFace/000100{n}/900.jpg": image_without_face() for n in (1, 3)
    }
    return write_zip(tmp_path_factory.mktemp("source") / "CASIA-WebFace.zip", files)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_IMAGES", 4)


def run_main(source, output, **settings):
    """main's exit status."""
    where = {"source": str(source), "output": str(output), "images_dir": str(output) + "-images"}
    try:
        pre_process.main(Config(**where, detect_batch=4, **settings))
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(scope="module")
def complete(source, tmp_path_factory):
    """The set as one process makes it."""
    output = tmp_path_factory.mktemp("complete") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_IMAGES", 4)
        assert run_main(source, output) == 0
    return output


def assert_same(output, complete):
    compared = 0
    for name in FILES:
        assert (output / name).read_bytes() == (complete / name).read_bytes(), name
        compared += (complete / name).stat().st_size
    actual, expected = (json.loads((p / "report.json").read_text()) for p in (output, complete))
    for key in ("images", "kept", "status", "missed", "identities"):
        assert actual[key] == expected[key]
    return compared


@pytest.mark.parametrize("count", [2, 3, 9])
def test_parts_merged_are_the_single_run(source, complete, tmp_path, count):
    output = tmp_path / "set"
    for number in range(count, 0, -1):  # in whatever order
        assert run_main(source, output, shard=f"{number}/{count}") == 0
    assert len(find_parts(output)) == count
    assert run_main(source, output, merge=True) == 0
    print(count, "parts:", assert_same(output, complete), "bytes equal")
    assert run_main(source, output, merge=True) == 0  # finished: nothing to do
    assert run_main(source, output, shard="1/2") == 0
    assert not list(tmp_path.glob("*.shard-*"))


def test_processes_of_one_group_make_the_same_set(groups, source, complete, tmp_path):
    settings = ["--source", str(source), "--output", str(tmp_path / "set"), "--detect-batch", "4"]
    printed = groups.run(tmp_path, 3, "run_pre_process", settings, 4)
    assert_same(tmp_path / "set", complete)
    assert "kept 24 of 6 identities" in printed[0]
    assert not list(tmp_path.glob("*.shard-*"))


def test_a_part_that_was_killed_is_resumed(source, complete, tmp_path, monkeypatch):
    output = tmp_path / "set"
    append, calls = prepare.DatasetWriter.append, []

    def failing(self, block):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, block)

    monkeypatch.setattr(prepare.DatasetWriter, "append", failing)
    assert run_main(source, output, shard="1/2") == 130
    aligned = []
    decode = pipeline.decode_entry
    monkeypatch.setattr(pipeline, "decode_entry", lambda *a: (aligned.append(1), decode(*a))[1])
    assert run_main(source, output, shard="1/2") == 0
    assert len(aligned) == 4  # of the 12 of its three blocks, two blocks were done
    assert run_main(source, output, shard="2/2") == 0
    assert run_main(source, output, merge=True) == 0
    assert_same(output, complete)


def test_what_cannot_be_merged_is_a_user_error(source, tmp_path, capsys):
    output = tmp_path / "set"

    def merge():
        assert run_main(source, output, merge=True) == 2
        return capsys.readouterr().err

    assert "There is no finished part" in merge()
    for number in (1, 3):
        assert run_main(source, output, shard=f"{number}/3") == 0
    (tmp_path / "set.shard-00002-of-00003.part").mkdir()
    assert "Parts 2 of 3 of" in (text := merge())
    assert "(2 unfinished); run pre_process.py --shard 2/3" in text
    assert run_main(source, output, shard="2/3") == 0
    other = part_folder(output, 1, 2)
    shutil.copytree(part_folder(output, 1, 3), other)
    assert "has parts out of 2 and parts out of 3" in merge()
    shutil.rmtree(other)

    first, second = (part_folder(output, number, 3) for number in (1, 2))
    shutil.rmtree(second)
    shutil.copytree(first, second)  # the first part twice, the second missing
    assert "does not hold each of its images once" in merge()
    shutil.rmtree(second)
    assert run_main(source, output, shard="2/3") == 0

    index = (first / "index.tsv").read_text().splitlines(keepends=True)
    for corrupt in (index[:-1], [*index, index[-1]], [index[0], *index[2:], index[1]]):
        (first / "index.tsv").write_text("".join(corrupt))
        assert "does not hold each of its images once" in merge()
    (first / "index.tsv").write_text("".join(index))
    records = (first / "train.rec").read_bytes()
    (first / "train.rec").write_bytes(records[: len(records) // 2])
    assert "does not hold each of its images once" in merge()
    (first / "train.rec").write_bytes(records)
    assert run_main(source, output, merge=True, min_face=30) == 2
    assert "differs from this run in settings" in capsys.readouterr().err
    assert run_main(source, output, merge=True) == 0


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4"])
def test_wrong_parts_are_refused(source, tmp_path, capsys, shard):
    assert run_main(source, tmp_path / "set", shard=shard) == 2
    assert f"--shard {shard} should be like 1/4" in capsys.readouterr().err
