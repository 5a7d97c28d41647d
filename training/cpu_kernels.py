"""Faster backward passes for training on a CPU, applied to a network that models.py has built."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_fast_cpu_kernels(model: nn.Module) -> None:
    """Have PReLU and strided depthwise convolutions compute their gradients by faster kernels.

    Without gradients both layers stay PyTorch's own. Parameters and state dict names do not change.
    """
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            module.forward = functools.partial(_prelu, module)
        elif isinstance(module, nn.Conv2d) and _is_strided_depthwise(module):
            module.forward = functools.partial(_convolve_in_float32, module, module.forward)


def _is_strided_depthwise(convolution: nn.Conv2d) -> bool:
    depthwise = convolution.groups == convolution.in_channels > 1
    return depthwise and convolution.stride != (1, 1)


def _prelu(module: nn.PReLU, x: Tensor) -> Tensor:
    """(N, C, ...) to the same shape."""
    # torch.compile generates a vectorised kernel for the plain function, and would have to break
    # its graph at a custom one.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _PReLU.apply(x, module.weight)
    return F.prelu(x, module.weight)


class _PReLU(torch.autograd.Function):
    """max(0, x) + w·min(0, x), one w per channel (He et al., 1502.01852, eq. 1).

    PyTorch's backward pass on a CPU is a scalar loop; this one is made of vectorised operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.prelu(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(grad, x, 0)  # grad where x > 0, else 0
        negative = grad - positive  # grad where x <= 0, else 0
        # dy/dx is 1 or w, dy/dw is min(0, x), summed over all but the channels.
        slope = weight.to(x.dtype).view(-1, *[1] * (x.dim() - 2))  # (C, 1, 1)
        grad_x = torch.addcmul(positive, negative, slope)
        all_but_channels = [dim for dim in range(x.dim()) if dim != 1]
        return grad_x, negative.mul_(x).sum(all_but_channels, dtype=weight.dtype)


def _convolve_in_float32(
    convolution: nn.Conv2d, forward: functools.partial[Tensor], x: Tensor
) -> Tensor:
    """(N, C, H, W) to (N, C, H / stride, W / stride), of the dtype of `x`."""
    if not torch.is_grad_enabled():
        return forward(x)
    # oneDNN's gradients of these layers take eight times as long in bfloat16.
    with torch.autocast("cpu", enabled=False):
        return forward(x.float()).to(x.dtype)
