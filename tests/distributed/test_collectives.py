"""Collectives in groups of two processes, and the slices that each process takes."""

import pytest

from distributed.collectives import even_slice
from fileio.checkpoint_file import load_checkpoint


def test_slices_cover_and_differ_by_one():
    for count in (0, 1, 7, 8, 1000):
        for parts in (1, 2, 3, 7):
            slices = [even_slice(count, number, parts) for number in range(parts)]
            numbers = [i for s in slices for i in range(s.start, s.stop)]
            assert numbers == list(range(count))
            sizes = [s.stop - s.start for s in slices]
            assert max(sizes) - min(sizes) <= 1


def test_collectives_of_two_processes(groups, tmp_path):
    printed = groups.run(tmp_path, 2, "collectives")
    assert printed == ["", ""]
    actual = load_checkpoint(tmp_path / "collectives.pt")
    assert actual == {
        "sum": [3.0, 30.0],
        "max": [2.0, 20.0],
        "any": (True, False),
        "objects": [0, 1],
        "gathered": [0, 1, 2, 3, 4],
        "from main": [0, 0],
        "only main": [0, None],
    }


@pytest.mark.parametrize(("runner", "rank"), [("run_on_main", 0), ("run_on_all", 1)])
def test_an_error_of_one_process_ends_all_and_is_printed_once(groups, tmp_path, runner, rank):
    printed, codes = groups.run(tmp_path, 2, "failing_work", runner, rank, fails=True)
    assert codes == [2, 2]
    assert f"It failed in rank {rank}." in printed[rank]
    assert printed[1 - rank] == ""
