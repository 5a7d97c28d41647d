"""checkpoint_file.py: round trips, checksums, corruption, files that lie about their numbers."""

import hashlib
import os
import random
import zipfile

import pytest
import torch

from evaluation.embedders import load_embedder
from fileio.checkpoint_file import check_weights, load_checkpoint, save_checkpoint
from models import build_model
from tests.helpers.bounded import within
from utils import UserError

CPU = torch.device("cpu")


def test_round_trip_and_corruption(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(3)}, "note": "a", "t": (1, 2)})
    loaded = load_checkpoint(path)
    assert loaded["model"]["w"].tolist() == [0, 1, 2]
    assert loaded["t"] == (1, 2)

    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"last\.pt is corrupt"):
        load_checkpoint(path)
    path.write_text("no checkpoint")
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")


class Evil:
    """What a pickle could do if it were loaded without restrictions."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint("evil.pt")
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------ the checksum


def test_plain_torch_reads_a_checkpoint_and_ignores_its_checksum(tmp_path):
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
    torch.save({"w": torch.arange(3)}, path)  # one without a checksum is read, too
    assert load_checkpoint(path)["w"].tolist() == [0, 1, 2]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.zeros(50_000), "note": "a"})
    complete = path.read_bytes()
    rng = random.Random(0)
    silent = 0
    for _ in range(60):
        corrupt = bytearray(complete)
        position = rng.randrange(len(complete) - 71)  # in the payload
        corrupt[position] ^= 1 << rng.randrange(8)
        path.write_bytes(corrupt)
        with pytest.raises(UserError, match="is corrupt"):
            load_checkpoint(path)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            continue
    assert silent > 30  # PyTorch alone would have loaded these
    for _ in range(20):
        path.write_bytes(complete[: rng.randrange(len(complete))])
        with pytest.raises(UserError, match="is corrupt"):
            load_checkpoint(path)


# ------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build_model("tiny", emb_size=16).state_dict()


def refused(path, words):
    with pytest.raises(UserError, match=words) as error:
        within(300, load, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def load(path):
    load_embedder(path, device=CPU, network="tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ours", [True, False])
def test_weights_that_are_not_finite_are_named(state, tmp_path, value, ours):
    """NaN in a checkpoint: one number of one layer is enough."""
    broken = {name: tensor.clone() for name, tensor in state.items()}
    name = next(name for name in broken if "layer2" in name and name.endswith("weight"))
    broken[name].view(-1)[-1] = value
    path = tmp_path / "last.pt"
    config = {"network": "tiny", "use_se": False}
    save_checkpoint(path, {"config": config, "model": broken} if ours else broken)
    refused(path, f"{name} has numbers that are not finite")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1, 1).expand(10**6, 10**5), "fewer numbers in the file than it claims"),
        (
            torch.zeros(2_000_000, 1),
            r"fc.weight is \(2000000, 1\), not \(2000000, 6272\)",
        ),  # a layer of 8 GB and more
        (torch.tensor(1.0), "not those of network tiny"),
        (torch.eye(4).to_sparse(), "no plain tensor"),
        (torch.zeros(16, 128, dtype=torch.complex64), "no plain tensor"),
        (torch.zeros(16, 10**9, device="meta"), "no plain tensor"),
        (torch.zeros(16, 128, dtype=torch.float8_e4m3fn), "no plain tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_no_network_has(state, tmp_path, tensor, words):
    torch.save({**state, "fc.weight": tensor}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


@pytest.mark.parametrize("network", [["tiny"], {}, None, 7, "r51"])
def test_a_config_that_is_not_one(state, tmp_path, network):
    config = {"network": network, "use_se": False}
    torch.save({"config": config, "model": dict(state)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "not those of network")


def test_a_state_dict_that_is_not_one(tmp_path):
    for model in ({1: 2}, {"fc.weight": "x"}, {1: torch.zeros(1)}):
        torch.save({"config": {"network": "tiny", "use_se": 0}, "model": model}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "is no tensor")


@pytest.mark.parametrize("odd", [torch.zeros(2), torch.tensor(3), "1\n2", [1], float("nan"), None])
def test_metadata_that_are_not_numbers_are_left_out(state, tmp_path, odd):
    config = {"network": "tiny", "use_se": False, "seed": odd}
    torch.save({"config": config, "model": dict(state), "epoch": odd}, tmp_path / "x.pt")
    _, about = load_embedder(tmp_path / "x.pt", device=CPU)
    assert about == {"kind": "ours", "network": "tiny"}


def test_half_precision_is_read(state, tmp_path):
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    torch.save(halves, tmp_path / "x.pt")
    embed, _ = load_embedder(tmp_path / "x.pt", device=CPU, network="tiny")
    assert embed(torch.zeros(1, 112, 112, 3, dtype=torch.uint8)).dtype == torch.float32
    check_weights(state, "x.pt")


def test_a_compressed_checkpoint_is_a_bomb(tmp_path):
    torch.save({"x": torch.zeros(400 << 20, dtype=torch.uint8)}, tmp_path / "big.pt")
    packed = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile(tmp_path / "big.pt") as plain, packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    assert (tmp_path / "bomb.pt").stat().st_size < 3_000_000
    refused(tmp_path / "bomb.pt", "is compressed")
