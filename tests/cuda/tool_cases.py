"""Detection, evaluation and the tools on fake GPUs: what they give on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from config import parse_args
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tests.cuda.runs import run_main, train_run

DEVICES = ("cpu", "cuda")
IDENTITIES, EACH = 24, 4  # ten folds of identities that differ need 20


def detects_as_on_a_cpu(folder: Path, report) -> dict:
    """MTCNN on synthetic images: the same status, points within a thousandth of a pixel."""
    from fileio.images import decode_image
    from preprocessing.detector import FaceDetector, find_face
    from tests.helpers.synthetic_faces import face, image_without_face

    files = [face(0), face(1), face(2, 1), image_without_face()]
    images = np.stack([decode_image(data) for data in files])
    cpu, gpu = (find_face(FaceDetector(device, threads=1), images) for device in DEVICES)
    assert [a.status for a in cpu] == [b.status for b in gpu]
    found = [(a, b) for a, b in zip(cpu, gpu, strict=True) if a.points is not None]
    apart = max(float(np.abs(a.points - b.points).max()) for a, b in found)
    assert apart < 1e-3
    return {"points apart": apart}


def a_crowd_fits_into_8_gb(folder: Path, report) -> dict:
    """O-Net on 20,000 boxes, 11 GB if all were computed at once, and on the pixels of a batch."""
    from preprocessing.detector import FaceDetector
    from tests.helpers.fake_cuda import interpreter

    detector = FaceDetector("cuda")
    boxes = torch.tensor([[0.0, 0.0, 48.0, 48.0]], device="cuda").repeat(20_000, 1)
    index = torch.zeros(len(boxes), dtype=torch.long, device="cuda")
    pixels = torch.zeros(1, 250, 250, dtype=torch.int32, device="cuda")
    torch.cuda.empty_cache()
    report.set_total_memory(8 << 30)
    torch.cuda.reset_peak_memory_stats()
    interpreter.VALUES_BATCH = 16  # the sizes tell, not the values
    try:
        with torch.inference_mode():
            detector._refine(detector.onet, 48, pixels, index, boxes)
            images = torch.zeros(1000, 250, 250, 3, dtype=torch.uint8, device="cuda")
            detector._propose(images, 20, 2.0)  # no score reaches 2
    finally:
        interpreter.VALUES_BATCH = float("inf")
        report.set_total_memory(80 << 30)
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert 1 < peak < 4, peak
    return {"peak GB": peak}


# ------------------------------------------------------------------------------ evaluation


def on_both(folder: Path, report, module, name: str, line: str, model: str = "", kernels=True):
    """Run a script on the CPU and on CUDA, each in a folder of its own; returns those folders.

    "OUT" in `line` is that folder. `model` is a file to evaluate, a run's best.pt by default;
    results go beside it, so each folder has a copy. `kernels`: whether CUDA has launched some.
    """
    settings = [module.Settings] if hasattr(module, "Settings") else []
    folders = []
    for device in DEVICES:
        out = folder / f"{name}-{len(list(folder.glob(name + '-*')))}-{device}"
        out.mkdir()
        source = folder / model if model else trained_checkpoint(folder)
        copy = shutil.copy(source, out / source.name)
        argv = f"{line} --checkpoint {copy} --device {device}".replace("OUT", str(out)).split()
        before = report.launches()
        code, printed = run_main(module.main, parse_args(argv, name, *settings))
        assert not code, printed
        assert (report.launches() > before) == (kernels and device == "cuda"), printed
        folders.append(out)
    return folders


def trained_checkpoint(folder: Path) -> Path:
    """best.pt of a run on the CPU, which all evaluations share."""
    if not (folder / "evaluated").exists():
        train_run(folder, "evaluated", "--epochs 1", "cpu")
    return next((folder / "evaluated").glob("*/best.pt"))


def assert_same_numbers(a, b, where: str = "metrics") -> None:
    """Two JSON values agree: numbers within rounding, all else exactly."""
    if isinstance(a, dict):
        for key in set(a) - {"seconds", "checkpoint", "list", "date"}:
            assert_same_numbers(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_numbers(x, y, f"{where}[{index}]")
    elif isinstance(a, float):
        assert abs(a - b) < 1e-4 * max(1, abs(a)), (where, a, b)
    else:
        assert a == b, (where, a, b)


def assert_same_files(folders: list[Path], pattern: str) -> dict:
    """The JSON files that match `pattern` agree; returns CUDA's."""
    contents = [json.loads(next(folder.rglob(pattern)).read_text()) for folder in folders]
    assert_same_numbers(*contents)
    return contents[1]


