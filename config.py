"""Every setting of every script, once: name, type, default, meaning.

The command line follows from it: `python train.py --help` lists what train.py reads, with defaults.
Booleans are `--focal-loss` and `--no-focal-loss`; an unknown flag or a wrong type is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal


def setting(
    default: Any, meaning: str, scripts: str, low: float | None = None, high: float | None = None
) -> Any:
    """A field with its help text, the scripts that read it and the range of its values."""
    metadata = {"help": meaning, "scripts": scripts.split(), "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


# margin_s and margin_m of each --margin, as its paper or its authors' code has them.
MARGIN_DEFAULTS = {
    "softmax": (1.0, 0.0),
    "norm_softmax": (64.0, 0.0),
    "sphereface": (30.0, 1.5),
    "sphereface2": (40.0, 0.4),
    "cosface": (64.0, 0.35),
    "arcface": (64.0, 0.5),
    "combined": (64.0, 0.3),
    "curricularface": (64.0, 0.5),
    "magface": (64.0, 0.45),
    "adaface": (64.0, 0.4),
    "elastic_arc": (64.0, 0.5),
    "elastic_cos": (64.0, 0.35),
    "subcenter": (64.0, 0.5),
    "uniface": (64.0, 0.4),
    "unitsface": (64.0, 0.4),
}

# What each --recipe changes of the defaults, which are the ArcFace paper's; a flag that is given
# goes before it. "best" is the winner of docs/study.md.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {
        "margin_s": 32.0,
        "margin_m": 0.3,
        "lr": 0.2,
        "schedule": "poly",
        "poly_power": 1.0,
        "warmup_epochs": 0.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; the defaults are the ArcFace paper's recipe for CASIA-WebFace (1801.07698)."""

    # fmt: off
    # where things are
    data_dir: str = setting("data", "folder with the archives and the prepared data sets", "pre_process shards train lfw_eval make_bin held_out label_noise")
    runs_dir: str = setting("runs", "folder of the training runs", "train lfw_eval ijb_eval held_out label_noise")
    images_dir: str = setting("images", "folder for the images that the scripts make", "pre_process train lfw_eval ijb_eval")
    seed: int = setting(0, "seed of everything random", "synthetic shards train lfw_eval held_out", low=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", "pre_process train lfw_eval ijb_eval held_out label_noise")
    workers: int = setting(0, "threads (drawing: processes) for images; 0: one a core", "synthetic pre_process train lfw_eval ijb_eval held_out", low=0)

    # synthetic.py
    output: str = setting("", "where to write; default: demo/data (synthetic), data_dir/<set>.bin (make_bin), data_dir/keep.tsv (label_noise), a folder in data_dir (others)", "synthetic pre_process shards make_bin label_noise")
    identities: int = setting(200, "synthetic people to train on", "synthetic", low=2)
    images_per_identity: int = setting(16, "images of each of them", "synthetic", low=1)
    lfw_identities: int = setting(100, "synthetic people to test on, none of them in training", "synthetic", low=20)

    # shards.py
    shard_images: int = setting(50000, "images a file", "shards", low=1)

    # pre_process.py
    source: str = setting("", "archive, folder or .rec to prepare; default: whatever is in data_dir", "pre_process shards")
    missed: Literal["auto", "skip", "crop"] = setting("auto", "an image without a face: pass over, or crop centrally; auto: crop for LFW", "pre_process")
    min_face: int = setting(0, "smallest face looked for, in pixels; 0: chosen from the image's size", "pre_process", low=0)
    detect_batch: int = setting(64, "images a detection batch", "pre_process", low=1)
    max_file_mb: int = setting(200, "largest image file, in MB; larger ones are passed over", "pre_process", low=1)
    max_ratio: int = setting(100, "how many times its size an archive may unpack to before it counts as a bomb", "pre_process", low=1)
    shard: str = setting("", "prepare one part only, for example 2/8: the second of eight; then --merge", "pre_process")
    merge: bool = setting(False, "put the parts together that --shard made", "pre_process")
    download_lfw: bool = setting(False, "fetch LFW (funneled) and its pairs into data_dir first", "pre_process")

    # what is trained, and how
    recipe: Literal["paper", "best"] = setting("paper", "where the defaults of the settings below come from: the paper, or docs/study.md", "train")

    # the network
    network: Literal["r18", "r34", "r50", "r100", "r152", "r200", "mobilefacenet", "tiny"] = setting("r50", "backbone; lfw_eval needs it only for state dicts of others", "train lfw_eval ijb_eval held_out label_noise")
    emb_size: int = setting(512, "numbers in an embedding", "train", low=1)
    use_se: bool = setting(False, "squeeze-and-excitation in each residual block", "train lfw_eval ijb_eval held_out label_noise")
    dropout: float = setting(0.4, "dropout before the embedding layer", "train", low=0, high=0.9)
    zero_init: bool = setting(False, "each residual block begins as its shortcut: the last BN of its branch starts at zero", "train")

    # the margin and the loss
    margin: Literal["softmax", "norm_softmax", "sphereface", "sphereface2", "cosface", "arcface", "combined", "curricularface", "magface", "adaface", "elastic_arc", "elastic_cos", "subcenter", "uniface", "unitsface"] = setting("arcface", "the margin, by its paper's name (margins.py)", "train")
    margin_m: float = setting(0.5, "the margin: radians for arcface, a factor for sphereface ...; another --margin has another default", "train", low=0, high=3.2)
    margin_s: float = setting(64.0, "scale of the logits; another --margin may have another default", "train", low=0)
    easy_margin: bool = setting(False, "arcface: apply the margin only where the angle is under 90 degrees", "train")
    margin_m1: float = setting(1.0, "combined: the angle's factor", "train", low=0.1, high=4)
    margin_m3: float = setting(0.2, "combined: what is taken off the cosine", "train", low=0, high=2)
    adaface_h: float = setting(0.333, "adaface: how much an embedding's length moves its margin", "train", low=0)
    elastic_std: float = setting(0.0125, "elastic_arc, elastic_cos: deviation of the random margin", "train", low=0)
    subcenters: int = setting(3, "subcenter: centres an identity", "train", low=1)
    focal_loss: bool = setting(False, "focal loss in place of cross entropy, with any margin of the softmax", "train")
    gamma: float = setting(2.0, "focal loss: exponent; 0 is cross entropy", "train", low=0)

    # the training set
    train_set: str = setting("", "folder with train.rec; default: data_dir/faces_webface_112x112", "train lfw_eval held_out label_noise")
    max_classes: int = setting(0, "train on the identities with most images only; 0: all", "train", low=0)
    valid_fraction: float = setting(0.02, "share of each identity's images held out for validation", "train", low=0, high=0.9)
    cache: Literal["auto", "gpu", "ram", "none"] = setting("auto", "where decoded images are kept; auto: the first that they fit", "train")
    flip: bool = setting(True, "train: mirror half of the images; lfw_eval: add the mirror image's embedding", "train lfw_eval ijb_eval held_out")

    keep: str = setting("", "list of images with wrong labels left out, made by label_noise.py", "train")
    hold_out: str = setting("", "list of identities that are not trained on, made by held_out.py; its default: data_dir/held_out.txt", "train held_out")
    augment: Literal["none", "mild", "adaface"] = setting("none", "further changes on the device: adaface: its crop, low resolution and colour, 0.2 each; mild: weaker, no crop", "train")

    # the optimisation
    epochs: int = setting(32, "passes over the training set", "train", low=1)
    batch_size: int = setting(512, "images a step, over all processes", "train", low=2)
    accumulate: int = setting(1, "parts that a process computes its share of a batch in, one after the other: less memory", "train", low=1)
    checkpoint_activations: bool = setting(False, "compute each block's activations again in the backward pass: far less memory, a third more time", "train")
    sync_bn: bool = setting(False, "many processes: batch normalisation over the whole batch, not over a process's share", "train")
    sample_rate: float = setting(1.0, "share of the other people's centres that a step compares with (Partial FC); 1: all", "train", low=1e-6, high=1)
    lr: float = setting(0.1, "peak learning rate, for the batch size as given", "train", low=0)
    momentum: float = setting(0.9, "SGD momentum", "train", low=0, high=1)
    weight_decay: float = setting(5e-4, "L2 penalty, on every weight", "train", low=0)
    decay_bn: bool = setting(True, "weight decay on batch normalisation, PReLU and biases, too", "train")
    ema: float = setting(0.0, "decay of an average of the weights, evaluated beside them (0.999, say); 0: none", "train", low=0, high=0.999999)
    schedule: Literal["step", "cosine", "poly"] = setting("step", "how the learning rate falls", "train")
    milestones: tuple[int, ...] = setting((20, 28), "step schedule: epochs before which lr falls tenfold", "train")
    poly_power: float = setting(2.0, "poly schedule: exponent; 1 is a straight line to zero", "train", low=0)
    warmup_epochs: float = setting(0.0, "epochs over which lr rises from zero", "train", low=0)
    clip_norm: float = setting(0.0, "largest gradient norm; 0: no limit", "train", low=0)
    amp: bool = setting(True, "bfloat16 autocast where the device has it; margin and loss stay float32", "train")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile the backbone: costs a minute, steps are faster; auto: in runs of 2,000 steps and more", "train")
    log_every: int = setting(20, "steps between two points in TensorBoard", "train", low=1)
    checkpoint_steps: int = setting(0, "steps between two last.pt within an epoch; 0: by the clock only", "train", low=0)
    checkpoint_minutes: float = setting(15.0, "minutes between two last.pt within an epoch; 0: by steps only", "train", low=0)
    keep_checkpoints: int = setting(2, "last.pt and the ones before it that are kept, for when the newest is damaged", "train", low=1)
    resume: str = setting("", "go on with a run: newest (the flag alone), or a run's folder or last.pt", "train")

    # lfw_eval.py
    checkpoint: str = setting("", "ours, an InsightFace state dict, or .onnx; default: the newest run's best.pt", "lfw_eval ijb_eval held_out label_noise")
    against: str = setting("", "a second checkpoint: is the difference to it more than chance?", "lfw_eval")
    lfw: str = setting("", "prepared LFW folder, or a .bin set; default: data_dir/faces_lfw_112x112", "train lfw_eval make_bin")
    pairs: str = setting("", "pairs in LFW's format or as lines 'path1 path2 0/1'; default: pairs.txt in the set's folder, <set>_pairs.txt or pairs.txt in data_dir", "train lfw_eval make_bin")
    sets: str = setting("", "several sets, as lfw,cfp_fp,agedb_30: prepared folders or .bin files by name, or paths", "lfw_eval")
    as_: Literal["", "insightface", "paper"] = setting("", "a convention as others quote it; fixes the next four and flip", "lfw_eval")
    fuse: Literal["sum", "concat"] = setting("sum", "how the embeddings of a face and its mirror image become one", "lfw_eval")
    subtract_mean: bool = setting(False, "take the mean embedding of the other folds off first", "lfw_eval")
    metric: Literal["cosine", "euclidean"] = setting("cosine", "how two embeddings are compared", "lfw_eval")
    threshold: Literal["folds", "best"] = setting("folds", "the best threshold of the other folds, or the best on the very pairs", "lfw_eval")
    lfw_source: str = setting("", "LFW's original images, for the galleries; default: what pre_process read", "lfw_eval")
    robustness: bool = setting(False, "also the same pairs with JPEG, blur, covers ... on their second images: six times the time", "lfw_eval")
    eval_batch: int = setting(256, "images an evaluation batch", "train lfw_eval ijb_eval held_out label_noise", low=1)
    input_mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "pixel mean that a foreign model expects, in [0, 1]", "lfw_eval ijb_eval held_out label_noise")
    input_std: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "pixel deviation that it expects, in [0, 1]", "lfw_eval ijb_eval held_out label_noise")
    bgr: bool = setting(False, "the foreign model expects BGR", "lfw_eval ijb_eval held_out label_noise")

    # held_out.py
    make_pairs: int = setting(0, "choose identities and write their list and so many pairs; 0: test on all pairs of the identities listed", "held_out", low=0)
    held_out_identities: int = setting(500, "identities to hold out", "held_out", low=20)
    hard_negatives: bool = setting(False, "mismatched pairs: an image and the stranger whom --checkpoint finds most alike", "held_out")

    # label_noise.py
    nearer_by: float = setting(12.0, "an image that is nearer to another class than to its own by more than this, in degrees, is dropped", "label_noise", low=0, high=180)
    max_angle: float = setting(90.0, "so is one further than this from its class centre, in degrees; a run of --margin subcenter has 75", "label_noise", low=0, high=180)

    # ijb_eval.py
    ijb: str = setting("", "folder of IJB-B or IJB-C, with meta/ and loose_crop/", "ijb_eval")
    detector_score: bool = setting(True, "weight an image in its template by the detector's score, as InsightFace does", "ijb_eval")
    norm_weight: bool = setting(True, "weight it by the length of its embedding, likewise", "ijb_eval")
    # fmt: on

    # The names of the settings that the command line gave, so that a resumed run can tell a wish from
    # a default.
    given: tuple[str, ...] = ()


