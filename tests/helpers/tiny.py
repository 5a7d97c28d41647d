"""A training set and the flags of a run on it that takes seconds; two runs compared bit by bit."""

import numpy as np
import torch

from fileio.bin_sets import write_bin
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset

# 39 images to train on and 9 held out: 4 steps an epoch.
FLAGS = "--network tiny --emb-size 16 --batch-size 8 --margin-s 16 --margin-m 0.2 --dropout 0.3 "
FLAGS += "--epochs 2 --valid-fraction 0.2 --log-every 3 --device cpu --schedule cosine "
FLAGS += "--checkpoint-every 2 --lr 0.02 --augment adaface"


def write_tiny_set(folder):
    """4 identities of 12 noisy images each, and an lfw.bin of 12 pairs."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 255, (4, 7, 7, 3))
    faces = np.clip(np.repeat(centres, 12, 0) + rng.normal(0, 20, (48, 7, 7, 3)), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(folder, jpegs, [i // 12 for i in range(48)])
    write_bin(folder / "lfw.bin", jpegs[::2], [i % 2 == 0 for i in range(12)])
    return folder


def assert_same(actual, expected, where="checkpoint"):
    """Equal to the last bit, all the way down."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert actual.shape == expected.shape, where
        assert actual.numpy().tobytes() == expected.numpy().tobytes(), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{where}[{index}]")
    else:
        assert actual == expected, where


def hostile_names(count):
    """Names as an untrusted archive may have them: markup, control characters, invalid UTF-8."""
    bad = [
        "<script>alert(1)</script>",
        '"onload="alert(1)',
        "'><img src=x onerror=alert(1)>",
        "</style></svg><iframe>",
        "&lt;b&gt;",
        "\x00\x1b[31m\u202egpj",
        "\udcff\udc80",
        "$\\frac$%s{}",
    ]
    return [f"{bad[i // 2 % len(bad)]}{i // 2}/{i}" for i in range(count)]