def evaluates_as_on_a_cpu(folder: Path, report, model: str = "", more: str = "") -> dict:
    """lfw_eval.py: the same metrics of a run, of weights of others, of an ONNX model."""
    import lfw_eval
    from models import build_model
    from tests.helpers.onnx_files import write_onnx

    if model.endswith(".onnx"):
        write_onnx(folder / model, "n")
    elif model:
        torch.manual_seed(0)
        torch.save(build_model("tiny", emb_size=8).state_dict(), folder / model)
    line = f"--lfw {folder}/set/lfw.bin --images-dir OUT --data-dir {folder} --runs-dir OUT {more}"
    # onnxruntime's CUDA provider has no kernels here, so such a model runs on the CPU.
    kernels = not model.endswith(".onnx")
    folders = on_both(folder, report, lfw_eval, "lfw_eval", line, model, kernels)
    metrics = assert_same_files(folders, "lfw.json")
    return {"accuracy": metrics["accuracy"]}


def finds_wrong_labels_as_on_a_cpu(folder: Path, report) -> dict:
    """tools.label_noise: the same list of images to keep, angles within rounding."""
    from tools import label_noise

    line = f"--train-set {folder}/set --data-dir OUT --runs-dir OUT"
    folders = on_both(folder, report, label_noise, "label_noise", line)
    cpu, cuda = ((out / "keep.tsv").read_text().splitlines() for out in folders)
    assert len(cpu) == len(cuda) == 49  # a head and 48 images
    for a, b in zip(cpu[1:], cuda[1:], strict=True):
        for x, y in zip(a.split("\t"), b.split("\t"), strict=True):
            assert x == y or abs(float(x) - float(y)) < 0.011, (a, b)
    return {"images": len(cpu) - 1}


def write_identities(folder: Path) -> Path:
    """A set of IDENTITIES identities, EACH noisy images of every one."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.integers(0, 255, (IDENTITIES, 7, 7, 3)), EACH, 0)
    faces = np.clip(centres + rng.normal(0, 20, centres.shape), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(folder, jpegs, np.repeat(np.arange(IDENTITIES), EACH).tolist())
    return folder


def holds_out_as_on_a_cpu(folder: Path, report) -> dict:
    """tools.held_out: the same hardest impostors, then the same table over all pairs."""
    from tools import held_out

    where = f"--train-set {write_identities(folder / 'people')} --data-dir OUT --runs-dir OUT"
    line = f"{where} --make-pairs 40 --held-out-identities 20 --hard-negatives"
    folders = on_both(folder, report, held_out, "held_out", line)
    for name in ("held_out.txt", "held_out.bin"):
        cpu, cuda = ((out / name).read_bytes() for out in folders)
        assert cpu == cuda, name
    line = f"{where} --hold-out {folders[0]}/held_out.txt"
    folders = on_both(folder, report, held_out, "held_out", line)
    return {"images": assert_same_files(folders, "held_out.json")["pictures"]}


def evaluates_ijb_as_on_a_cpu(folder: Path, report) -> dict:
    """tools.ijb_eval: the same TAR at FAR and identification rates."""
    from tests.helpers.ijb_benchmark import write_benchmark
    from tools import ijb_eval

    line = f"--ijb {write_benchmark(folder / 'ijb')} --runs-dir OUT --images-dir OUT"
    folders = on_both(folder, report, ijb_eval, "ijb_eval", line)
    return {"pairs": assert_same_files(folders, "ijbc.json")["pairs"]}


CASES: list[tuple] = [
    (detects_as_on_a_cpu,),
    (a_crowd_fits_into_8_gb,),
    (evaluates_as_on_a_cpu,),
    (evaluates_as_on_a_cpu, "theirs.pth", "--network tiny"),
    (evaluates_as_on_a_cpu, "theirs.onnx"),
    (finds_wrong_labels_as_on_a_cpu,),
    (holds_out_as_on_a_cpu,),
    (evaluates_ijb_as_on_a_cpu,),
]
