"""record_writer.py: the bytes of a set written by hand, of dmlc-core, of a pack by other code."""

import struct

import numpy as np
import pytest

from fileio import record_writer, recordio
from fileio.record_writer import RecordWriter
from fileio.recordio import RecordError, RecordReader
from tests.helpers.record_files import (
    JPEGS,
    LABELS,
    MAGIC_BYTES,
    assert_refused,
    hand_made,
    image_payload,
    record,
    save,
)


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


def test_magic_number_inside_an_image(tmp_path):
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
    record_writer.write_dataset(tmp_path / "complete", JPEGS, LABELS)
    path = tmp_path / "train.rec"
    write_some(path, 4)
    with path.open("ab") as file:  # what a killed process had begun
        file.write(tail)
    offsets = recordio.record_offsets(path)
    assert len(offsets) == 6  # record 0, four images, the end of the last complete one
    with write_some(path, 5, int(offsets[1 + min(kept, 4)])) as writer:
        assert writer.tell() == path.stat().st_size
        writer.finish([2, 1, 2])
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "complete" / name).read_bytes()


def test_resume_after_a_kill_while_finishing(tmp_path):
    record_writer.write_dataset(tmp_path, JPEGS, LABELS)
    before = (tmp_path / "train.rec").read_bytes()
    end_of_images = int(recordio.record_offsets(tmp_path / "train.rec")[6])
    with RecordWriter(tmp_path / "train.rec", resume_at=end_of_images) as writer:
        assert not (tmp_path / "train.idx").exists() and not (tmp_path / "property").exists()
        writer.flush()
        assert_refused(tmp_path, "was never finished")
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


def test_writes_the_bytes_of_a_set_that_other_code_wrote(real_faces, tmp_path):
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
