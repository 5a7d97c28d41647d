"""train.py in which something happens to one process: what test_groups.py runs under torchrun.

    train_with_fault.py FAULT RANK STEP [train.py's flags]

At its step STEP, process RANK gets SIGKILL ("kill") or SIGINT ("interrupt"), is out of memory
("memory"), or finds little memory free for its cache from the start ("little").
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import data_gen
import train
from config import parse_args
from distributed.process_group import rank
from training import run, run_report

fault, where, when, *flags = sys.argv[1:]
train_step, steps = run.Run.train_step, []


def step_with_fault(self, *arguments):
    steps.append(1)
    if rank() == int(where) and len(steps) == int(when):
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return train_step(self, *arguments)


if fault == "little" and os.environ["RANK"] == where:
    data_gen.available_memory = lambda: 0
    torch.cuda.mem_get_info = lambda device: (0, 0)
run.Run.train_step = step_with_fault
run_report.plot_curves = lambda *_: None
sys.argv = ["train.py", *flags]
train.main(parse_args(flags, "train"))
