"""recordio.py on record files written byte by byte, and on a pack by other code."""

import struct
import threading

import numpy as np
import pytest

from fileio.images import decode_image
from fileio.recordio import RecordReader, _Headers
from tests.helpers.record_files import (
    JPEGS,
    LABELS,
    MAGIC,
    MAGIC_BYTES,
    check_hand_made,
    hand_made,
    image_payload,
    labels_payload,
    record,
    save,
)


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
    assert reader.keys.tolist() == [7, 8, 9, 10, 11]
    assert reader.labels.tolist() == LABELS and reader.num_classes == 3
    assert reader.encoded(4) == JPEGS[4]


@pytest.mark.parametrize(
    ("numbers", "data", "ranges"),
    [
        ((6.0,), b"", False),  # the count alone
        ((6.0, 6.0), b"", False),
        ((6.0, 9.0), b"", False),  # identity records are promised and not there
        ((6.0, 9.0, 0.0), b"", True),
        ((6.0, 9.0), JPEGS[0], True),  # a dummy image
        ((6.0,), JPEGS[0], False),
        ((7.0, 9.0), b"", True),  # these three: as float32 rounds numbers beyond 2^24
        ((5.0, 9.0), b"", True),
        ((6.0, 10.0), b"", True),
    ],
)
@pytest.mark.parametrize("vector", [(), (0.5,)])  # that images have after their label
def test_record_0_as_other_writers_have_it(tmp_path, numbers, data, ranges, vector):
    images = [
        record(labels_payload(i, float(n), *vector) + j if vector else image_payload(i, n, j))
        for i, (n, j) in enumerate(zip(LABELS, JPEGS, strict=True), 1)
    ]
    first = record(labels_payload(0, *numbers) + data)
    records = [first, *images, *(hand_made()[6:] if ranges else [])]
    save(tmp_path, records, range(len(records)))
    reader = RecordReader(tmp_path)
    check_hand_made(reader)
    assert reader.num_classes == 3


def test_a_count_that_float32_has_rounded():
    """Of 33,554,434 images record 0 says 33,554,436: the record after the last image is none."""
    images, people = 33_554_434, 3
    count = 1 + images + people
    flags, is_range = np.zeros(count, np.int8), np.zeros(count, bool)
    flags[0] = flags[-people:] = 2
    is_range[0] = is_range[-people:] = True
    labels = np.zeros((1, 2), np.float32)
    labels[0] = images + 1, count
    assert int(labels[0, 0]) == images + 2
    reader = object.__new__(RecordReader)
    reader._is_subset = False
    headers = _Headers(flags, is_range, labels, np.zeros(1))
    assert reader._find_images(np.arange(count, dtype=np.int32), headers) == slice(1, images + 1)


def test_an_idx_that_lists_some_of_the_images(tmp_path, capsys):
    save(tmp_path, hand_made(), range(9))
    lines = (tmp_path / "train.idx").read_text().splitlines()
    del lines[3], lines[1]
    (tmp_path / "train.idx").write_text("\n".join(lines))
    reader = RecordReader(tmp_path)
    assert reader.keys.tolist() == [2, 4, 5] and reader.labels.tolist() == [0, 2, 2]
    assert [reader.encoded(i) for i in range(3)] == [JPEGS[1], JPEGS[3], JPEGS[4]]
    assert "train.idx lists 7 records of train.rec, not all of them" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["{} {}", "{}.0\t{}", "{}\t{}\r"])
def test_an_idx_as_tables_are_written(tmp_path, form):
    save(tmp_path, hand_made(), range(9))
    pairs = [line.split("\t") for line in (tmp_path / "train.idx").read_text().splitlines()]
    (tmp_path / "train.idx").write_text("\n".join(form.format(*pair) for pair in pairs))
    check_hand_made(RecordReader(tmp_path))


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
def test_reads_records_in_several_pieces(tmp_path, with_idx):
    head = image_payload(1, 1, b"abcd")
    cut = [head, b"", b"efgh", b"xyz"]  # the magic number stood between these
    parts = [record(part, flag) for part, flag in zip(cut, (1, 2, 2, 3), strict=True)]
    split_header = struct.pack("<IfQQ", 0, 0.0, MAGIC, 0)  # the magic number as an id
    in_header = record(split_header[:8], 1) + record(split_header[12:] + b"jpeg", 3)
    complete = record(image_payload(2, 2, b"jpeg"))
    save(tmp_path, [in_header, b"".join(parts), complete], [MAGIC, 1, 2] if with_idx else None)
    reader = RecordReader(tmp_path)
    assert reader.keys.tolist() == [1, 2, MAGIC] and reader.labels.tolist() == [1, 2, 0]
    assert reader.encoded(0) == b"abcd" + MAGIC_BYTES * 2 + b"efgh" + MAGIC_BYTES + b"xyz"
    assert reader.encoded(2) == b"jpeg"


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


def test_reads_a_set_that_other_code_wrote(real_faces, tmp_path):
    folder = real_faces / "faces_mixed_112x112"
    reader = RecordReader(folder)
    assert (reader.num_classes, reader.size, len(reader)) == (7167, (112, 112), 37886)
    assert all(reader.image(i).shape == (112, 112, 3) for i in (0, 1000, 37885))
    assert reader.image(0).std() > 10
    (tmp_path / "train.rec").symlink_to(folder / "train.rec")
    walked = RecordReader(tmp_path)
    assert np.array_equal(walked.keys, reader.keys)
    assert np.array_equal(walked.labels, reader.labels)
    assert walked.encoded(37885) == reader.encoded(37885)
