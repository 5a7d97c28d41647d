"""The network, its head and its optimiser, and the step of SGD that updates all three.

    engine = Engine(model, head, nn.CrossEntropyLoss(), optimizer, device=device, slice_size=512)
    engine.train()
    result = engine.train_step(images, labels, lr=0.1, step=0)
    result.loss, result.accuracy, result.gradient_norm    # tensors, still on the device

In a group of processes each computes its slice of the batch: `images` and `labels` are the slice,
losses and numbers of correct predictions are those of the whole batch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_gen import Batch
from distributed.collectives import all_reduce_sum, any_rank, even_slice
from distributed.data_parallel import broadcast_buffers, no_gradient_sync, wrap_ddp
from distributed.process_group import world_size
from heads.base import Criterion, Head, HeadLoss
from training.checkpoints import load_momentum
from training.ema import ModelEMA
from training.loss_scaler import LossScaler, create_momentum
from utils import FACE_SIZE, UserError, autocast_dtype, conv_layout, dtype_name

COMPILED_STEPS = 2000  # compiling takes a minute, which pays off in runs of that many steps


class StepResult(NamedTuple):
    """The result of a step on the whole batch; scalar tensors on the device."""

    loss: Tensor  # mean, with the margin
    accuracy: Tensor  # share of images whose nearest class centre is their own
    gradient_norm: Tensor  # before clipping


class Engine:
    """All that a step changes, except for the counters of a run."""

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        criterion: Criterion,
        optimizer: torch.optim.SGD,
        *,
        device: torch.device,
        slice_size: int,
        accumulate: int = 1,
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
        amp: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        """`model` and `head` are on `device`, `optimizer` is build_optimizer's for the two.

        `slice_size` is the size of the largest slice of a batch, `accumulate` the number of
        micro-batches that a slice is computed in, one after the other. `clip_norm` 0 clips nothing,
        `ema_decay` 0 keeps no average. `amp` is what the network is autocast to, None: float32.
        """
        self.model, self.head, self.criterion = model, head, criterion
        self.optimizer, self.device = optimizer, device
        self.slice_size, self.accumulate = slice_size, accumulate
        self.clip_norm, self.amp = clip_norm, amp
        # GPUs with bfloat16 have TF32, too, for what is computed in float32.
        has_tf32 = autocast_dtype(device) is torch.bfloat16
        self.layout = conv_layout(device, tensor_cores=amp is not None or has_tf32)
        model.to(memory_format=self.layout)
        self.replica = wrap_ddp(model)  # the model itself in one process
        self.forward = torch.compile(self.replica) if compiled else self.replica
        self.parameters = trainable_parameters(model, head)
        self.is_frozen = False  # whether steps train the head alone
        self.ema = ModelEMA(model, ema_decay) if ema_decay else None
        self.scaler = LossScaler(optimizer, device, enabled=amp is torch.float16)

    @property
    def number_format(self) -> str:
        """What the network computes in: bfloat16, float16 or float32."""
        return dtype_name(self.amp)

    @property
    def precision(self) -> str:
        """Number format, device and version: runs differ in the last digits where this differs."""
        threads = f", {torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else ""
        where = f"{self.device.type}{threads}"
        return f"{self.number_format} on {where}, PyTorch {torch.__version__}"

    # -------------------------------------------------------------------------- a step

    def train(self, mode: bool = True) -> None:
        """Put network and head into training mode, or into evaluation mode.

        A frozen network stays in evaluation mode: no dropout, and batch normalisation's statistics
        stay those of its weights.
        """
        self.model.train(mode and not self.is_frozen)
        self.head.train(mode)

    def freeze(self, frozen: bool) -> None:
        """Have steps train the head alone, until it is undone.

        The network then gets no gradients, so neither momentum nor weight decay move it. Its
        momentum is zero, as checkpoints hold all of it or none.
        """
        self.is_frozen = frozen
        if frozen:
            create_momentum(self.optimizer)

    def loss(self, images: Tensor, labels: Tensor, slice_size: int) -> HeadLoss:
        """The mean loss (with the margin) and the number of correct predictions (without).

        `images` (n, 3, 112, 112) and `labels` (n,) are this process's slice of a batch, n <=
        slice_size, which is the same in all processes.
        """
        # Batches of validation vary in size, and each size would be compiled anew.
        forward = self.forward if self.model.training else self.model
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            embedding = self.embed(images, forward)
        return self.head.loss(embedding, labels, self.criterion, slice_size)

    def embed(self, images: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, 3, 112, 112) to (n, emb_size), unnormalised, in the number format of the run."""
        images = images.contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return forward(images)

    def train_step(self, images: Tensor, labels: Tensor, lr: float, step: int) -> StepResult:
        """One step of SGD on a batch, of which (n, 3, 112, 112) and (n,) are this slice.

        `step` counts from the beginning of the run. Nothing here waits for a GPU.
        """
        self.optimizer.zero_grad()
        count = self.head.sample(labels, self.slice_size, step)  # images in the whole batch

        losses, correct = [], []
        for number in range(self.accumulate):
            # 10 images in 3 micro-batches: 0 to 3, 3 to 6, 6 to 10.
            rows = even_slice(len(labels), number, self.accumulate)
            largest = -(-self.slice_size // self.accumulate)
            # Gradients add up in .grad; processes exchange them once, with the last micro-batch.
            is_last = number == self.accumulate - 1
            with no_gradient_sync(self.replica, not is_last):
                result = self.loss(images[rows], labels[rows], largest)
                loss = result.loss
                if self.accumulate > 1:  # its mean counts by its share of the batch's images
                    loss = loss * (result.count / count)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            correct.append(result.num_correct)

        gradient_norm = self.clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        overflow = self.scaler.count(gradient_norm)  # None but in float16
        self.scaler.step(self.optimizer)
        self.head.update(self.optimizer, overflow)  # the centres that Partial FC has sampled
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(step)
        accuracy = sum(correct[1:], correct[0]) / count
        return StepResult(sum(losses[1:], losses[0]), accuracy, gradient_norm.detach())

    def trial_step(self, count: int) -> None:
        """A step on `count` black images, not compiled, to measure its memory.

        Weights and running statistics are of no use afterwards.
        """
        self.forward, self.slice_size, self.accumulate = self.model, count, 1
        shape = (count, 3, FACE_SIZE, FACE_SIZE)
        images = torch.zeros(shape, device=self.device)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.train_step(images, labels, lr=0.0, step=0)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], slice_size: int) -> tuple[float, float]:
        """Mean loss (with the margin) and accuracy (without) over batches, in evaluation mode."""
        broadcast_buffers(self.model)  # processes keep running statistics of their own slices
        self.train(False)
        loss = correct = count = 0.0
        for batch in batches:
            result = self.loss(batch.images, batch.labels, slice_size)
            loss += float(result.loss) * int(result.count)
            correct += float(result.num_correct)
            # Not the batch size: without a cache, corrupt images are left out only here.
            count += int(result.count)
        return loss / max(count, 1), correct / max(count, 1)

    def clip_gradients(self) -> Tensor:
        """Scale the whole gradient down to clip_norm if it is longer; returns its norm before.

        The loss scale is divided out of the gradient and of the norm.
        """
        # Of a sharded head each process has the gradient of its own centres. All other gradients
        # are the same in all processes and count once. The head's weight is the last parameter.
        sharded = self.head.sharded_parameters()
        replicated = self.parameters[:-1] if sharded else self.parameters
        replicated = [p for p in replicated if p.grad is not None]  # none of a frozen network
        norm = nn.utils.get_total_norm([p.grad for p in replicated]) if replicated else 0.0
        if sharded:
            local = nn.utils.get_total_norm([p.grad for p in sharded])
            norm = (norm**2 + all_reduce_sum(local.square())).sqrt()
        # The optimiser does not know sampled centres.
        norm = self.scaler.unscale(norm, [p for p in sharded if p is not self.head.weight])
        if self.clip_norm > 0:
            nn.utils.clip_grads_with_norm_([*replicated, *sharded], self.clip_norm, norm)
        return norm

    # -------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes, whatever the number of processes; complete in rank 0.

        Every process must call it: the class shards and their momentum are gathered.
        """
        optimizer = self.optimizer.state_dict()
        self._replace_head_momentum(optimizer, self.head.gather_rows)
        head = {name: self.head.gather_rows(v) for name, v in self.head.state_dict().items()}
        state = {"model": self.model.state_dict(), "head": head, "optimizer": optimizer}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Go back to what `state_dict` returned, in any number of processes; `path` is its file.

        Raises one of checkpoints.INCOMPATIBLE, or UserError, if it is not a state of this engine.
        """
        optimizer = dict(state["optimizer"])
        self._replace_head_momentum(optimizer, self.head.local_rows)
        self.model.load_state_dict(state["model"])
        head = {name: self.head.local_rows(v) for name, v in state["head"].items()}
        self.head.load_state_dict(head)
        load_momentum(self.optimizer, optimizer, path)
        if self.scaler.is_enabled():
            create_momentum(self.optimizer)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if "scaler" in state:  # else it was computed in another format
            self.scaler.load_state_dict(state["scaler"])

    def _replace_head_momentum(
        self, optimizer: dict[str, Any], change: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Apply `change` to the momentum of the head's weight in an optimiser's state dict.

        Parameters are numbered there, and the head's weight comes last.
        """
        last = len(self.parameters) - 1
        state = optimizer["state"].get(last, {})
        if state.get("momentum_buffer") is not None:  # before the first step there is none
            changed = {**state, "momentum_buffer": change(state["momentum_buffer"])}
            optimizer["state"] = {**optimizer["state"], last: changed}

    def is_finite(self) -> bool:
        """Whether all weights and running statistics, of all processes, are finite."""
        tensors = [*self.model.state_dict().values(), *self.head.state_dict().values()]
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        return not any_rank(not finite)[0]


def trainable_parameters(model: nn.Module, head: Head) -> list[nn.Parameter]:
    """Those of the network, then those of the head; the weight of a sharded head comes last."""
    return [p for module in (model, head) for p in module.parameters() if p.requires_grad]


def build_optimizer(
    model: nn.Module,
    head: Head,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay_bn: bool = True,
    backbone_lr_factor: float = 1.0,
) -> torch.optim.SGD:
    """SGD with momentum on network and head.

    `decay_bn` false: no weight decay on parameters of one dimension, which are those of batch
    normalisation and PReLU, and biases. The network's learning rate is `backbone_lr_factor` times
    the head's.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    head_parameters = set(head.parameters())
    for parameter in trainable_parameters(model, head):
        factor = 1.0 if parameter in head_parameters else backbone_lr_factor
        groups.setdefault((decay_bn or parameter.dim() > 1, factor), []).append(parameter)
    ordered = [  # those without decay first, so that the head's weight stays last
        {"params": params, "weight_decay": weight_decay * decays, "lr_factor": factor}
        for (decays, factor), params in sorted(groups.items(), key=lambda group: group[0][0])
    ]
    fused = head.weight.device.type in ("cpu", "cuda")
    return torch.optim.SGD(ordered, lr=lr, momentum=momentum, fused=fused)


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raise UserError if a micro-batch could have one image, of which BN has no variance."""
    if batch_size < 2 * world_size() * accumulate:
        raise UserError(
            f"--batch-size {batch_size} leaves fewer than two images to each of {world_size()} "
            f"processes in {accumulate} gradient accumulation steps; take a larger one."
        )


def choose_compile(asked: str, device: torch.device, steps: int, demanded: bool = True) -> str:
    """Whether a run of `steps` steps is compiled, "on" or "off"; `asked` is --compile.

    Raises UserError if it is "on" and there is no compiler. If that was not `demanded` now, but
    when a run began that is resumed on another machine, the run goes on uncompiled.
    """
    missing = ""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        missing = "a C++ compiler (g++)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "the triton package"
    if missing and asked == "on" and demanded:
        raise UserError(f"--compile on needs {missing}; install it, or leave it out.")
    if asked == "off" or (asked == "auto" and steps < COMPILED_STEPS):
        return "off"
    if missing:
        began = "The run began compiled and goes on uncompiled. " if asked == "on" else ""
        print(f"{began}Training would be faster with {missing}, which torch.compile needs.")
        return "off"
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs uncompiled
    return "on"
