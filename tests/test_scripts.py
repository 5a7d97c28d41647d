"""The real scripts, run as a user runs them, from synthetic images to a number."""

import json
import signal
import subprocess
import sys
import time

import cv2
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.paths import ROOT

TRAIN = "--network tiny --emb-size 32 --batch-size 16 --margin-s 16 --dropout 0 --device cpu"


def run(command, expect=0, **options):
    """Run a script of the repository; returns what it printed."""
    process = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )
    output = process.stdout + process.stderr
    assert process.returncode == expect, output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which synthetic archives have been prepared, trained on and evaluated."""
    folder = tmp_path_factory.mktemp("demo")
    where = f"--data-dir {folder}/data --images-dir {folder}/images"
    runs = f"--runs-dir {folder}/runs"
    drawn = "--identities 6 --images-per-identity 6 --lfw-identities 24"
    printed = {
        "synthetic": run(f"-m tools.synthetic --output {folder}/data {drawn}"),
        "pre_process": run(f"pre_process.py {where}"),
        "train": run(f"train.py {where} {runs} {TRAIN} --epochs 2 --milestones 1"),
        "lfw_eval": run(f"lfw_eval.py {where} {runs}"),
    }
    return folder, printed


def test_the_way_from_archive_to_number(demo):
    folder, printed = demo
    for name in ("faces_webface_112x112", "faces_lfw_112x112"):
        for part in ("train.rec", "train.idx", "property", "index.tsv", "report.json"):
            assert (folder / "data" / name / part).stat().st_size > 0
    (run_dir,) = (folder / "runs").iterdir()
    assert {"best.pt", "last.pt", "lfw.json"} <= {path.name for path in run_dir.iterdir()}
    report = json.loads((run_dir / "lfw.json").read_text())
    assert 0.4 <= report["accuracy"] <= 1
    assert report["best_accuracy"] >= report["accuracy"] - 1e-9
    assert f"{100 * report['accuracy']:.3f} %" in printed["lfw_eval"]
    assert str(run_dir / "best.pt") in printed["lfw_eval"]
    lines = [line for line in printed["train"].splitlines() if line.startswith("epoch 2/2  loss")]
    assert len(lines) == 1
    assert "  lfw " in lines[0]
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = {"train/loss", "train/accuracy", "train/lr", "perf/images_per_s", "valid/loss"}
    tags |= {"valid/accuracy", "lfw/accuracy", "lfw/threshold"}
    assert tags <= set(events.Tags()["scalars"])


def test_the_images_are_those_of_the_readme(demo):
    folder, _ = demo
    images = folder / "images"
    for i in range(10):
        assert cv2.imread(str(images / f"{i}_raw.jpg")).shape == (250, 250, 3)
        assert cv2.imread(str(images / f"{i}_img.jpg")).shape == (112, 112, 3)
    (run_dir,) = (folder / "runs").iterdir()
    report = json.loads((run_dir / "lfw.json").read_text())
    for kind, count in (("fp", report["false_positives"]), ("fn", report["false_negatives"])):
        shown = sorted(images.glob(f"*_{kind}_?.jpg"))
        assert len(shown) == 2 * min(count, 10)
        assert all(cv2.imread(str(path)).shape == (250, 250, 3) for path in shown)
    curves = ["train_loss", "train_acc", "valid_loss", "valid_acc", "theta_dist", "roc"]
    assert all((images / f"{name}.png").is_file() for name in curves)


def test_a_second_pre_process_has_nothing_to_do(demo):
    folder, _ = demo
    record = folder / "data" / "faces_webface_112x112" / "train.rec"
    before = record.stat().st_mtime_ns
    run(f"pre_process.py --data-dir {folder}/data --images-dir {folder}/images")
    assert record.stat().st_mtime_ns == before


def test_ctrl_c_leaves_a_run_that_goes_on(demo, tmp_path):
    folder, _ = demo
    command = f"train.py --data-dir {folder}/data --images-dir {tmp_path}/images "
    command += f"--runs-dir {tmp_path}/runs"
    arguments = [sys.executable, *f"{command} {TRAIN} --epochs 200 --log-every 1".split()]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while "last.pt" not in {path.name for path in tmp_path.glob("runs/*/*")}:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    epoch = int(output.rsplit("Stopped at epoch ", 1)[1].split(",")[0])
    run(f"train.py --resume --runs-dir {tmp_path}/runs --epochs {epoch + 1}")
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("script", ["pre_process", "train", "lfw_eval"])
def test_no_data_gets_one_sentence_and_status_2(script, tmp_path):
    flags = f"--data-dir {tmp_path}/data --images-dir {tmp_path}/images"
    if script != "pre_process":
        flags += f" --runs-dir {tmp_path}/runs"
    output = run(f"{script}.py {flags}", expect=2)
    assert "make demo" in output
    assert str(tmp_path / "data") in output
    assert len(output.strip().splitlines()) <= 6
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script", ["-m tools.synthetic", "pre_process.py", "train.py", "lfw_eval.py"]
)
def test_every_script_explains_itself(script):
    assert "default" in run(f"{script} --help")
    assert "unrecognized" in run(f"{script} --no-such-flag", expect=2)


def test_importing_a_script_does_nothing(tmp_path):
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import " + ", ".join(names)
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
