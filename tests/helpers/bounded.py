"""Run a function in a process of its own with little memory, to see that it neither takes more nor
brings the interpreter down."""

import multiprocessing
import resource
from pathlib import Path

import cv2
import torch


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit_memory(megabytes: int) -> tuple[int, int]:
    """Let this process take so much more address space; returns the limits as they were."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (megabytes << 20), before[1]))
    return before


def _child(pipe, megabytes, function, arguments):
    cv2.setNumThreads(0)  # a fork has none of its parent's threads
    torch.set_num_threads(1)
    limit_memory(megabytes)
    try:
        pipe.send((function(*arguments), None))
    except Exception as error:
        pipe.send((None, error))


def within(megabytes: int, function, *arguments):
    """What function(*arguments) returns or raises, where it may take so many MB more."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, megabytes, function, arguments))
    process.start()
    there.close()
    try:
        result, error = here.recv()
    except EOFError:
        raise AssertionError(f"the interpreter died, exit code {process.exitcode}") from None
    finally:
        process.join(60)
    if error is not None:
        raise error
    return result
