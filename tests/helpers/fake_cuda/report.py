"""What a process with fake GPUs did: kernels, copies, and waits of the host, by line."""

from __future__ import annotations

import collections
import ctypes
import os
import sys

from tests.helpers.paths import ROOT

# The order of the enum in fakecuda.c.
EVENTS = ["stream sync", "device sync", "event sync", "H2D pinned", "H2D pageable", "D2H"]
EVENTS += ["D2D", "launch", "malloc", "free", "host alloc", "memset"]
WAITS = ("stream sync", "device sync", "event sync")
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64)


class Report:
    """Counts of what happened, from any thread; `str` of it has a line per event and place."""

    def __init__(self) -> None:
        self.counts: collections.Counter = collections.Counter()  # (event, line)
        self.bytes: collections.Counter = collections.Counter()
        self.library_kernels = 0  # of cuDNN and cuBLAS, which are not called
        self.differences: collections.Counter = collections.Counter()  # between CPU and CUDA forms
        self.is_on = True
        self.library = ctypes.CDLL(os.environ["FAKE_CUDA_LIBRARY"])
        for name in ("count", "used"):
            getattr(self.library, f"fake_cuda_{name}").restype = ctypes.c_uint64
        self.library.fake_cuda_set_total.argtypes = [ctypes.c_uint64]
        self._hook = HOOK(self._on_event)  # kept: C holds a pointer to it

    def start(self) -> None:
        """Have the stand-in report each event."""
        self.library.fake_cuda_set_hook(self._hook)

    def stop(self) -> None:
        """Count nothing more."""
        self.is_on = False

    def _on_event(self, event: int, size: int) -> None:
        if self.is_on:
            self.note(EVENTS[event], size)

    def note(self, event: str, size: int = 0) -> None:
        """Count an event at the line of the project that is running."""
        line = self._line()
        self.counts[event, line] += 1
        self.bytes[event, line] += size

    @staticmethod
    def _line() -> str:
        frame, root = sys._getframe(1), f"{ROOT}/"
        while frame:
            name = frame.f_code.co_filename
            if name.startswith(root) and "/fake_cuda/" not in name and "/.venv/" not in name:
                return f"{name.removeprefix(root)}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def clear(self) -> None:
        """Begin to count anew."""
        self.counts.clear()
        self.bytes.clear()

    def waits(self) -> dict[str, int]:
        """{line: how often it made the host wait for the device}."""
        lines: collections.Counter = collections.Counter()
        for (event, line), count in self.counts.items():
            if event in WAITS or event.startswith("op"):
                lines[line] += count
        return dict(lines)

    def launches(self) -> int:
        """Kernels since the start of the process."""
        return self.library.fake_cuda_count(EVENTS.index("launch")) + self.library_kernels

    def memory(self, device: int = 0) -> int:
        """Bytes that a device has given out."""
        return self.library.fake_cuda_used(device)

    def set_total_memory(self, size: int) -> None:
        """Let each device have so many bytes from now on."""
        self.library.fake_cuda_set_total(size)

    def contexts(self, devices: int) -> list[int]:
        """The devices that this process has a context on."""
        return [d for d in range(devices) if self.library.fake_cuda_active(d)]

    def __str__(self) -> str:
        lines = []
        for (event, line), count in self.counts.most_common():
            lines.append(f"{count:9,}  {event:22} {self.bytes[event, line]:14,} bytes  {line}")
        return "\n".join(lines)
