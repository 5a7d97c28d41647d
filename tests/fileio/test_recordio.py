"""Records against bytes written here by hand with struct, and against a pack by other code."""

import os
import pickle
import struct
import threading

import cv2
import numpy as np
import pytest

from fileio import bin_sets, record_writer, recordio
from fileio.images import decode_image, encode_jpeg
from fileio.record_writer import RecordWriter
from fileio.recordio import RecordError, RecordReader
from tests.helpers.bounded import within
from utils import UserError

MAGIC = 0xCED7230A
MAGIC_BYTES = b"\x0a\x23\xd7\xce"


def image(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_LINEAR)


def record(payload: bytes, cflag: int = 0) -> bytes:
    padding = b"\0" * (-len(payload) % 4)
    return struct.pack("<II", MAGIC, cflag << 29 | len(payload)) + payload + padding


def image_payload(key: int, label: float, jpeg: bytes) -> bytes:
    return struct.pack("<IfQQ", 0, label, key, 0) + jpeg


def labels_payload(key: int, *labels: float) -> bytes:
    return struct.pack("<IfQQ", len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels)


def save(folder, records: list[bytes], keys=None, properties: str | None = None) -> bytes:
    """Write the records and an idx of these keys (none if None); returns train.rec's bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "train.rec").write_bytes(b"".join(records))
    if keys is not None:
        offsets = np.cumsum([0] + [len(r) for r in records])
        lines = "".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=False))
        (folder / "train.idx").write_text(lines)
    if properties is not None:
        (folder / "property").write_text(properties)
    return b"".join(records)


JPEGS = [encode_jpeg(image(i)) + b"\0" * (i % 4) for i in range(5)]
LABELS = [0, 0, 1, 2, 2]


def hand_made() -> list[bytes]:
    """Record 0, five images of three identities, three identity records."""
    ranges = [(1, 3), (3, 4), (4, 6)]
    return [
        record(labels_payload(0, 6, 9)),
        *(
            record(image_payload(i + 1, n, j))
            for i, (n, j) in enumerate(zip(LABELS, JPEGS, strict=True))
        ),
        *(record(labels_payload(6 + i, *r)) for i, r in enumerate(ranges)),
    ]


def check_hand_made(reader: RecordReader) -> None:
    assert reader.keys.tolist() == [1, 2, 3, 4, 5] and reader.keys.dtype == np.int64
    assert reader.labels.tolist() == LABELS and reader.labels.dtype == np.int64
    assert reader.identities.tolist() == [[1, 3], [3, 4], [4, 6]]
    assert [reader.encoded(i) for i in range(len(reader))] == JPEGS


# ------------------------------------------------------------------------------ reading


def test_reads_bytes_written_by_hand(tmp_path):
    save(tmp_path, hand_made(), range(9), "3,112,112\n")
    reader = RecordReader(tmp_path)
    check_hand_made(reader)
    assert (reader.num_classes, reader.size) == (3, (112, 112))
    assert np.array_equal(reader.image(3), decode_image(JPEGS[3]))
    check_hand_made(RecordReader(tmp_path / "train.rec"))


def test_any_rec_file_with_its_idx_beside_it(tmp_path):
    save(tmp_path, hand_made(), range(9))
    (tmp_path / "train.rec").rename(tmp_path / "人脸.rec")
    (tmp_path / "train.idx").rename(tmp_path / "人脸.idx")
    reader = RecordReader(tmp_path / "人脸.rec")
    check_hand_made(reader)
    assert (reader.num_classes, reader.size) == (3, None)


def test_record_0_may_stand_last_as_face2rec2_writes_it(tmp_path):
    records, order = hand_made(), [1, 2, 3, 4, 5, 0, 6, 7, 8]
    save(tmp_path, [records[i] for i in order], order)
    check_hand_made(RecordReader(tmp_path))
    (tmp_path / "train.idx").unlink()  # the ids in the headers say the same
    check_hand_made(RecordReader(tmp_path))


def test_without_record_0_every_key_is_an_image(tmp_path):
    payloads = [
        image_payload(i + 7, n, j) for i, (n, j) in enumerate(zip(LABELS, JPEGS, strict=True))
    ]
    save(tmp_path, [record(p) for p in payloads], range(7, 12))
    reader = RecordReader(tmp_path)
    assert reader.keys.tolist() == [7, 8, 9, 10, 11] and reader.identities is None
    assert reader.labels.tolist() == LABELS and reader.num_classes == 3
    assert reader.encoded(4) == JPEGS[4]


def test_ids_that_say_nothing_give_way_to_the_order(tmp_path):
    save(tmp_path, [record(image_payload(0, n, b"jpeg")) for n in LABELS])
    assert RecordReader(tmp_path).keys.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("vector", [(4.0,), (4.0, 1.0), (4.0, *np.linspace(-9, 9, 236))])
def test_first_value_of_a_label_vector(tmp_path, vector):
    # A first record with two labels is an image too, where it holds one.
    save(tmp_path, [record(labels_payload(i, *vector) + JPEGS[i]) for i in range(3)], range(3))
    reader = RecordReader(tmp_path)
    assert reader.labels.tolist() == [4, 4, 4] and reader.num_classes == 5
    assert [reader.encoded(i) for i in range(3)] == JPEGS[:3]


@pytest.mark.parametrize("with_idx", [True, False])
def test_reads_records_in_several_parts(tmp_path, with_idx):
    head = image_payload(1, 1, b"abcd")
    cut = [head, b"", b"efgh", b"xyz"]  # the magic number stood between these
    parts = [record(part, flag) for part, flag in zip(cut, (1, 2, 2, 3), strict=True)]
    split_header = struct.pack("<IfQQ", 0, 0.0, MAGIC, 0)  # the magic number as an id
    in_header = record(split_header[:8], 1) + record(split_header[12:] + b"jpeg", 3)
    whole = record(image_payload(2, 2, b"jpeg"))
    save(tmp_path, [in_header, b"".join(parts), whole], [MAGIC, 1, 2] if with_idx else None)
    reader = RecordReader(tmp_path)
    assert reader.keys.tolist() == [1, 2, MAGIC] and reader.labels.tolist() == [1, 2, 0]
    assert reader.encoded(0) == b"abcd" + MAGIC_BYTES * 2 + b"efgh" + MAGIC_BYTES + b"xyz"
    assert reader.encoded(2) == b"jpeg"


@pytest.mark.parametrize("flags", [(0, 3), (1, 0), (1, 1, 3), (2, 3), (0, 2)])
def test_parts_out_of_order_are_a_sentence(tmp_path, flags):
    payload = image_payload(0, 0, b"")
    offsets = [0, 32][: 2 if flags[0] == 0 else 1]
    save(tmp_path, [record(payload, flag) for flag in flags])
    sentence(tmp_path, f"record {len(offsets) - 1} is not complete")
    (tmp_path / "train.idx").write_text("".join(f"{i}\t{n}\n" for i, n in enumerate(offsets)))
    sentence(tmp_path, "train.rec", "again")


def test_threads_share_a_reader(tmp_path):
    save(tmp_path, hand_made(), range(9))
    reader, outcomes = RecordReader(tmp_path), []

    def work():
        for i in list(range(5)) * 40:
            right = reader.encoded(i) == JPEGS[i] and np.array_equal(reader.image(i), images[i])
            outcomes.append(right)

    images = [decode_image(jpeg) for jpeg in JPEGS]
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(outcomes) and len(outcomes) == 800


# ------------------------------------------------------------------------------ sentences


def sentence(folder, *words: str) -> None:
    with pytest.raises(RecordError) as caught:
        RecordReader(folder)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, text


def test_no_file_an_empty_file_and_a_text_file(tmp_path):
    assert issubclass(RecordError, UserError)
    sentence(tmp_path, "There is no", str(tmp_path / "train.rec"))
    sentence(tmp_path / "nowhere", str(tmp_path / "nowhere" / "train.rec"))
    for content in (b"", b"1234", b"this is no record file at all"):
        (tmp_path / "train.rec").write_bytes(content)
        sentence(tmp_path, "train.rec is cut short or corrupt: record 0 is not complete", "copy")


@pytest.mark.parametrize("with_idx", [True, False])
def test_cut_short_anywhere_is_a_sentence(tmp_path, with_idx):
    whole = save(tmp_path, hand_made(), range(9) if with_idx else None)
    starts = np.cumsum([0] + [len(r) for r in hand_made()])
    for end in (*range(0, 200), *range(200, len(whole), 997), len(whole) - 3, len(whole) - 1):
        (tmp_path / "train.rec").write_bytes(whole[:end])
        key = int(np.searchsorted(starts, end, side="right")) - 1
        if with_idx or end not in starts[1:]:
            sentence(tmp_path, "is cut short or corrupt", f"record {key} is not complete")
        else:  # whole records, but not those that record 0 speaks of
            sentence(tmp_path, "train.rec", "copy or prepare")


def test_damage_in_the_middle(tmp_path):
    records = hand_made()
    records[4] = b"\0" * len(records[4])
    save(tmp_path, records)
    sentence(tmp_path, "record 4 is not complete")
    records[4] = record(b"\1\0\0\0" + bytes(20)) + bytes(len(hand_made()[4]) - 32)
    save(tmp_path, records)
    sentence(tmp_path, "record 5 is not complete")
    save(tmp_path, [record(b"too short")], [0])
    sentence(tmp_path, "record 0 is not complete")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: ["0\t0", "1\t44", *lines[2:]], "record 1 does not begin at byte 44"),
        (lambda lines: ["0\t0", "1\t41", *lines[2:]], "record 1 does not begin at byte 41"),
        (lambda lines: ["0\t0", "1\t-8", *lines[2:]], "record 1 does not begin at byte -8"),
        (lambda lines: lines[:-1], "is missing"),
        (lambda lines: lines[1:], "is missing"),
        (lambda lines: lines[:3] + lines[4:], "is missing"),
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
    sentence(tmp_path, "train.idx does not belong to train.rec", words, "delete train.idx")
    idx.unlink()  # which the sentence proposes
    check_hand_made(RecordReader(tmp_path))


def test_record_0_that_disagrees(tmp_path):
    records = hand_made()
    for labels in ((6, 10), (7, 6), (-1, 9), (float("nan"), 9), (1e9, 2e9)):
        save(tmp_path, [record(labels_payload(0, *labels)), *records[1:]], range(9))
        sentence(tmp_path, "Record 0 of", "which are not all there")
    save(tmp_path, records, [0, 1, 2, 3, 4, 5, 6, 7, 9])
    sentence(tmp_path, "Record 0 of", "which are not all there")
    nan = float("nan")
    wrong = [labels_payload(7, *labels) for labels in ((3, 99), (5, 4), (0, 3), (nan, 4), (3,))]
    for payload in (*wrong, image_payload(7, 3, b"jpeg")):
        save(tmp_path, [*records[:7], record(payload), records[8]], range(9))
        sentence(tmp_path, "Record 7 of", "should say which images are an identity's")
    save(tmp_path, [record(labels_payload(0, 1, 1))], [0])
    sentence(tmp_path, "holds no image")


def test_property_that_is_wrong(tmp_path):
    save(tmp_path, hand_made(), range(9), "3,112,112\n5\n")  # rec_builder adds a second line
    assert RecordReader(tmp_path).num_classes == 3
    (tmp_path / "property").write_text("2,112,112")
    sentence(tmp_path, "Record 4 of", "has label 2", "below 2", "property")
    for text in ("", "3", "three,112,112", "3,112", "3;112;112", "-3,112,112"):
        (tmp_path / "property").write_text(text)
        sentence(tmp_path, "property begins with", "'classes,height,width'", "delete it")
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
        sentence(tmp_path, "Record 1 of", "has label", "not a whole number below")


def test_a_property_line_without_end(tmp_path):
    for text in ("9" * 5000 + ",112,112", "1" * 10 + ",112,112", "3,112," + " " * 200 + "112"):
        save(tmp_path, hand_made(), range(9), text)
        sentence(tmp_path, "property begins with")


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
    sentence(tmp_path, "train.rec")


@pytest.mark.parametrize("offset", [2**31, 2**40, 2**63 - 1, 2**63 - 8, -(2**63), -4])
def test_an_idx_that_points_outside(tmp_path, offset):
    save(tmp_path, hand_made(), range(9))
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join([*lines[:-1], f"8\t{offset}"]))
    sentence(tmp_path, "train")


def test_labels_of_a_vector_that_never_ends(tmp_path):
    payload = struct.pack("<IfQQ", 2**32 - 1, 0.0, 1, 0) + b"jpeg"
    save(tmp_path, [record(image_payload(0, 0, b"x")), record(payload)], range(2))
    sentence(tmp_path, "record 1 is not complete")


def test_a_huge_image_in_a_record_is_not_decoded(tmp_path):
    """It claims 60,000 x 60,000 pixels; so does one in a .bin."""
    at = JPEGS[0].find(b"\xff\xc0") + 5
    huge = JPEGS[0][:at] + struct.pack(">HH", 60_000, 60_000) + JPEGS[0][at + 4 :]
    save(tmp_path, [record(image_payload(0, 0, huge))], [0])
    with pytest.raises(RecordError, match=r"Record 0 .*60000x60000"):
        within(100, RecordReader(tmp_path).image, 0)


def test_a_image_that_cannot_be_decoded_is_named(tmp_path):
    broken = [b"", b"no image", JPEGS[0][: len(JPEGS[0]) // 2]]
    save(tmp_path, [record(image_payload(i, 0, b)) for i, b in enumerate(broken)], range(3))
    reader = RecordReader(tmp_path)
    for i in range(3):
        with pytest.raises(RecordError, match=rf"Record {i} of .*train.rec: .*cannot be decoded"):
            reader.image(i)


# ------------------------------------------------------------------------------ writing


def test_writes_the_bytes_written_by_hand(tmp_path):
    record_writer.write_dataset(tmp_path / "new", JPEGS, LABELS)
    expected = save(tmp_path / "hand", hand_made(), range(9), "3,112,112")
    assert (tmp_path / "new/train.rec").read_bytes() == expected
    for name in ("train.idx", "property"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "hand" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "property",
        "train.idx",
        "train.rec",
    ]


def dmlc_write(payload: bytes) -> bytes:
    """WriteRecord of dmlc-core's src/recordio.cc, step by step in words of four bytes."""
    out, begin = b"", 0
    for i in range(0, len(payload) // 4 * 4, 4):
        if payload[i : i + 4] == MAGIC_BYTES:
            out += MAGIC_BYTES + struct.pack("<I", (1 if begin == 0 else 2) << 29 | i - begin)
            out += payload[begin:i]
            begin = i + 4
    out += MAGIC_BYTES + struct.pack("<I", (3 if begin else 0) << 29 | len(payload) - begin)
    return out + payload[begin:] + bytes(-len(payload) % 4)


def test_magic_number_inside_a_image(tmp_path):
    rng = np.random.default_rng(0)
    bits = [MAGIC_BYTES, MAGIC_BYTES[:2], MAGIC_BYTES[2:], b"\0", b"abcd"]
    jpegs = [b"".join(bits[i] for i in rng.integers(0, 5, rng.integers(0, 12))) for _ in range(300)]
    jpegs += [MAGIC_BYTES, MAGIC_BYTES * 3, b"a" + MAGIC_BYTES, b"abcd" + MAGIC_BYTES]
    record_writer.write_dataset(tmp_path, jpegs, [0] * len(jpegs))
    expected = [dmlc_write(image_payload(i, 0, jpeg)) for i, jpeg in enumerate(jpegs, 1)]
    written = (tmp_path / "train.rec").read_bytes()
    assert written[40:-40] == b"".join(expected)
    assert sum(MAGIC_BYTES in jpeg for jpeg in jpegs) > 100  # or the test would show little
    for with_idx in (True, False):
        reader = RecordReader(tmp_path)
        assert [reader.encoded(i) for i in range(len(reader))] == jpegs, with_idx
        (tmp_path / "train.idx").unlink(missing_ok=True)


def write_some(path, upto: int, resume_at: int | None = None) -> RecordWriter:
    writer = RecordWriter(path, resume_at)
    for i in range(0 if resume_at is None else resumed_from(path, resume_at), upto):
        assert writer.append(JPEGS[i], LABELS[i])[0] == i + 1
    writer.flush()
    return writer


def resumed_from(path, resume_at: int) -> int:
    return recordio.record_offsets(path).tolist().index(resume_at) - 1


@pytest.mark.parametrize("tail", [b"", b"\x0a\x23", record(b"x" * 99)[:50], bytes(4096)])
@pytest.mark.parametrize("kept", range(5))
def test_resume_gives_the_bytes_of_an_unbroken_run(tmp_path, kept, tail):
    record_writer.write_dataset(tmp_path / "whole", JPEGS, LABELS)
    path = tmp_path / "train.rec"
    write_some(path, 4)
    with path.open("ab") as file:  # what a killed process had begun
        file.write(tail)
    offsets = recordio.record_offsets(path)
    assert len(offsets) == 6  # record 0, four images, the end of the last whole one
    with write_some(path, 5, int(offsets[1 + min(kept, 4)])) as writer:
        assert writer.tell() == path.stat().st_size
        writer.finish([2, 1, 2])
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_after_a_kill_while_finishing(tmp_path):
    record_writer.write_dataset(tmp_path, JPEGS, LABELS)
    before = (tmp_path / "train.rec").read_bytes()
    end_of_images = int(recordio.record_offsets(tmp_path / "train.rec")[6])
    with RecordWriter(tmp_path / "train.rec", resume_at=end_of_images) as writer:
        assert not (tmp_path / "train.idx").exists() and not (tmp_path / "property").exists()
        writer.flush()
        sentence(tmp_path, "was never finished")
        writer.finish([2, 1, 2])
    assert (tmp_path / "train.rec").read_bytes() == before


def test_writer_refuses_what_would_not_be_read(tmp_path):
    writer = RecordWriter(tmp_path / "train.rec")
    assert writer.tell() == 40
    assert writer.append(b"jpeg", 0) == (1, 40) and writer.tell() == 40 + 8 + 24 + 4
    for label in (-1, 2**24):
        with pytest.raises(RecordError, match="cannot be a label"):
            writer.append(b"jpeg", label)
    with pytest.raises(RecordError, match="has 1 images, but its identities should have 2"):
        writer.finish([1, 1])
    writer.flush()
    with pytest.raises(RecordError, match=r"No record of .* begins at byte 44"):
        RecordWriter(tmp_path / "train.rec", resume_at=44)
    with pytest.raises(RecordError, match="not in ascending order"):
        record_writer.write_dataset(tmp_path / "new", JPEGS, LABELS[::-1])


def test_jpeg_is_rgb_and_close(tmp_path):
    red = np.zeros((112, 96, 3), np.uint8)
    red[..., 0] = 200
    again = decode_image(encode_jpeg(red))
    assert again.shape == red.shape and again.dtype == np.uint8
    assert np.abs(again.astype(int) - red).max() <= 3
    assert len(encode_jpeg(image(1), 30)) < len(encode_jpeg(image(1)))
    grey = cv2.imencode(".png", image(0)[..., 0])[1].tobytes()
    assert decode_image(grey).shape == (112, 112, 3)


# ------------------------------------------------------------------------------ .bin


def test_bin_both_ways_as_insightface_reads_it(tmp_path):
    same = [True, False]
    bin_sets.write_bin(tmp_path / "lfw.bin", [bytearray(JPEGS[0]), *JPEGS[1:4]], np.array(same))
    with (tmp_path / "lfw.bin").open("rb") as file:
        assert pickle.load(file, encoding="bytes") == (JPEGS[:4], same)
    images, read = bin_sets.read_bin(tmp_path / "lfw.bin")
    assert images == JPEGS[:4] and read.dtype == bool and read.tolist() == same
    with pytest.raises(RecordError, match="3 images do not make 2 pairs"):
        bin_sets.write_bin(tmp_path / "x.bin", JPEGS[:3], same)
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (([b"a"] * 3, [True, False]), "has 3 images for 2 pairs"),
        (([], []), "has 0 images for 0 pairs"),
        (([b"a", 7], [True]), "has '7' for an image"),
        (([b"a", b"b"], [10**5000]), "a number of more than 64 bits"),
        (([b"a", b"b"], [2]), "has '2' for an image or for True or False"),
        ({"a": 1}, "it has a dict"),
    ],
)
def test_bin_that_is_none(tmp_path, content, words):
    path = tmp_path / "测试.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(RecordError, match=words) as caught:
        bin_sets.read_bin(path)
    assert str(path) in str(caught.value)


