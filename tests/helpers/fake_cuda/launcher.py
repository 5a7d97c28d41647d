"""Start a script as on a machine with GPUs, and print what it made the host wait for.

    python -m tests.helpers.fake_cuda.launcher train.py --device cuda --train-set ...
    FAKE_CUDA_GB=8 FAKE_CUDA_CC=75 python -m tests.helpers.fake_cuda.launcher -m bench.gpu --quick

FAKE_CUDA_GB is the memory of a device (80), _CC its compute capability times ten (90), _DEVICES how
many there are (1), _ERROR the error code of a driver that is too old (35); _TRACE=1 prints kernels.
FAKE_CUDA_VALUES_BATCH is the largest batch of images that is computed: operations on a larger one
allocate and launch, which shows the memory and the kernels of a step in seconds, but no values.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fakecuda.c")


def reason_to_skip() -> str:
    """Why fake CUDA cannot be used here; empty if it can."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return "the CUDA stand-in is for Linux on x86-64"
    if shutil.which("gcc") is None:
        return "gcc, which compiles the CUDA stand-in, is not installed"
    import torch

    if torch.version.cuda is None:
        return "PyTorch is a CPU build"
    if importlib.util.find_spec("triton") is None:
        return "triton, which has some of CUDA's headers, is not installed"
    if cuda_headers() is None:
        return f"the headers of CUDA {torch.version.cuda} (nvidia-cuda-runtime) are not installed"
    if torch.cuda.is_available():
        return "there is a real GPU here: use make gpu"
    return ""


def cuda_headers() -> Path | None:
    """The folder with the headers of the CUDA that PyTorch was built for, as its wheels bring it.

    Not triton's headers: those of version 3.6, which PyTorch 2.11 for CUDA 13 needs, are CUDA 12's.
    """
    import torch

    spec = importlib.util.find_spec("nvidia")
    major = (torch.version.cuda or "").split(".")[0]
    for folder in spec.submodule_search_locations if spec else ():
        include = Path(folder) / f"cu{major}" / "include"
        if (include / "cuda_runtime_api.h").exists():
            return include
    return None


def build(folder: Path) -> Path:
    """Compile the stand-in for libcuda into a folder, unless it is there; its path."""
    library = folder / "libcuda.so.1"
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library
    # triton's after CUDA's own: they have crt/host_defines.h, which is macros for compilers.
    triton = Path(importlib.util.find_spec("triton").submodule_search_locations[0])
    includes = [f"-I{cuda_headers()}", f"-I{triton / 'backends' / 'nvidia' / 'include'}"]
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled beside it and renamed: two test processes may build at once.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / library.name
        command = ["gcc", "-O1", "-fPIC", "-shared", "-w", *includes]
        command += [f"-Wl,-soname,{library.name}", "-o", str(built), str(SOURCE)]
        subprocess.run([*command, "-lpthread", "-ldl"], check=True)
        built.replace(library)
    return library


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """The environment of a process with fake GPUs; `settings` are gb, cc, devices, ..."""
    library = build(folder)
    env = dict(os.environ)
    env |= {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    env["FAKE_CUDA_LIBRARY"] = env["LD_PRELOAD"] = str(library)
    env["LD_LIBRARY_PATH"] = f"{folder}:{env.get('LD_LIBRARY_PATH', '')}"
    return env


def main(argv: list[str]) -> None:
    """Run a script, or -m and a module, here, or in a process that has `environment`."""
    if not argv:
        raise SystemExit(__doc__)
    if "FAKE_CUDA_LIBRARY" not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}"
        module = "tests.helpers.fake_cuda.launcher"
        os.execve(sys.executable, [sys.executable, "-m", module, *argv], environment(folder))
    from tests.helpers.fake_cuda.interpreter import fake_cuda

    with fake_cuda() as report:
        is_module = argv[0] == "-m"
        sys.argv = argv[is_module:]
        run = runpy.run_module if is_module else runpy.run_path
        try:
            run(sys.argv[0], run_name="__main__")
        finally:
            report.stop()
            devices = report.contexts(int(os.environ.get("FAKE_CUDA_DEVICES", "1")))
            rank = os.environ.get("RANK", "0")
            print(
                f"\n--- fake CUDA: {report.launches():,} kernels; rank {rank}: contexts on devices "
                f"{devices}\n{report}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
