"""Record files that are corrupt, cut short or inconsistent: each is named in a sentence."""

import struct

import numpy as np
import pytest

from fileio.recordio import RecordError, RecordReader
from tests.helpers.bounded import within
from tests.helpers.record_files import (
    JPEGS,
    MAGIC,
    assert_refused,
    check_hand_made,
    hand_made,
    image_payload,
    labels_payload,
    record,
    save,
)
from utils import UserError


@pytest.mark.parametrize("flags", [(0, 3), (1, 0), (1, 1, 3), (2, 3), (0, 2)])
def test_pieces_out_of_order_are_a_sentence(tmp_path, flags):
    payload = image_payload(0, 0, b"")
    offsets = [0, 32][: 2 if flags[0] == 0 else 1]
    save(tmp_path, [record(payload, flag) for flag in flags])
    assert_refused(tmp_path, f"record {len(offsets) - 1} is not complete")
    (tmp_path / "train.idx").write_text("".join(f"{i}\t{n}\n" for i, n in enumerate(offsets)))
    assert_refused(tmp_path, "train.rec", "again")


def test_no_file_an_empty_file_and_a_text_file(tmp_path):
    assert issubclass(RecordError, UserError)
    assert_refused(tmp_path, "There is no", str(tmp_path / "train.rec"))
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere" / "train.rec"))
    for content in (b"", b"1234", b"this is no record file at all"):
        (tmp_path / "train.rec").write_bytes(content)
        assert_refused(
            tmp_path, "train.rec is cut short or corrupt: record 0 is not complete", "copy"
        )


@pytest.mark.parametrize("with_idx", [True, False])
def test_cut_short_anywhere_is_a_sentence(tmp_path, with_idx):
    complete = save(tmp_path, hand_made(), range(9) if with_idx else None)
    starts = np.cumsum([0] + [len(r) for r in hand_made()])
    for end in (
        *range(0, 200),
        *range(200, len(complete), 997),
        len(complete) - 3,
        len(complete) - 1,
    ):
        (tmp_path / "train.rec").write_bytes(complete[:end])
        key = int(np.searchsorted(starts, end, side="right")) - 1
        if with_idx or end not in starts[1:]:
            assert_refused(tmp_path, "is cut short or corrupt", f"record {key} is not complete")
        else:  # complete records, but not those that record 0 announces
            assert_refused(tmp_path, "train.rec", "copy or prepare")


def test_corruption_in_the_middle(tmp_path):
    records = hand_made()
    records[4] = b"\0" * len(records[4])
    save(tmp_path, records)
    assert_refused(tmp_path, "record 4 is not complete")
    records[4] = record(b"\1\0\0\0" + bytes(20)) + bytes(len(hand_made()[4]) - 32)
    save(tmp_path, records)
    assert_refused(tmp_path, "record 5 is not complete")
    save(tmp_path, [record(b"too short")], [0])
    assert_refused(tmp_path, "record 0 is not complete")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: ["0\t0", "1\t44", *lines[2:]], "record 1 does not begin at byte 44"),
        (lambda lines: ["0\t0", "1\t41", *lines[2:]], "record 1 does not begin at byte 41"),
        (lambda lines: ["0\t0", "1\t-8", *lines[2:]], "record 1 does not begin at byte -8"),
        (lambda lines: lines[:-1], "is missing"),
        (lambda lines: lines[1:], "is missing"),
        (lambda lines: [*lines[:-1], lines[-2]], "there twice"),
        (lambda lines: [*lines[:-1], "8"], "record id, tab, byte offset"),
        (lambda lines: [line + "\t1" for line in lines], "record id, tab, byte offset"),
        (lambda lines: ["this is", "no index"], "record id, tab, byte offset"),
        (lambda lines: [*lines[:-1], "8\t99999999999999999999999"], "record id, tab, byte offset"),
        (lambda lines: [], "record id, tab, byte offset"),
    ],
)
def test_an_idx_that_disagrees(tmp_path, change, words):
    save(tmp_path, hand_made(), range(9))
    idx = tmp_path / "train.idx"
    idx.write_text("\n".join(change(idx.read_text().splitlines())))
    assert_refused(tmp_path, "train.idx does not belong to train.rec", words, "delete train.idx")
    idx.unlink()  # which the sentence proposes
    check_hand_made(RecordReader(tmp_path))


