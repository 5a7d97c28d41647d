"""The weights of a third-party checkpoint under the names that this project's networks have.

    tensors = named_tensors(load_checkpoint("theirs.ckpt", third_party=True))
    model, notes = build_with_weights("r50", False, tensors, "theirs.ckpt")

A network may lie at any depth of the file: under state_dict, model or backbone, behind module. or
model. in its names. face.evoLVe, AdaFace and CVLface call IResNet's layers input_layer, body and
output_layer and lack some of ours (a shortcut's convolution, a batch norm, biases); those become
identities, so that the embeddings are the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fileio.checkpoint_file import check_weights
from models import NETWORKS, build_model
from utils import UserError

MAX_NAMED = 8  # differing parameters of a kind in a message

# Layers of face.evoLVe's Backbone (model_irse.py), AdaFace's (net.py) and CVLface's.
_ENDS = {
    "input_layer": ("conv1", "bn1", "prelu"),
    "output_layer": ("bn2", "dropout", "flatten", "fc", "features"),
}
_BLOCK = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3", "se")
_BLOCK_WITHOUT_BN2 = ("bn1", "conv1", "prelu", "conv2", "bn3", "se")  # face.evoLVe


def build_with_weights(
    network: str, use_se: bool, tensors: Mapping[str, Tensor], path: Path | str
) -> tuple[nn.Module, list[str]]:
    """A network with the weights that are found among `tensors`, and what to say about them.

    Raises UserError that names the parameters in which the file differs from the network.
    """
    try:
        fitted = _fit(network, use_se, tensors)
    except (ValueError, TypeError) as error:  # what a checkpoint's config may say
        raise UserError(
            f"The weights in {path} are not those of network {str(network)[:40]} ({error})"
        ) from None
    model, state, differences, notes = fitted
    check_weights(state, path)
    if differences:
        raise UserError(
            f"The weights in {path} are not those of network {network}"
            f"{' with --use-se' if use_se else ''}: {'; '.join(differences)}. "
            f"{_advice(tensors)}"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.float(), notes


def _advice(tensors: Mapping[str, Tensor]) -> str:
    """Which network has those weights, if one has."""
    for use_se in (False, True):
        for network in NETWORKS:
            if use_se and network == "mobilefacenet":
                continue
            if not _fit(network, use_se, tensors)[2]:
                return f"They are those of --network {network}{' --use-se' if use_se else ''}."
    return "They are those of no other --network either; give another checkpoint, or export ONNX."


def _fit(
    network: str, use_se: bool, tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor], list[str], list[str]]:
    """The network without weights, its state from `tensors`, differences, and notes."""
    # On the meta device a hostile embedding dimension allocates nothing; assign=True then
    # takes over the tensors of the file, whose size the file itself limits.
    with torch.device("meta"):
        model = build_model(network, use_se=use_se)
    original = _our_names(tensors, model)
    prefixes = _prefixes(original, model.state_dict())
    prefix = prefixes[0]
    names = {new[len(prefix) :]: old for new, old in original.items() if new.startswith(prefix)}
    children = {name for name, _ in model.named_children()}
    state = {new: tensors[old] for new, old in names.items() if new.split(".")[0] in children}
    if "fc.weight" in state and state["fc.weight"].dim() == 2:  # rows: the embedding dimension
        with torch.device("meta"):
            model = build_model(network, len(state["fc.weight"]), use_se=use_se)
    expected = model.state_dict()
    state |= _identities(expected, state, renamed=any(a != b for a, b in original.items()))
    differences = _differences(state, expected, names)

    notes = [f"weights of {prefix.rstrip('.')}"] if prefix else []
    if len(prefixes) > 1:
        notes.append(f"not of {_list(p.rstrip('.') or 'the file' for p in prefixes[1:])}")
    unused = [old for new, old in names.items() if new not in state]
    if unused:
        notes.append(f"without {_list(unused)}")
    return model, state, differences, notes


def _prefixes(names: Iterable[str], expected: Mapping[str, Tensor]) -> list[str]:
    """What most of the network's names have before them in the file; more than one if equal."""
    counts: Counter[str] = Counter({"": 0})
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in expected:
                counts["".join(part + "." for part in parts[:start])] += 1
    most = max(counts.values())
    return [prefix for prefix, count in counts.items() if count == most]


def _differences(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, str]
) -> list[str]:
    """Which parameters are missing, unknown, or of another shape."""
    missing = [name for name in expected if name not in state]
    unknown = [names[name] for name in state if name not in expected]
    shapes = [
        f"{names[name]} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    return [f"{kind}: {_list(some)}" for kind, some in kinds.items() if some]


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(name[:120] for name in names[:MAX_NAMED]) + more


# ------------------------------------------------------------------------------ other names


def _our_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """{our name, with what is before it: the file's name} of each tensor."""
    blocks = [
        f"{stage}.{number}"
        for stage in getattr(model, "stages", [])
        for number in range(len(getattr(model, stage)))
    ]
    names = {}
    for name in tensors:
        end = re.fullmatch(r"(.*\.|)(input_layer|output_layer)\.(\d)\.(\w+)", name)
        body = re.fullmatch(r"(.*\.|)body\.(\d+)\.(res|shortcut)_layer\.(\d)\.(.+)", name)
        new = name
        if end and int(end[3]) < len(_ENDS[end[2]]):
            new = f"{end[1]}{_ENDS[end[2]][int(end[3])]}.{end[4]}"
        elif body and int(body[2]) < len(blocks):
            block, layer = f"{body[1]}{blocks[int(body[2])]}", int(body[4])
            has_bn2 = f"{body[1]}body.{body[2]}.res_layer.2.running_mean" in tensors
            layers = _BLOCK if has_bn2 else _BLOCK_WITHOUT_BN2
            if body[3] == "shortcut":
                new = f"{block}.downsample.{layer}.{body[5]}"
            elif layer < len(layers):
                new = f"{block}.{layers[layer]}.{body[5]}"
        elif body:  # more blocks than the network has
            new = f"{body[1]}layer{len(getattr(model, 'stages', []))}.{body[2]}.{body[5]}"
        names[new] = name
    return names


def _identities(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], renamed: bool
) -> dict[str, Tensor]:
    """What the file may lack: the counters of batch norm and, if `renamed`, parameters of ours.

    In those networks a shortcut between equal widths is a subsampling, where ours has a convolution
    and a batch norm; face.evoLVe has no bn2; gates have ReLU and no biases; AdaFace's last batch
    norm has no weight and bias.
    """
    values = {}
    for name in expected.keys() - state.keys():
        shape = expected[name].shape
        layer = re.match(r"layer\d+\.\d+\.(bn2|downsample)\.", name)
        is_lacking = layer and not any(other.startswith(layer[0]) for other in state)
        if name.endswith("num_batches_tracked"):
            values[name] = torch.zeros((), dtype=torch.int64)
        elif not renamed:
            continue
        elif is_lacking and name.endswith("downsample.0.weight"):
            if shape[0] == shape[1]:
                values[name] = torch.eye(shape[0])[..., None, None]
        elif is_lacking and name.endswith("weight"):  # cancels the division by sqrt(1 + eps)
            values[name] = torch.full(shape, math.sqrt(1 + 1e-5))
        elif name == "features.weight" or (is_lacking and name.endswith("running_var")):
            values[name] = torch.ones(shape)
        elif is_lacking or re.search(r"features\.bias|\.se\.(prelu\.weight|fc[12]\.bias)$", name):
            values[name] = torch.zeros(shape)
    return values
