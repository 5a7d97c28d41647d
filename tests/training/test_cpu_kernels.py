import copy

import pytest
import torch
from torch import nn

from models import ConvBNPReLU, build_model
from training.cpu_kernels import use_fast_cpu_kernels


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3)])
def test_prelu_and_its_gradients_are_pytorchs(shape):
    x = torch.randn(shape, dtype=torch.float64)
    x.flatten()[0] = 0  # where the slope jumps
    x.requires_grad_()
    ours, theirs = nn.PReLU(3).double(), nn.PReLU(3).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor([0.25, -0.5, 1.5]))
    ours.load_state_dict(theirs.state_dict())
    use_fast_cpu_kernels(ours)
    outputs = ours(x), theirs(x)
    assert "_PReLU" in type(outputs[0].grad_fn).__name__
    assert torch.equal(*outputs)
    factor = torch.randn(shape, dtype=torch.float64)
    result, expected = (
        torch.autograd.grad((y * factor).sum(), (x, module.weight))
        for y, module in zip(outputs, (ours, theirs), strict=True)
    )
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-12, atol=1e-12)


def test_strided_depthwise_layers_give_in_bfloat16_what_they_give_in_float32():
    torch.manual_seed(0)
    layer = ConvBNPReLU(16, 16, 3, 2, 1, groups=16)
    use_fast_cpu_kernels(layer)
    seen = []
    layer[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x = torch.randn(4, 16, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x.bfloat16())
    assert seen == [torch.bfloat16]
    assert result.dtype == torch.bfloat16
    assert "forward" in vars(layer[0])  # replaced
    torch.testing.assert_close(result.float(), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("network", ["tiny", "mobilefacenet"])
def test_a_network_keeps_its_state_and_its_outputs(network):
    plain = build_model(network, 16)
    fast = copy.deepcopy(plain)
    use_fast_cpu_kernels(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(fast(images), plain(images))
    plain.eval()
    fast.eval()
    with torch.no_grad():
        assert torch.equal(fast(images), plain(images))
