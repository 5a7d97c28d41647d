"""What the processes of processes.py do; results are written into the working folder."""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import data_gen
import models
import pre_process
import train
from config import parse_args
from data_gen import Batch
from distributed import collectives as collectives_module
from distributed.collectives import (
    all_gather_objects,
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    gather_to_main,
    rank_slice,
    run_on_main,
)
from distributed.process_group import is_main, process_group, rank, world_size
from evaluation import embedders
from evaluation.embedders import torch_embedder
from evaluation.shared_set import evaluate_shared, open_lfw
from fileio.checkpoint_file import save_checkpoint
from fileio.recordio import RecordReader
from focal_loss import FocalLoss
from heads.partial_fc import PartialFC
from preprocessing import lfw_download, prepare
from tests.helpers import preload  # noqa: F401
from training import run as run_module
from training import run_report
from utils import UserError, exit_on_user_error


def run_train(argv, frozen_statistics=False, backwards=False):
    """train.py, with batch normalisation in evaluation mode if asked.

    With the images of each batch `backwards` the mathematics is the same and the rounding is not.
    """
    if backwards:
        train_batches = run_module.train_batches

        def turned(*args, **kwargs):
            for images, labels, positions in train_batches(*args, **kwargs):
                yield Batch(images.flip(0), labels.flip(0), positions[::-1])

        run_module.train_batches = turned
    if frozen_statistics:
        # Running statistics do not change, and are the same in all processes.
        def train_mode(self, mode=True):
            nn.Module.train(self, mode)
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            return self

        models.IResNet.train = train_mode
    run_report.plot_curves = lambda *_: None
    train.main(parse_args(argv, "train"))


def float16_steps():
    """Three steps in float16; in the second the gradient of rank 1's centres alone is infinite."""
    from tests.training.test_loss_scaler import make_batch, make_engine

    steps = []
    with process_group("cpu"):
        engine = make_engine(scale=1024.0, slice_size=4, ema_decay=0.9)
        images, labels = make_batch()
        mine = rank_slice(len(labels))
        for number in range(3):
            if number == 1 and rank() == 1:
                hook = engine.head.weight.register_hook(lambda grad: grad * torch.inf)
            norm = engine.train_step(images[mine], labels[mine], 0.1, number).gradient_norm
            if number == 1 and rank() == 1:
                hook.remove()
            step = {"norm": norm, "head": engine.head.weight.detach().clone()}
            step |= {"scale": engine.scaler.loss_scale, "skipped": engine.scaler.skipped_steps}
            step["model"] = {k: v.detach().clone() for k, v in engine.model.named_parameters()}
            averages = {k: engine.ema.average[k].clone() for k in step["model"]}
            steps.append(step | {"ema": averages})
        torch.save(steps, f"steps-{rank()}.pt")


