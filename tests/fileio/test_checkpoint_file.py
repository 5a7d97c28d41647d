import hashlib
import os
import random
import zipfile

import pytest
import torch

from fileio.checkpoint_file import load_checkpoint, save_checkpoint
from utils import UserError


def test_checkpoint_round_trip_and_damage(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(3)}, "note": "a", "t": (1, 2)})
    loaded = load_checkpoint(path)
    assert loaded["model"]["w"].tolist() == [0, 1, 2]
    assert loaded["t"] == (1, 2)

    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        load_checkpoint(path)
    path.write_text("no checkpoint")
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")


class Evil:
    """What a pickle could do if it were trusted."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint("evil.pt")
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------ the checksum


def test_others_read_a_checkpoint_without_knowing_of_its_checksum(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.arange(1000), "note": "a"})
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["w"], torch.arange(1000))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    payload = path.read_bytes().removesuffix(comment)
    assert comment == b"sha256:" + hashlib.sha256(payload).hexdigest().encode()
    torch.save({"w": torch.arange(3)}, path)  # and one without a checksum is read, too
    assert load_checkpoint(path)["w"].tolist() == [0, 1, 2]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.zeros(50_000), "note": "a"})
    whole = path.read_bytes()
    rng = random.Random(0)
    silent = 0
    for _ in range(60):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole) - 71)  # the payload
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            continue
    assert silent > 30  # PyTorch alone would have taken these
    for _ in range(20):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
