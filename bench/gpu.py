"""Check that a GPU computes what a CPU does, then time it: one command for a machine with a GPU.

    python -m bench.gpu                                    # under ten minutes, synthetic faces
    python -m bench.gpu --faces data/faces_webface_112x112 --minutes 20
    python -m bench.gpu --quick                            # a dry run: tiny network, few steps

Checks come first, then speeds beside the roofline, then real training for what is left of
--minutes. The JSON, bench/results/gpu-<name>.json, is written anew after every part, so that a run
that is cut off loses nothing. A part that fails is recorded with its reason, and the others still
run; a part whose packages are missing is skipped. Prints a Markdown table. Exit status: 1 if a part
failed, 2 without a GPU or a package that all parts need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

REPORTED = 300  # characters of a result that are printed
# What every part needs beside PyTorch: modules and the wheels that they come in.
NEEDED = {"numpy": "numpy", "cv2": "opencv-python-headless", "tqdm": "tqdm"}


class Results:
    """The JSON: machine, checks, roofline, speeds, failed parts; written after every change."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine, "parts": {}}

    def write(self) -> None:
        """Replace the file in one operation: it is complete, or still the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        temporary.replace(self.path)

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Run a part and record its result, or why it failed or was skipped; returns the result.

        A generator's rows are recorded one by one: those before a failure are kept.
        """
        from bench.gpu_parts import Skipped

        began = time.perf_counter()
        entry = self.content["parts"][name] = {"status": "running", "result": None}
        try:
            result = part()
            if isinstance(result, Iterable) and not isinstance(result, (dict, list)):
                entry["result"] = []
                for row in result:
                    entry["result"].append(row)
                    self.write()
            else:
                entry["result"] = result
            entry["status"] = "ok"
        except (Skipped, ImportError) as error:
            entry |= {"status": "skipped", "reason": str(error)}
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            entry |= {"status": "failed", "reason": reason[:1000]}
        entry["seconds"] = round(time.perf_counter() - began, 1)
        self.write()
        text = entry.get("reason") or json.dumps(entry["result"], default=str)
        line = f"{name:14} {entry['seconds']:6.1f} s  {entry['status']}: {text[:REPORTED]}"
        print(line, flush=True)
        return entry["result"]

    @property
    def failed(self) -> list[str]:
        """The names of the parts that failed."""
        parts = self.content["parts"].items()
        return [name for name, entry in parts if entry["status"] == "failed"]


def markdown(content: dict[str, Any]) -> str:
    """Checks and speeds as two tables for the README."""
    lines = [", ".join(f"{name} {value}" for name, value in content["machine"].items()), ""]
    lines += ["| part | status | result |", "|---|---|---|"]
    rows: list[dict[str, Any]] = []
    for name, entry in content["parts"].items():
        result = entry["result"]
        if isinstance(result, list):
            rows += result
        text = entry.get("reason", "")
        if isinstance(result, dict):
            numbers = {k: v for k, v in result.items() if isinstance(v, (bool, int, float))}
            text = ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        text = text[:160].replace("|", "/")  # a bar would end the cell
        lines.append(f"| {name} | {entry['status']} | {text} |")
    if rows:
        head = "| stage | images/s | floor | of it | peak GB | |"
        lines += ["", head, "|---|---|---|---|---|---|"]
    for row in rows:
        floor, rate = row["floor"], row["images_per_s"]
        best = f"{floor:,.0f} | {rate / floor:.0%}" if floor else " | "
        measured = f"{rate:,.1f}" if rate else "-"
        line = f"| {row['stage']} | {measured} | {best} | {row['peak_gb']:.2f} | {row['note']} |"
        lines.append(line)
    return "\n".join(lines)


def describe_gpu(device: Any) -> dict[str, Any]:
    """The machine and its GPU: capability, memory, and versions of cuDNN."""
    import torch

    from bench.common import describe_machine

    machine = describe_machine(device)
    free, total = torch.cuda.mem_get_info(device)
    return machine | {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gb": round(total / 2**30, 1),
        "gpu_free_gb": round(free / 2**30, 1),
        "cudnn": torch.backends.cudnn.version(),
    }


def parse_gpu_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--faces", type=Path, help="folder with train.rec (default: synthetic)")
    parser.add_argument(
        "--minutes", type=float, default=10, help="stop after that long (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--only", default="", help="names of parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps, no compile")
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="in a batch of the checks, which the CPU computes, too (default: 32, 8 with --quick)",
    )
    parser.add_argument("--launcher", default="", help="put before the name of a started script")
    return parser.parse_args(argv)


def rows_until(rows: Iterable[dict[str, Any]], end: float) -> Iterable[dict[str, Any]]:
    """The rows of a speed; raises Skipped after the first that ends later than `end`."""
    from bench.gpu_parts import Skipped

    for row in rows:
        yield row
        if time.perf_counter() > end:
            raise Skipped("the time is over; rows may be missing")


def run_parts(args: argparse.Namespace, context: Any, results: Results) -> None:
    """The checks, the roofline, the speeds, and real training if there is time."""
    from bench.common import measure_roofline
    from bench.gpu_checks import CHECKS
    from bench.gpu_parts import Skipped, free_memory
    from bench.gpu_speed import SPEEDS, real_training

    only = [name for name in args.only.split(",") if name]
    end = time.perf_counter() + 60 * args.minutes

    def run(name: str, part: Callable[[], Any], needed: bool = False) -> Any:
        if only and name not in only and not needed:
            return None
        if time.perf_counter() > end:

            def part() -> None:
                raise Skipped(f"{args.minutes:g} minutes are over")

        result = results.run(name, part)
        free_memory()
        return result

    for check in CHECKS:
        run(check.__name__, lambda check=check: check(context))
    wants_speeds = not only or any(part.__name__ in only for part in (*SPEEDS, real_training))
    roofline = run("roofline", lambda: measure_roofline(context.device, args.quick), wants_speeds)
    for speed in SPEEDS if roofline else ():
        run(speed.__name__, lambda speed=speed: rows_until(speed(context, roofline), end))
    if roofline:
        run("real_training", lambda: real_training(context, roofline, end))


def main(argv: Sequence[str]) -> int:
    """Run all parts; returns the exit status."""
    args = parse_gpu_arguments(argv)
    missing = [
        wheel for module, wheel in NEEDED.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        print(
            f"bench.gpu needs {', '.join(missing)}; run pip install {' '.join(missing)}, or carry "
            "the wheels to a machine without a network, as docs/performance.md shows.",
            file=sys.stderr,
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use, and bench.gpu needs one.", file=sys.stderr)
        return 2

    from bench.common import RESULTS
    from bench.gpu_parts import Context
    from bench.synthetic_inputs import records_or_synthetic

    device = torch.device("cuda", 0)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    results = Results(args.json or RESULTS / f"gpu-{name}.json", describe_gpu(device))
    results.write()
    with (
        tempfile.TemporaryDirectory() as work,
        records_or_synthetic(args.faces, 64 if args.quick else 2048) as faces,
    ):
        images = args.images or (8 if args.quick else 32)
        context = Context(device, faces, Path(work), args.quick, images, args.launcher)
        run_parts(args, context, results)
    print("\n" + markdown(results.content))
    print(f"\nWrote {results.path}")
    if results.failed:
        print(f"Failed: {', '.join(results.failed)}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
