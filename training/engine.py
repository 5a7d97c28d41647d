"""Network, head and optimiser, in one process or many, and the step of SGD that changes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config
from distributed.collectives import all_reduce_sum, even_slice
from distributed.data_parallel import convert_sync_batch_norm, no_gradient_sync, wrap_ddp
from distributed.process_group import world_size
from focal_loss import FocalLoss
from heads.base import Head, HeadLoss
from heads.registry import HEADS, build_head
from models import build_model
from training.activation_checkpointing import enable_activation_checkpointing
from training.checkpoints import load_momentum
from training.cpu_kernels import use_fast_cpu_kernels
from training.ema import ModelEMA
from utils import UserError, has_bfloat16


class Learner:
    """All that a step changes but its counters.

    With one process the head is one of margins.py; with many, or for very many classes, its centres
    are sharded (partial_fc.py) and each process computes its slice of the batch.
    """

    def __init__(self, cfg: Config, num_classes: int, device: torch.device) -> None:
        self.cfg, self.device, self.num_classes = cfg, device, num_classes
        try:
            options = {"dropout": cfg.dropout, "use_se": cfg.use_se, "zero_init": cfg.zero_init}
            model = build_model(cfg.network, cfg.emb_size, **options)
        except ValueError as error:  # a combination of settings that no network has
            raise UserError(str(error)) from None
        if cfg.batch_size < 2 * world_size() * cfg.accumulate:
            raise UserError(
                f"--batch-size {cfg.batch_size} leaves fewer than two images to each of "
                f"{world_size()} processes in {cfg.accumulate} parts; take a larger one."
            )
        if device.type == "cpu":
            use_fast_cpu_kernels(model)
        if cfg.checkpoint_activations:
            enable_activation_checkpointing(model)
        if cfg.sync_bn:
            model = convert_sync_batch_norm(model, device)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.head = self._build_head().to(device)
        self.replica = wrap_ddp(self.model)
        self.forward = torch.compile(self.replica) if cfg.compile == "on" else self.replica
        self.criterion = FocalLoss(cfg.focal_loss) if cfg.focal_loss else nn.CrossEntropyLoss()
        modules = (self.model, self.head)
        # The head's weight comes last: see `state`.
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self._groups(),
            lr=cfg.lr,
            momentum=cfg.momentum,
            fused=device.type in ("cpu", "cuda"),
        )
        self.ema = ModelEMA(self.model, cfg.ema) if cfg.ema else None
        self.amp = cfg.amp and has_bfloat16(device)
        self.width = -(-cfg.batch_size // world_size())  # most images of a batch for a process

    def _groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups: what --no-decay-bn spares first, the head's weight last."""
        decay, spared = self.cfg.weight_decay, []
        if not self.cfg.decay_bn:
            spared = [p for p in self.parameters if p.dim() <= 1]
        others = [p for p in self.parameters if self.cfg.decay_bn or p.dim() > 1]
        groups = [{"params": spared, "weight_decay": 0.0}] if spared else []
        return [*groups, {"params": others, "weight_decay": decay}]

    def _build_head(self) -> Head:
        """The head with the margin that is asked for; UserError where that cannot be."""
        cfg = self.cfg
        options = dict(cfg.margin_options)
        if cfg.easy_margin:
            if "easy_margin" not in HEADS[cfg.margin].options:
                raise UserError(f"--margin {cfg.margin} has no --easy-margin; leave it out.")
            options["easy_margin"] = True
        if cfg.focal_loss and not HEADS[cfg.margin].is_softmax:
            raise UserError(
                f"--focal-loss weights a softmax, and --margin {cfg.margin} has a loss of its own; "
                "leave one of them out."
            )
        try:
            return build_head(
                cfg.margin,
                cfg.emb_size,
                self.num_classes,
                margin_s=cfg.margin_s,
                margin_m=cfg.margin_m,
                options=options,
                batch_size=cfg.batch_size,
                sample_rate=cfg.sample_rate,
                seed=cfg.seed,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def precision(self) -> str:
        """What it computes in, on what and by what: the same bits come of the same only."""
        kind = "bfloat16" if self.amp else "float32"
        threads = f", {torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else ""
        return f"{kind} on {self.device.type}{threads}, PyTorch {torch.__version__}"

    # -------------------------------------------------------------------------- a step

    def train(self, mode: bool = True) -> None:
        """Be in training mode, or in evaluation mode: network and head."""
        self.model.train(mode)
        self.head.train(mode)

    def loss(self, images: Tensor, labels: Tensor, width: int) -> HeadLoss:
        """The mean loss (with the margin) of a batch and who is right (without it).

        `images` and `labels` are this process's slice, `width` the largest slice's length.
        """
        # Batches of validation vary in size, and each size would be compiled anew.
        forward = self.forward if self.model.training else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            embedding = forward(images)
        return self.head.loss(embedding, labels, self.criterion, width)

    def train_step(
        self, images: Tensor, labels: Tensor, lr: float, step: int
    ) -> tuple[Tensor, ...]:
        """One step of SGD; loss, accuracy and the gradient's norm, still on the device.

        All three are the whole batch's, of which `images` and `labels` are this process's slice.
        """
        self.optimizer.zero_grad()
        count = self.head.sample(labels, self.width, step)  # images in the whole batch
        losses, correct, parts = [], [], self.cfg.accumulate
        for number in range(parts):
            rows = even_slice(len(labels), number, parts)
            with no_gradient_sync(self.replica, number < parts - 1):
                result = self.loss(images[rows], labels[rows], -(-self.width // parts))
                loss = result.loss if parts == 1 else result.loss * (result.count / count)
                loss.backward()
            losses.append(loss.detach())
            correct.append(result.num_correct)
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.head.update(self.optimizer)
        if self.ema is not None:
            self.ema.update(step)
        return sum(losses[1:], losses[0]), sum(correct[1:], correct[0]) / count, norm.detach()

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, which is then shortened to --clip-norm."""
        sharded = self.head.sharded_parameters()
        replicated = self.parameters[:-1] if sharded else self.parameters
        norm = nn.utils.get_total_norm([p.grad for p in replicated])
        if sharded:
            local = nn.utils.get_total_norm([p.grad for p in sharded])
            norm = (norm.square() + all_reduce_sum(local.square())).sqrt()
        if self.cfg.clip_norm > 0:
            nn.utils.clip_grads_with_norm_([*replicated, *sharded], self.cfg.clip_norm, norm)
        return norm

    # -------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """Network, head and optimiser as one process would have them; whole in rank 0 only.

        Every process must call it: the shards of the head and of its momentum are put together.
        """
        optimizer = self.optimizer.state_dict()
        self._replace_momentum(optimizer, self.head.gather_rows)
        head = {name: self.head.gather_rows(v) for name, v in self.head.state_dict().items()}
        state = {"model": self.model.state_dict(), "head": head, "optimizer": optimizer}
        return state if self.ema is None else {**state, "ema": self.ema.state_dict()}

    def _replace_momentum(
        self, optimizer: dict[str, Any], change: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Apply `change` to the momentum of the head's weight in an optimiser's state."""
        last = len(self.parameters) - 1
        state = optimizer["state"].get(last, {})
        if state.get("momentum_buffer") is not None:
            changed = {**state, "momentum_buffer": change(state["momentum_buffer"])}
            optimizer["state"] = {**optimizer["state"], last: changed}

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Go back to what `state` returned, in however many processes that was.

        Raises one of checkpoints.INCOMPATIBLE, or UserError, where the state is another one's.
        """
        optimizer = dict(state["optimizer"])
        self._replace_momentum(optimizer, self.head.local_rows)
        self.model.load_state_dict(state["model"])
        head = {name: self.head.local_rows(v) for name, v in state["head"].items()}
        self.head.load_state_dict(head)
        load_momentum(self.optimizer, optimizer, path)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def is_finite(self) -> bool:
        """Whether all weights and running statistics, of all processes, are numbers."""
        tensors = [*self.model.state_dict().values(), *self.head.state_dict().values()]
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        bad = all_reduce_sum((~finite).float())
        return not bool(bad)
