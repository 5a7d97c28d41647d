"""MTCNN's three networks, P-Net, R-Net and O-Net, on the weights that the mtcnn package ships.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks"
(arXiv 1604.02878). The package (ipazc/mtcnn 1.0.0, MIT) is only looked up, never imported:
importing it would import TensorFlow. The networks take pixels from 0 to 255.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError

WEIGHTS_SHA256 = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}


def load_weights(name: str) -> list[np.ndarray]:
    """The arrays of "pnet", "rnet" or "onet", in Keras' order and layout, from the mtcnn package.

    The files are pickles (joblib's), which can run any code, so only the very bytes that mtcnn
    1.0.0 ships are opened. Raises UserError if the package is missing or its files are different.
    """
    spec = importlib.util.find_spec("mtcnn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "MTCNN's weights come with the mtcnn package, which is not installed; "
            'run pip install "mtcnn==1.0.0".'
        )
    path = Path(spec.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4"
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256[name]:
        raise UserError(
            f"{path} is not the weight file of mtcnn 1.0.0; "
            'run pip install --force-reinstall "mtcnn==1.0.0".'
        )
    return joblib.load(io.BytesIO(data))


def _pool(x: Tensor, size: int, ceil: bool = True) -> Tensor:
    """Max pool with stride 2; `ceil` is TensorFlow's padding "same" for the sizes used here."""
    return F.max_pool2d(x, size, 2, ceil_mode=ceil)


class _Network(nn.Module):
    """Base of the three networks: holds the weights, converted from Keras' layout."""

    def __init__(self, name: str, channels: int):
        super().__init__()
        for i, array in enumerate(load_weights(name)):
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if tensor.dim() == 4:  # (height, width, in, out) -> (out, in, height, width)
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            elif tensor.dim() == 2:  # (in, out) -> (out, in)
                tensor = tensor.t().contiguous()
            elif tensor.dim() == 3:  # PReLU slopes (1, 1, channels)
                tensor = tensor.flatten()
            self.register_buffer(f"w{i}", tensor)

        # The networks expect (x - 127.5) / 128. Folded into the first layer,
        #     w * (x - 127.5) / 128 + b = (w / 128) * x + (b - sum(w) * 127.5 / 128),
        # they take plain bytes; and with a weight of zero for it, the fourth byte that pads a pixel
        # to a machine word (crop_and_resize).
        self.w1 -= self.w0.sum((1, 2, 3)) * (127.5 / 128)
        self.w0 = F.pad(self.w0 / 128, (0, 0, 0, 0, 0, channels - 3))
        self.w0 = self.w0.contiguous(memory_format=torch.channels_last)

    def conv(self, x: Tensor, i: int) -> Tensor:
        """Convolution with arrays i and i + 1, then PReLU with array i + 2."""
        x = F.conv2d(x, getattr(self, f"w{i}"), getattr(self, f"w{i + 1}"))
        return F.prelu(x, getattr(self, f"w{i + 2}"))

    def dense(self, x: Tensor, i: int) -> Tensor:
        """Linear layer with arrays i and i + 1."""
        return F.linear(x, getattr(self, f"w{i}"), getattr(self, f"w{i + 1}"))


class PNet(_Network):
    """Proposals: (N, 3, h, w) -> box offsets (N, 4, h', w'), scores (N, h', w').

    h' = (h - 10) / 2, rounded up, and w' likewise: one cell per 12x12 window, every 2 pixels.
    """

    def __init__(self):
        super().__init__("pnet", channels=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fully convolutional: any h and w from 12 on."""
        x = _pool(self.conv(x, 0), 2)  # (N, 10, h' + 4, w' + 4)
        x = self.conv(x, 3)  # (N, 16, h' + 2, w' + 2)
        x = self.conv(x, 6)  # (N, 32, h', w')
        logits = F.conv2d(x, self.w11, self.w12)
        return F.conv2d(x, self.w9, self.w10), logits.softmax(1)[:, 1]


class RNet(_Network):
    """Refinement: (k, 3, 24, 24) -> box offsets (k, 4), scores (k,)."""

    def __init__(self):
        super().__init__("rnet", channels=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keras flattens (width, height, channels), hence the permutation."""
        x = _pool(self.conv(x, 0), 3)  # (k, 28, 11, 11)
        x = _pool(self.conv(x, 3), 3, ceil=False)  # (k, 48, 4, 4)
        x = self.conv(x, 6)  # (k, 64, 3, 3)
        x = x.permute(0, 3, 2, 1).flatten(1)  # (k, 576)
        x = F.prelu(self.dense(x, 9), self.w11)  # (k, 128)
        return self.dense(x, 12), self.dense(x, 14).softmax(1)[:, 1]


class ONet(_Network):
    """Output: (k, 3, 48, 48) -> box offsets (k, 4), scores (k,), points (k, 5, 2)."""

    def __init__(self):
        super().__init__("onet", channels=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The points are fractions of the box, x and y of each."""
        x = _pool(self.conv(x, 0), 3)  # (k, 32, 23, 23)
        x = _pool(self.conv(x, 3), 3, ceil=False)  # (k, 64, 10, 10)
        x = _pool(self.conv(x, 6), 2)  # (k, 64, 4, 4)
        x = self.conv(x, 9)  # (k, 128, 3, 3)
        x = x.permute(0, 3, 2, 1).flatten(1)  # (k, 1152)
        x = F.prelu(self.dense(x, 12), self.w14)  # (k, 256)
        points = self.dense(x, 17).view(-1, 2, 5).transpose(1, 2)  # five x, then five y
        return self.dense(x, 15), self.dense(x, 19).softmax(1)[:, 1], points
