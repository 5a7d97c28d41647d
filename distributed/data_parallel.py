"""A network that every process runs on its slice of the batch."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from distributed.collectives import all_reduce_sum
from distributed.process_group import world_size


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The network as every process runs it on its slice of the batch; itself in one process.

    Gradients are summed over the processes bucket by bucket while backward still runs. They are
    summed, not averaged as DistributedDataParallel does by itself: each process has its slice's
    part of the loss, which is the mean over the whole batch, whatever the slices' sizes.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Otherwise the buckets change after the first step, and with them the order of summing: a run
    # that is gone on with would not come to the same bits.
    options = {"find_unused_parameters": True}
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    replica = DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(state, bucket):  # PyTorch checks annotations, and takes no postponed ones
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda done: done.value()[0])


def no_gradient_sync(replica: nn.Module, kept: bool) -> contextlib.AbstractContextManager[None]:
    """For a block with forward and backward: if `kept`, its gradients are not summed yet."""
    if kept and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Have batch normalisation use the statistics of the whole batch, not of a process's slice."""
    if world_size() == 1:
        return model
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SyncBatchNormOnCPU
    return model


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of which goes on with it in its own way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone())


class _SyncBatchNormOnCPU(nn.modules.batchnorm._BatchNorm):
    """PyTorch's has no CPU kernel; this one is slow, and lets CPUs compute what GPUs would."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, ...) to the same shape."""
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        over = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x.double()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        total = _Sum.apply(torch.cat([wide.sum(over), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(over)) / count
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.float(), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