def test_record_0_that_disagrees(tmp_path):
    records = hand_made()
    for labels in ((8, 9), (-1, 9), (float("nan"), 9), (1e9, 2e9)):
        save(tmp_path, [record(labels_payload(0, *labels)), *records[1:]], range(9))
        assert_refused(tmp_path, "Record 0 of", "which are not all there")
    save(tmp_path, [record(labels_payload(0, 1, 1))], [0])
    assert_refused(tmp_path, "holds no image")


def test_property_that_is_wrong(tmp_path):
    save(tmp_path, hand_made(), range(9), "3,112,112\n5\n")  # rec_builder adds a second line
    assert RecordReader(tmp_path).num_classes == 3
    (tmp_path / "property").write_text("2,112,112")
    assert_refused(tmp_path, "Record 4 of", "has label 2", "below 2", "property")
    for text in ("", "3", "three,112,112", "3,112", "3;112;112", "-3,112,112"):
        (tmp_path / "property").write_text(text)
        assert_refused(tmp_path, "property begins with", "'classes,height,width'", "delete it")
    (tmp_path / "property").write_text("3,112,96")
    with pytest.raises(RecordError, match=r"Record 1 of .* is 112x112 .* says 96x112"):
        RecordReader(tmp_path).image(0)


OUTSIDE = [-1.0, 0.5, float("nan"), float("inf"), -float("inf"), 2.0**24, 2.0**31, 1e38]


@pytest.mark.parametrize("properties", [None, "999999999,112,112"])
@pytest.mark.parametrize("label", OUTSIDE)
def test_labels_that_are_no_class_ids(tmp_path, label, properties):
    """Whatever property promises: counting labels takes memory for the largest one."""
    for payload in (image_payload(1, label, b"x"), labels_payload(1, label, 0.0, 0.0) + b"x"):
        records = [record(image_payload(0, 0, b"x")), record(payload)]
        save(tmp_path, records, range(2), properties)
        assert_refused(tmp_path, "Record 1 of", "has label", "not a whole number below")


def test_a_property_line_without_end(tmp_path):
    for text in ("9" * 5000 + ",112,112", "1" * 10 + ",112,112", "3,112," + " " * 200 + "112"):
        save(tmp_path, hand_made(), range(9), text)
        assert_refused(tmp_path, "property begins with")


@pytest.mark.parametrize("length", [2**29 - 1, 1000, 23, 4, 0])
@pytest.mark.parametrize("with_idx", [True, False])
def test_a_length_that_lies(tmp_path, length, with_idx):
    records = hand_made()
    records[3] = struct.pack("<II", MAGIC, length) + records[3][8:]
    save(tmp_path, records, None)
    if with_idx:
        offsets = np.cumsum([0] + [len(r) for r in records[:-1]])
        lines = "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
        (tmp_path / "train.idx").write_text(lines)
    assert_refused(tmp_path, "train.rec")


@pytest.mark.parametrize("offset", [2**31, 2**40, 2**63 - 1, 2**63 - 8, -(2**63), -4])
def test_an_idx_that_points_outside(tmp_path, offset):
    save(tmp_path, hand_made(), range(9))
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join([*lines[:-1], f"8\t{offset}"]))
    assert_refused(tmp_path, "train")


def test_labels_of_a_vector_that_never_ends(tmp_path):
    payload = struct.pack("<IfQQ", 2**32 - 1, 0.0, 1, 0) + b"jpeg"
    save(tmp_path, [record(image_payload(0, 0, b"x")), record(payload)], range(2))
    assert_refused(tmp_path, "record 1 is not complete")


def test_a_huge_image_in_a_record_is_not_decoded(tmp_path):
    """It claims 60,000 x 60,000 pixels; so does one in a .bin."""
    at = JPEGS[0].find(b"\xff\xc0") + 5
    huge = JPEGS[0][:at] + struct.pack(">HH", 60_000, 60_000) + JPEGS[0][at + 4 :]
    save(tmp_path, [record(image_payload(0, 0, huge))], [0])
    with pytest.raises(RecordError, match=r"Record 0 .*60000x60000"):
        within(100, RecordReader(tmp_path).image, 0)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    broken = [b"", b"no image", JPEGS[0][: len(JPEGS[0]) // 2]]
    save(tmp_path, [record(image_payload(i, 0, b)) for i, b in enumerate(broken)], range(3))
    reader = RecordReader(tmp_path)
    for i in range(3):
        with pytest.raises(RecordError, match=rf"Record {i} of .*train.rec: .*cannot be decoded"):
            reader.image(i)
