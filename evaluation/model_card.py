"""A model card: what a model is, what it was trained on and what it scored, as Markdown.

    text = model_card(title, config, info, metrics)

Its front matter has Hugging Face's fields (https://huggingface.co/docs/hub/model-cards), so that
the file can be a repository's README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config import settings_of
from evaluation.metrics import LfwJson, ModelInfo
from evaluation.tables import format_interval

UNKNOWN = "not recorded"
TEXT = """\
## Intended use

Verification and search of faces aligned to 112x112 by the five points of ArcFace's template: two
images show the same identity if the cosine of their embeddings reaches a threshold. Choose the
threshold on images like those it will see.

## Limits

The numbers above hold for the test sets that are named. They say nothing about groups of people,
ages, cameras and poses that those sets hardly have; measure these before the model decides about
anyone. Most public training sets were collected without asking the people in them: check what the
law and the licence of the data allow.
"""


def model_card(
    title: str,
    config: Mapping[str, Any],
    info: ModelInfo,
    metrics: LfwJson | None,
    provenance: Mapping[str, object],
    data_licence: str = "",
) -> str:
    """The card of a model: config has the settings of its run, metrics are those of its lfw.json.

    Both may be missing (a third-party model, one that was not evaluated); the card then says so.
    provenance names its file, checksum and versions. Only the data's owners can say data_licence.
    """
    data_licence = data_licence or UNKNOWN
    parts = [
        _front_matter(title, config, metrics, data_licence),
        f"# {title}\n",
        "A face embedding, trained with the ArcFace reproduction whose scripts wrote this file.\n",
        "## Model and training\n",
        _table("what", "value", _training(config, info, provenance, data_licence)),
        "## Results\n",
        _results(metrics),
        TEXT,
    ]
    return "\n".join(parts)


def _front_matter(
    title: str, config: Mapping[str, Any], metrics: LfwJson | None, data_licence: str
) -> str:
    # JSON's strings and lists are YAML's, too.
    fields: dict[str, Any] = {
        "license": "other",
        "license_name": data_licence,
        "library_name": "pytorch",
        "pipeline_tag": "feature-extraction",
        "tags": ["face-recognition", "face-verification", str(config.get("margin", UNKNOWN))],
    }
    if metrics is not None:
        result = {
            "task": {"type": "face-verification"},
            "dataset": {"name": Path(metrics["test_set"]).stem, "type": "image"},
            "metrics": [{"type": "accuracy", "value": round(metrics["accuracy"], 5)}],
        }
        fields["model-index"] = [{"name": title, "results": [result]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---\n"])


def _training(
    config: Mapping[str, Any],
    info: ModelInfo,
    provenance: Mapping[str, object],
    data_licence: str,
) -> Iterator[tuple[str, object]]:
    """(what, value) of everything that shaped the weights."""
    yield "architecture", info["network"]
    yield from provenance.items()
    yield "licence of the training data", data_licence
    if not config:
        yield "training", UNKNOWN
    # A checkpoint holds the settings of all scripts.
    shaping = {*settings_of("train"), "init_sha256"}
    for name, value in config.items():
        if name in shaping and not name.endswith("_dir"):
            yield f"`{name}`", value


def _results(metrics: LfwJson | None) -> str:
    if metrics is None:
        return "Not evaluated: `python lfw_eval.py` writes lfw.json, and export again.\n"
    intervals = metrics["intervals"]
    rows = [("accuracy", metrics["accuracy"], intervals["accuracy"])]
    for far, tar in metrics["tar_at_far"].items():
        rows.append((f"TAR at FAR {far}", tar, intervals["tar_at_far"][far]))
    rows.append(("equal error rate", metrics["eer"], intervals["eer"]))
    cells = [(name, f"{100 * rate:.3f} %, {format_interval(ends)}") for name, rate, ends in rows]
    about = (
        f"On {metrics['test_set']}: {metrics['pairs']:,} pairs of {metrics['faces']:,} faces, "
        f"{len(metrics['fold_accuracies'])} folds, standard error of the accuracy "
        f"{100 * metrics['standard_error']:.3f} points. Protocol: {metrics['protocol_in_words']}.\n"
    )
    return _table("metric", "value, 95 % interval", cells) + "\n" + about


def _table(first: str, second: str, rows: Any) -> str:
    lines = [f"| {first} | {second} |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    """A value in a cell of a Markdown table: on one line, no bar that would end the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
