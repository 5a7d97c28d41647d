"""Operations that exist, or have their arguments, on CUDA only, computed on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    out, m, v = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return out, m, v, torch.empty(0, dtype=torch.uint8)  # cuDNN's reserve


def _batch_norm_backward(x, grad, weight, mean, var, save_mean, save_var, eps, reserve):
    if grad.dim() == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    statistics = (mean, var, save_mean, save_var)
    return aten.native_batch_norm_backward(grad, x, weight, *statistics, True, eps, [True] * 3)


def _per_channel(x: Tensor, values: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


# The parts of SyncBatchNorm (torch.nn.modules._functions).


def _batch_norm_stats(x, eps):
    over, wide = _all_but_channels(x), x.float()
    return wide.mean(over), (wide.var(over, unbiased=False) + eps).rsqrt()


def _gather_stats(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    counts = counts.view(-1, 1).float()
    total = counts.sum()
    var = invstd.float().pow(-2) - eps
    m = (mean * counts).sum(0) / total
    v = ((var + mean**2) * counts).sum(0) / total - m**2
    if running_mean is not None:
        running_mean.lerp_(m, momentum)
        running_var.lerp_(v * total / (total - 1), momentum)
    return m, (v + eps).rsqrt()


def _batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    y = (x.float() - _per_channel(x, mean)) * _per_channel(x, invstd)
    return (y * _per_channel(x, weight) + _per_channel(x, bias)).to(x.dtype)


def _backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    over = _all_but_channels(x)
    g, centred = grad.float(), x.float() - _per_channel(x, mean)
    sum_dy, sum_dy_xmu = g.sum(over), (g * centred).sum(over)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def _backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    n = count.sum()
    centred = x.float() - _per_channel(x, mean)
    k = _per_channel(x, sum_dy_xmu * invstd**2 / n)
    scale = _per_channel(x, invstd * (1 if weight is None else weight))
    return ((grad.float() - _per_channel(x, sum_dy / n) - centred * k) * scale).to(x.dtype)


# CUDA has these operations and they run there; only their values are computed here.
VALUES_ONLY = {
    "aten::batch_norm_stats": _batch_norm_stats,
    "aten::batch_norm_gather_stats_with_counts": _gather_stats,
    "aten::batch_norm_elemt": _batch_norm_elemt,
    "aten::batch_norm_backward_reduce": _backward_reduce,
    "aten::batch_norm_backward_elemt": _backward_elemt,
    # The third argument is a buffer that CPUs alone keep.
    "aten::log_sigmoid_backward": lambda grad, x, buffer: aten.log_sigmoid_backward(
        grad, x, (-x.abs()).exp()
    ),
    "aten::log_sigmoid_forward": lambda x: (
        aten.log_sigmoid_forward(x)[0],
        torch.empty(0, dtype=x.dtype),
    ),
}
# All operations that are computed in another form on the CPU.
CPU_FORMS = VALUES_ONLY | {
    "aten::cudnn_batch_norm": _batch_norm,
    "aten::cudnn_batch_norm_backward": _batch_norm_backward,
}
