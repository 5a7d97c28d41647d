"""bench/gpu.py without a GPU: parts that fail or are skipped, the JSON, the table."""

import json

import pytest
import torch

from bench import common, gpu
from bench.gpu_parts import Skipped, require_packages

MACHINE = {"gpu": "none"}


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "results" / "gpu.json", MACHINE)


def status(results, name):
    """The status of a part as the file has it."""
    return json.loads(results.path.read_text())["parts"][name]["status"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failing_part_is_recorded_and_does_not_stop_the_next(results):
    def fails():
        raise AssertionError({"apart": 3.0})

    results.run("fails", fails)
    assert status(results, "fails") == "failed"
    results.run("holds", lambda: {"apart": 0.0})
    assert status(results, "holds") == "ok"
    assert results.failed == ["fails"]
    assert "3.0" in results.content["parts"]["fails"]["reason"]


def test_a_part_whose_package_is_missing_is_skipped_with_the_reason(results):
    def needs_mtcnn():
        raise ModuleNotFoundError("No module named 'mtcnn'")

    def one_gpu():
        raise Skipped("this machine has one GPU")

    results.run("detections", needs_mtcnn)
    results.run("two_processes", one_gpu)
    assert status(results, "detections") == status(results, "two_processes") == "skipped"
    assert "mtcnn" in results.content["parts"]["detections"]["reason"]
    assert not results.failed


def test_rows_measured_before_a_failure_are_in_the_file(results):
    def rows():
        yield {"stage": "first"}
        # What a run that is cut off here has left.
        assert json.loads(results.path.read_text())["parts"]["train"]["result"]
        raise RuntimeError("the GPU is gone")

    results.run("train", rows)
    entry = json.loads(results.path.read_text())["parts"]["train"]
    assert entry["status"] == "failed"
    assert entry["result"] == [{"stage": "first"}]


def test_a_speed_ends_after_the_row_in_which_the_time_is_over(results):
    results.run("train", lambda: gpu.rows_until(iter([{"stage": "a"}, {"stage": "b"}]), end=0.0))
    assert status(results, "train") == "skipped"
    assert results.content["parts"]["train"]["result"] == [{"stage": "a"}]


def test_the_file_is_replaced_in_one_operation(results, monkeypatch):
    results.write()
    before = results.path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(results.path), "replace", full_disk)
    results.content["parts"]["more"] = {}
    with pytest.raises(OSError, match="no space"):
        results.write()
    assert results.path.read_bytes() == before


def test_the_table_has_each_speed_beside_its_floor(results):
    fits = {"stage": "train r50", "images_per_s": 2500.0, "floor": 10000.0, "peak_gb": 17.6}
    too_large = {"stage": "train r100", "images_per_s": 0.0, "floor": 5000.0, "peak_gb": 0.0}
    results.run("train", lambda: iter([fits | {"note": ""}, too_large | {"note": "does not fit"}]))
    table = gpu.markdown(results.content)
    assert "| train r50 | 2,500.0 | 10,000 | 25% | 17.60 |  |" in table
    assert "| train r100 | - | 5,000 | 0% | 0.00 | does not fit |" in table


@pytest.mark.parametrize("gigabytes", [2, 4, 8, 16, 80])
def test_the_roofline_is_measured_within_the_free_memory(monkeypatch, gigabytes):
    free = gigabytes * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    size, copied = common.roofline_sizes(torch.device("cuda", 0))
    assert 4 * 4 * size**2 <= free / 2  # operands and product in float32
    assert 2 * copied <= free / 2  # source and target


def test_tf32_is_off_within_the_block_and_as_before_after_it():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with common.without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_packages_of_the_detector_that_are_missing_skip_its_parts(results):
    results.run("align", lambda: require_packages("torch", "no_such_package"))
    assert status(results, "align") == "skipped"
    assert results.content["parts"]["align"]["reason"] == "not installed: no_such_package"
