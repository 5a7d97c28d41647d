"""tools.export: the same embeddings as PyTorch's, the same accuracy by lfw_eval.py, the card."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from config import parse_args
from evaluation import onnx_export
from evaluation.embedders import TRAIN_INPUT, load_embedder, load_network
from evaluation.model_card import model_card
from fileio.checkpoint_file import save_checkpoint
from models import build_model
from tests.helpers.paths import ROOT
from tests.helpers.photos import write_people, write_test_set
from tools import export

FACES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8))


def write_checkpoint(path):
    torch.manual_seed(0)
    path.parent.mkdir(parents=True)
    model = build_model("tiny", emb_size=16)
    for module in model.modules():  # statistics that a folding in a wrong place would show
        if hasattr(module, "running_mean"):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    config = {"network": "tiny", "use_se": False, "margin": "arcface", "lr": 0.1, "fuse": "sum"}
    save_checkpoint(path, {"config": config | {"seed": 4}, "model": model.state_dict(), "epoch": 2})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, a test set, and the files that the command makes of the run."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "runs" / "20250601-000000-tiny-s4" / "best.pt")
    write_people(folder / "people")
    write_test_set(folder / "people", folder / "data" / "lfw.bin")
    return folder


@pytest.fixture(scope="module")
def best(world):
    return world / "runs" / "20250601-000000-tiny-s4" / "best.pt"


@pytest.fixture
def run(world, monkeypatch, capsys):
    """A function that runs the tool: (exit status, stdout, stderr)."""
    monkeypatch.chdir(world)

    def run(*argv):
        capsys.readouterr()
        try:
            export.main(parse_args([*map(str, argv)], "export", export.Settings))
        except SystemExit as error:
            return error.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def embed(path, **options):
    embedding, _ = load_embedder(path, device=torch.device("cpu"), flip=False, **options)
    return embedding(FACES)


def command(world, script, *flags):
    """What a script, run as a command in the world's folder, printed."""
    done = subprocess.run(
        [sys.executable, *script, *map(str, flags)], cwd=world, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accuracy_is_the_checkpoints_to_the_last_digit(world, best):
    flags = ["--data-dir", "data", "--runs-dir", "runs", "--images-dir", "images"]
    evaluate = [str(ROOT / "lfw_eval.py")]
    command(world, evaluate, *flags)
    printed = command(world, ["-m", "tools.export"], "--data-dir", "data", "--runs-dir", "runs")
    assert f"Wrote {best.relative_to(world).with_suffix('.onnx')}, " in printed
    assert "32 images of noise" in printed  # the set is a .bin
    command(world, evaluate, *flags, "--checkpoint", best.with_suffix(".onnx"))
    results = [json.loads(path.read_text()) for path in world.glob("runs/*/lfw.json")]
    assert len(results) == 2
    assert results[0]["fold_accuracies"] == results[1]["fold_accuracies"]
    assert results[0]["fold_thresholds"] == pytest.approx(results[1]["fold_thresholds"], abs=1e-5)
    card = best.with_suffix(".md").read_text("utf-8")
    ours = json.loads((best.parent / "lfw.json").read_text())
    assert f"| accuracy | {100 * ours['accuracy']:.3f} %, [" in card
    assert f'"value": {round(ours["accuracy"], 5)}' in card


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--normalised", "--raw-pixels"), marks=pytest.mark.slow),
        pytest.param(("--fp16",), marks=pytest.mark.slow),
    ],
)
def test_embeddings_are_pytorchs_for_any_batch(run, best, tmp_path, flags):
    path = tmp_path / "new" / "face.onnx"
    code, printed, _ = run(best, "--output", path, *flags)
    assert code == 0, printed
    assert "onnxruntime against PyTorch on 32 " in printed
    exact = embed(best)
    assert (embed(path) - exact).abs().max() < (1e-2 if "--fp16" in flags else 1e-5)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,), (output,) = session.get_inputs(), session.get_outputs()
    raw = "--raw-pixels" in flags
    assert (entry.name, output.name) == ("input", "embedding")
    assert entry.shape[1:] == ([112, 112, 3] if raw else [3, 112, 112])
    assert entry.type == ("tensor(uint8)" if raw else "tensor(float)")
    assert isinstance(entry.shape[0], str)
    images = FACES.numpy()
    if not raw:
        images = ((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    whole = session.run(None, {"input": images})[0]
    single = np.concatenate([session.run(None, {"input": images[i : i + 1]})[0] for i in range(5)])
    np.testing.assert_allclose(single, whole, atol=1e-4)
    lengths = np.linalg.norm(whole, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == ("--normalised" in flags)
    metadata = session.get_modelmeta().custom_metadata_map
    assert ("mean" in metadata) != raw
    assert metadata["embedding"] == ("L2-normalised" if "--normalised" in flags else "unnormalised")
    model = onnx.load(path)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    # InsightFace's model zoo looks for these among the first eight nodes: then pixels are 0..255.
    first = " ".join(node.name.lower() for node in model.graph.node[:8])
    assert any(word in first for word in ("sub", "mul")) == raw


def test_safetensors_hold_the_weights_and_the_settings(run, best, tmp_path):
    path = tmp_path / "face.safetensors"
    assert run(best, "--output", path)[0] == 0
    assert torch.equal(embed(path, network="tiny"), embed(best))
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["network"] == "tiny"
    assert json.loads(about["config"])["lr"] == 0.1


@pytest.mark.slow
def test_a_third_party_model_keeps_its_input(run, best, tmp_path):
    torch.save(load_network(best).model.state_dict(), tmp_path / "theirs.pth")
    path = tmp_path / "theirs.onnx"
    flags = ["--network", "tiny", "--input-mean", "0.4", "0.5", "0.6", "--bgr", "--raw-pixels"]
    code, printed, _ = run(tmp_path / "theirs.pth", "--output", path, *flags)
    assert code == 0, printed
    spec = TRAIN_INPUT._replace(mean=(0.4, 0.5, 0.6), bgr=True)
    theirs = embed(tmp_path / "theirs.pth", network="tiny", spec=spec)
    assert (embed(path) - theirs).abs().max() < 1e-5
    card = path.with_suffix(".md").read_text("utf-8")
    assert "| training | not recorded |" in card
    assert "Not evaluated" in card


@pytest.mark.parametrize("difference", [1.1e-4, float("nan")])
def test_a_model_that_differs_is_not_written(run, best, tmp_path, monkeypatch, difference):
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *_: b"model")
    monkeypatch.setattr(onnx_export, "largest_difference", lambda *_: difference)
    code, _, message = run(best, "--output", tmp_path / "face.onnx")
    assert code == 2
    assert "differ from PyTorch's" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing.pt"], "nothing.pt"),
        (["model.onnx"], "model.onnx is an ONNX model already"),
        (["BEST", "--output", "x.pb"], "must end in .onnx or .safetensors"),
        (["BEST", "--output", "x.safetensors", "--fp16"], "--fp16 is for ONNX"),
    ],
)
def test_what_does_not_go_together(run, best, argv, message):
    argv = [str(best) if arg == "BEST" else arg for arg in argv]
    code, _, printed = run(*argv)
    assert code == 2
    assert message in printed


def test_the_card_says_what_shaped_the_model():
    config = {"lr": 0.1, "margin": "arcface", "fuse": "sum", "data_dir": "data", "keep": "a|b\nc"}
    card = model_card("face", config, {"network": "r50"}, None, {"PyTorch": "2"}, "research only")
    front, title, *_ = card.split("\n# ")
    assert front.splitlines()[1:3] == ['license: "other"', 'license_name: "research only"']
    assert title.startswith("face\n")
    for row in ("| architecture | r50 |", "| `lr` | 0.1 |", "| PyTorch | 2 |"):
        assert row in card
    assert "| `keep` | a\\|b c |" in card
    assert "fuse" not in card  # of lfw_eval.py
    assert "data_dir" not in card