def sharded_heads(orders):
    """Each process takes its slice of the batches; rank 0 writes losses and gathered gradients."""
    from tests.heads.test_partial_fc import CLASSES, EMB, MARGINS, problem

    results = {}
    with process_group("cpu"):
        for number, (labels, margin, gamma) in enumerate(orders):
            embedding, label, weight = problem(labels)
            head = PartialFC(EMB, CLASSES, MARGINS[margin], chunk=16)
            head.weight.data.copy_(weight[head.shard])
            mine = rank_slice(len(label))
            rows = embedding[mine].clone().requires_grad_()
            criterion = FocalLoss(gamma) if gamma else nn.CrossEntropyLoss()
            width = -(-len(label) // world_size())
            result = head.loss(rows, label[mine], criterion, width)
            result.loss.backward()
            gradients = all_gather_objects(rows.grad)
            weight_gradient = gather_to_main(head.weight.grad, CLASSES)
            results[str(number)] = {
                "loss": result.loss.detach(),
                "num_correct": int(result.num_correct),
                "embedding": torch.cat(gradients),
                "weight": weight_gradient,
            }
        if is_main():
            save_checkpoint("results.pt", results)


def collectives():
    """Each collective of two processes; rank 0 writes the results."""
    with process_group("cpu"):
        number = torch.tensor([1.0, 10.0]) * (rank() + 1)
        rows = torch.arange(5)[rank_slice(5)]
        results = {
            "sum": all_reduce_sum(number.clone()).tolist(),
            "max": all_reduce_max(number.clone()).tolist(),
            "any": any_rank(rank() == 1, False),
            "objects": all_gather_objects(rank()),
            "gathered": gather_to_main(rows, 5),
            "from main": all_gather_objects(run_on_main(rank)),
            "only main": all_gather_objects(run_on_main(rank, broadcast=False)),
        }
        if is_main():
            results["gathered"] = results["gathered"].tolist()
            save_checkpoint("collectives.pt", results)


@exit_on_user_error
def evaluate_together(lfw, batch):
    """Each process embeds its part of a set, or there is none; rank 0 writes all embeddings."""
    torch.manual_seed(0)
    model = models.build_model("tiny", emb_size=16)
    with process_group("cpu"):
        # The other processes need no file, and do not know that there is one.
        name = lfw if is_main() else "nowhere"
        shared = open_lfw(name, "nowhere", batch=batch, device=torch.device("cpu"))
        print(f"{0 if shared is None else len(shared.faces)} faces", file=sys.stderr)
        if shared is not None:
            result = evaluate_shared(
                torch_embedder(model, torch.device("cpu"), batch=batch), shared
            )
            if is_main():
                rows = torch.from_numpy(result.embeddings)
                save_checkpoint("lfw.pt", {"embeddings": rows, "metrics": result.metrics})


def cache_together(folder, short_of):
    """Rank 1 has no RAM for a cache ("room"), or finds out while it decodes ("memory")."""
    load_images = data_gen.load_images

    def load(*args, **kwargs):
        if rank() == 1 and short_of == "memory":
            raise MemoryError
        return load_images(*args, **kwargs)

    data_gen.load_images = load
    with process_group("cpu"):
        is_short = rank() == 1 and short_of == "room"
        data_gen.available_memory = lambda: 0 if is_short else 1 << 40
        reader = RecordReader(folder)
        split = data_gen.make_split(reader.labels, valid_fraction=0)
        store = data_gen.ImageStore(reader, split, torch.device("cpu"), workers=1)
        print(f"cache {store.cache}, {store.images is not None}", file=sys.stderr)


def train_with_full_memory(argv, failing_rank):
    """train.py, in which the memory of one process suffices for embedding no image."""
    embed_in_batches = embedders.embed_in_batches

    def embed(*args, **kwargs):
        if rank() == failing_rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embed_in_batches(*args, **kwargs)

    embedders.embed_in_batches = embed
    run_train(argv)


@exit_on_user_error
def failing_work(runner, failing_rank):
    """Work that fails in one process, run by run_on_main or run_on_all."""

    def work():
        if rank() == failing_rank:
            raise UserError(f"It failed in rank {failing_rank}.")

    with process_group("cpu"):
        getattr(collectives_module, runner)(work)


def train_until(argv, steps):
    """train.py, in which the last of the processes gets SIGTERM after so many steps."""
    at_step(steps, lambda: world_size() - 1, signal.SIGTERM)
    run_train(argv)


def train_and_die(argv, steps, rank):
    """train.py, in which process number `rank` is killed in the step after so many."""
    at_step(steps + 1, lambda: rank, signal.SIGKILL)
    run_train(argv)


def train_and_wait(argv, steps, fault):
    """train.py, in which rank 1 has a fault while rank 0 waits in C, as for a GPU, for ever."""

    def wait():
        while True:  # a signal ends the call, but Python's handler may not raise
            ctypes.CDLL(None).sleep(3600)

    def fail():
        raise UserError("It failed.")

    faults = {"error": fail, "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    do_at_step(steps + 1, lambda: faults[fault] if rank() else wait)
    run_train(argv)


def stop_together(argv):
    """train.py, in which rank 1 gets Ctrl-C; each process says whether its group is destroyed."""
    at_step(3, lambda: 1, signal.SIGINT)
    try:
        run_train(argv)
    finally:
        print("initialized:", torch.distributed.is_initialized())


def train_with_little_memory(argv, where):
    """train.py, in which process number `where` finds no memory for its cache."""
    if os.environ["RANK"] == str(where):
        data_gen.available_memory = lambda: 0
    run_train(argv)


def busy_and_finished():
    """Rank 0 holds Python's lock for longer than a watchdog is patient; rank 1 has finished."""
    with process_group("cpu"):
        if is_main():
            ctypes.PyDLL(None).sleep(4)
    print("initialized:", torch.distributed.is_initialized())


def download_in_group(argv):
    """pre_process.py --download-lfw, whose download notes who has come, and fails."""

    def download(folder):
        with Path("downloads.txt").open("a") as file:
            file.write(f"rank {rank()}\n")
        raise UserError("The host cannot be reached.")

    lfw_download.download_lfw = download
    pre_process.main(parse_args([*argv, "--download-lfw"], "pre_process"))


def at_step(count, who, number):
    """Have a process send itself a signal at the beginning of its step number `count`."""
    kill = lambda: os.kill(os.getpid(), number)  # noqa: E731
    do_at_step(count, lambda: kill if rank() == who() else lambda: None)


def do_at_step(count, choose):
    """Have each process do what `choose` returns in it at the beginning of its step `count`."""
    train_step, steps = run_module.Run.train_step, []

    def step(self, *args):
        steps.append(1)
        if len(steps) == count:
            choose()()
        return train_step(self, *args)

    run_module.Run.train_step = step


def run_pre_process(argv, block):
    """pre_process.py with blocks of `block` images."""
    prepare.BLOCK_IMAGES = block
    pre_process.main(parse_args(argv, "pre_process"))