def test_bin_that_is_damaged_or_hostile(tmp_path):
    path = tmp_path / "lfw.bin"
    with pytest.raises(RecordError, match="There is no"):
        bin_sets.read_bin(path)
    for content in (b"", b"JPEG", pickle.dumps((JPEGS[:2], [True]))[:-40]):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="is not a test set, a pickle of"):
            bin_sets.read_bin(path)
    path.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "owned"))
    with pytest.raises(RecordError, match=r"asks for posix\.system.* a source you trust"):
        bin_sets.read_bin(path)
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------ a real pack


def test_reads_a_pack_that_other_code_wrote(real_faces, tmp_path):
    folder = real_faces / "faces_mixed_112x112"
    reader = RecordReader(folder)
    assert (reader.num_classes, reader.size, len(reader)) == (7167, (112, 112), 37886)
    assert reader.identities.shape == (7167, 2)
    first, end = reader.identities.T  # the identity records say of each image whose it is
    assert np.array_equal(np.repeat(np.arange(7167), end - first), reader.labels)
    assert all(reader.image(i).shape == (112, 112, 3) for i in (0, 1000, 37885))
    assert reader.image(0).std() > 10
    (tmp_path / "train.rec").symlink_to(folder / "train.rec")
    walked = RecordReader(tmp_path)
    assert np.array_equal(walked.keys, reader.keys)
    assert np.array_equal(walked.labels, reader.labels)
    assert walked.encoded(37885) == reader.encoded(37885)


def test_writes_the_bytes_of_a_pack_that_other_code_wrote(real_faces, tmp_path):
    """All but one field that no reader looks at, the header's own label in identity records:

    mxnet's pack(), and so InsightFace's face2rec2, leaves 0 there; this pack has the class id.
    """
    folder = real_faces / "faces_mixed_112x112"
    reader = RecordReader(folder)
    record_writer.write_dataset(
        tmp_path, (reader.encoded(i) for i in range(len(reader))), reader.labels
    )
    for name in ("train.idx", "property"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    ours = np.fromfile(tmp_path / "train.rec", np.uint8)
    theirs = np.fromfile(folder / "train.rec", np.uint8)
    identities = 7167 * 40
    assert ours.shape == theirs.shape
    assert np.array_equal(ours[:-identities], theirs[:-identities])
    ours, theirs = (a[-identities:].reshape(7167, 40).copy() for a in (ours, theirs))
    assert np.array_equal(theirs[:, 12:16].copy().view("<f4")[:, 0], np.arange(7167))
    assert not ours[:, 12:16].any()
    theirs[:, 12:16] = 0
    assert np.array_equal(ours, theirs)
