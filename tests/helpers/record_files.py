"""Record files written byte by byte with struct, and what a reader says of them."""

import struct

import cv2
import numpy as np
import pytest

from fileio.images import encode_jpeg
from fileio.recordio import RecordError, RecordReader

MAGIC = 0xCED7230A

MAGIC_BYTES = b"\x0a\x23\xd7\xce"


def smooth_image(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
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


JPEGS = [encode_jpeg(smooth_image(i)) + b"\0" * (i % 4) for i in range(5)]

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
    assert [reader.encoded(i) for i in range(len(reader))] == JPEGS


def assert_refused(folder, *words: str) -> None:
    with pytest.raises(RecordError) as caught:
        RecordReader(folder)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, text
