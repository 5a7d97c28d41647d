"""The settings in a checkpoint: of whichever version of this project, and not trusted.

cfg = config_from(checkpoint["config"])  # ValueError where a value is none that a flag takes
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from config import MARGINS, Config, checkpoint_interval, normal_options

# Settings of earlier versions that are now a tool's own, or a constant.
_RETIRED = {"identities", "images_per_identity", "lfw_identities", "shard_images", "make_pairs"}
_RETIRED |= {"held_out_identities", "hard_negatives", "nearer_by", "max_angle", "ijb"}
_RETIRED |= {"detector_score", "norm_weight", "keep_checkpoints"}
_OLD_OPTIONS = {
    "margin_m1": "m1",
    "margin_m3": "m3",
    "adaface_h": "h",
    "elastic_std": "std",
    "subcenters": "subcenters",
    "easy_margin": "easy",
}
_POWERS = {"1": "linear", "1.0": "linear", "2": "poly", "2.0": "poly"}  # --schedule poly's


def config_from(values: Mapping[str, Any]) -> Config:
    """The configuration of a checkpoint, from `dataclasses.asdict`; the file may be untrusted.

    What earlier versions of this project wrote is translated. Raises ValueError where a name is no
    setting, or a value is none that its flag would take.
    """
    values = _upgraded(values)
    fields, hints = Config.__dataclass_fields__, typing.get_type_hints(Config)
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{str(name)[:40]!r} is not a setting of this version")
        low, high = (fields[name].metadata.get(end) for end in ("low", "high"))
        fits = _is_of(hints[name], value) and (low is None or value >= low)
        if not fits or not (high is None or value <= high):
            raise ValueError(f"--{name.replace('_', '-')} cannot be {str(value)[:40]}")
    config = Config(**values)
    checkpoint_interval(config.checkpoint_every)
    options = normal_options(config.margin, config.margin_option)
    return dataclasses.replace(config, margin_option=options)


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings under today's names; those of today stay as they are."""
    new = {k: v for k, v in values.items() if k not in _RETIRED and k not in _OLD_OPTIONS}
    if "gamma" in new:  # focal_loss was whether, gamma the exponent
        gamma = new.pop("gamma")
        new["focal_loss"] = gamma if new.get("focal_loss") is True else 0.0
    if "checkpoint_minutes" in new:
        steps, minutes = str(new.pop("checkpoint_steps", 0)), new.pop("checkpoint_minutes")
        new["checkpoint_every"] = f"{str(minutes).removesuffix('.0')}m" if steps == "0" else steps
    power = str(new.pop("poly_power", 2.0))
    if new.get("schedule") == "poly":
        if power not in _POWERS:
            raise ValueError(f"its poly schedule has the exponent {power[:40]}, not 1 or 2")
        new["schedule"] = _POWERS[power]
    margin = new.get("margin", Config.margin)
    known = MARGINS[margin].options if isinstance(margin, str) and margin in MARGINS else {}
    options = {n: values[old] for old, n in _OLD_OPTIONS.items() if old in values and n in known}
    texts = [f"{n}={int(v) if isinstance(v, bool) else v}" for n, v in options.items()]
    if texts and isinstance(new.get("margin_option", ()), tuple):
        new["margin_option"] = (*new.get("margin_option", ()), *texts)
    return new


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of a setting's type, down to the parts of a tuple."""
    if typing.get_origin(hint) is Literal:
        return type(value) is str and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(value) if ... in kinds and type(value) is tuple else kinds
        fits = type(value) is tuple and len(value) == len(kinds)
        return fits and all(map(_is_of, kinds, value))
    return type(value) in ((int, float) if hint is float else (hint,))