def parse_args(argv: Sequence[str] | None = None, script: str | None = None) -> Config:
    """The configuration that a command line asks for.

    `script` limits the flags to those that this script reads; without it all are allowed. Exits
    with status 2 and a message, as argparse does, on unknown flags and wrong types.
    """
    parser = argparse.ArgumentParser(
        prog=None if script is None else f"{script}.py",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        scripts = field.metadata.get("scripts", [])
        if script in scripts or (script is None and scripts):
            _add_flag(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))
    return Config(**_defaults_of(given), **given, given=tuple(given))


def _defaults_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of settings that were not given and that the recipe or the margin decides."""
    recipe = RECIPES[given.get("recipe", Config.recipe)]
    its_margin = recipe.get("margin", Config.margin)
    margin = given.get("margin", its_margin)
    margin_s, margin_m = MARGIN_DEFAULTS[margin]
    values = {"margin_s": margin_s, "margin_m": margin_m}
    # A recipe's scale and margin are for its own --margin.
    values = values | recipe if margin == its_margin else recipe | values
    return {name: value for name, value in values.items() if name not in given}


def config_from(values: Mapping[str, Any]) -> Config:
    """The configuration that dataclasses.asdict gave, which may come in a stranger's file.

    Raises ValueError where a name is no setting, or a value none that its flag would take.
    """
    fields, hints = Config.__dataclass_fields__, typing.get_type_hints(Config)
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{str(name)[:40]!r} is no setting of this version")
        low, high = (fields[name].metadata.get(end) for end in ("low", "high"))
        fits = _is_of(hints[name], value) and (low is None or value >= low)
        if not fits or not (high is None or value <= high):
            raise ValueError(f"--{name.replace('_', '-')} cannot be {str(value)[:40]}")
    return Config(**values)


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


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    """One setting as a flag: its type gives the parser, its metadata the help."""
    flag = "--" + field.name.rstrip("_").replace("_", "-")  # as_: "as" is a word of Python's
    meaning = field.metadata["help"]
    hint_is_tuple = typing.get_origin(hint) is tuple
    if field.default != "":
        shown = " ".join(map(str, field.default)) if hint_is_tuple else field.default
        meaning += f" (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
    options["help"] = meaning.replace("%", "%%")
    if hint_is_tuple:
        kinds = typing.get_args(hint)
        options |= {"type": kinds[0], "nargs": "*" if kinds[-1] is Ellipsis else len(kinds)}
        options["action"] = _StoreTuple
    elif typing.get_origin(hint) is Literal:
        options["choices"] = typing.get_args(hint)
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif field.name == "resume":
        options |= {"type": str, "nargs": "?", "const": "newest"}
    else:
        options["type"] = _in_range(hint, field.metadata["low"], field.metadata["high"])
    parser.add_argument(flag, **options)


def _in_range(kind: type, low: float | None, high: float | None) -> Callable[[str], Any]:
    """A parser of one value that refuses what lies outside low ... high."""

    def parse(text: str) -> Any:
        value = kind(text)
        if low is not None and not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        if high is not None and not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is above {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value: 'x'"
    return parse


class _StoreTuple(argparse.Action):
    """Keep a flag of several values as a tuple, so that a Config can be compared and hashed."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
