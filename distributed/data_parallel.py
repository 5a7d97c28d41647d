"""Data parallelism: one network in every process, each with its slice of the batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distributed.collectives import all_reduce_sum
from distributed.process_group import world_size
from utils import FACE_SIZE


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The network in DistributedDataParallel; itself in a single process.

    Gradients are all-reduced in buckets while the backward pass still runs. They are summed, where
    DistributedDataParallel by itself averages: the loss of a slice is already its share of the mean
    over the whole batch, so that slices of 10 and 11 images count as 21 images do in one process.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    replica = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    replica.register_comm_hook(None, _sum_gradients)
    # After its first backward pass DDP puts its buckets into the order in which gradients came, and
    # with it changes the order in which they are summed. A pass before the first step has every
    # step sum alike; else a resumed run, whose first step is a later one, would differ in the last
    # bits. In evaluation mode it changes no statistics and draws no random numbers.
    faces = torch.zeros(2, 3, FACE_SIZE, FACE_SIZE, device=device)
    was_training = model.training
    replica.eval()
    with torch.backends.cudnn.flags(benchmark=False):  # of a batch that never comes again
        replica(faces.to(memory_format=torch.channels_last)).sum().backward()
    replica.train(was_training)
    replica.zero_grad()
    return replica


def _sum_gradients(state, bucket):  # DDP checks the annotations, and cannot read postponed ones
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def no_gradient_sync(replica: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    """For a block with forward and backward: if `skip`, its gradients only accumulate locally.

    With gradient accumulation only the last backward pass of a step has to all-reduce.
    """
    if skip and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's running statistics of batch normalisation.

    Without SyncBatchNorm each process averages those of its own slices; rank 0's are the ones that
    are evaluated and saved.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Have batch normalisation use the statistics of the whole batch, not of a process's slice.

    Returns the network with its layers replaced; parameters and buffers are the same tensors.
    """
    if world_size() == 1:
        return model
    if device.type == "cpu":
        return _replace_batch_norm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes, each of which computes its own share of the loss from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each process has the gradient of its share of the loss only.
        return all_reduce_sum(grad.clone())


class _SyncBatchNormOnCPU(_BatchNorm):
    """PyTorch's SyncBatchNorm has no CPU kernel; this one is slow, and gives CPUs its result.

    In float64, so that the result does not depend on how the batch is cut into slices.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, ...) to the same shape."""
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        dims = [0, *range(2, x.dim())]  # all but the channels
        shape = [1, -1, *[1] * (x.dim() - 2)]  # broadcasts (channels,) over x
        x64 = x.double()
        count = x64.new_full((1,), x.numel() / x.shape[1])
        total = _AllReduceSum.apply(torch.cat([x64.sum(dims), count]))  # (channels + 1,)
        count = total[-1].detach()
        mean = total[:-1] / count  # (channels,)
        centred = x64 - mean.view(shape)
        variance = _AllReduceSum.apply(centred.square().sum(dims)) / count  # (channels,)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            with torch.no_grad():
                unbiased = variance * count / (count - 1)
                self.running_mean.lerp_(mean.float(), self.momentum)
                self.running_var.lerp_(unbiased.float(), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def _replace_batch_norm(module: nn.Module) -> nn.Module:
    """What SyncBatchNorm.convert_sync_batchnorm does, with _SyncBatchNormOnCPU."""
    if isinstance(module, _BatchNorm):
        layer = _SyncBatchNormOnCPU(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        layer.weight, layer.bias = module.weight, module.bias
        layer.running_mean, layer.running_var = module.running_mean, module.running_var
        layer.num_batches_tracked = module.num_batches_tracked
        layer.training = module.training
        return layer
    for name, child in module.named_children():
        module.add_module(name, _replace_batch_norm(child))
    return module
