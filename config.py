"""All settings of the three scripts, each once: name, type, default, meaning, range.

The command line follows from it: `python train.py --help` lists what train.py reads. Booleans are
`--flip` and `--no-flip`; an unknown flag or a wrong type is an error. A tool in tools/ declares the
settings that it alone reads in a subclass of Config and names the shared ones that it reads.

    cfg = parse_args(sys.argv[1:], "train", doc=__doc__)
    cfg.lr, cfg.margin_options
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple


def setting(
    default: Any,
    help: str,
    scripts: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    resume: bool = False,
    alone: Any = None,
    positional: str = "",
) -> Any:
    """One setting: its default, its help text and the scripts that read it.

    `scripts` may be left out where all settings of a class are for the same ones (SCRIPTS).
    `low` and `high` are the ends of its range. `resume`: a resumed run may change it. `alone` is
    the value of the flag without a value. `positional` makes it an argument without a flag, as many
    as it says: "1", or argparse's `nargs` "?", "*" or "+".
    """
    metadata = {"help": help, "scripts": scripts.split(), "low": low, "high": high}
    metadata |= {"resume": resume, "alone": alone, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


class Option(NamedTuple):
    """A constant that one margin alone has: its default and its range."""

    default: float
    low: float
    high: float = float("inf")


class MarginDefaults(NamedTuple):
    """What --margin NAME means: its class in heads/, and its paper's or its authors' constants."""

    head: str
    scale: float  # --margin-s
    margin: float  # --margin-m
    options: Mapping[str, Option] = {}  # --margin-option


MARGINS = {
    "softmax": MarginDefaults("Softmax", 1.0, 0.0),
    "norm_softmax": MarginDefaults("NormSoftmax", 64.0, 0.0),
    "sphereface": MarginDefaults("SphereFace", 30.0, 1.5),
    "sphereface2": MarginDefaults("SphereFace2", 40.0, 0.4),
    "cosface": MarginDefaults("CosFace", 64.0, 0.35),
    # easy=1: no margin where the angle is over 90 degrees.
    "arcface": MarginDefaults("ArcFace", 64.0, 0.5, {"easy": Option(0, 0, 1)}),
    "combined": MarginDefaults(
        "Combined", 64.0, 0.3, {"m1": Option(1.0, 0.1, 4.0), "m3": Option(0.2, 0.0, 2.0)}
    ),
    "curricularface": MarginDefaults("CurricularFace", 64.0, 0.5),
    "magface": MarginDefaults("MagFace", 64.0, 0.45),
    "adaface": MarginDefaults("AdaFace", 64.0, 0.4, {"h": Option(0.333, 0.0)}),
    "elastic_arc": MarginDefaults("ElasticArc", 64.0, 0.5, {"std": Option(0.0125, 0.0)}),
    "elastic_cos": MarginDefaults("ElasticCos", 64.0, 0.35, {"std": Option(0.0125, 0.0)}),
    "subcenter": MarginDefaults("SubcenterArc", 64.0, 0.5, {"subcenters": Option(3, 1, 100)}),
    "uniface": MarginDefaults("UniFace", 64.0, 0.4),
    "unitsface": MarginDefaults("UniTSFace", 64.0, 0.4),
}

MarginName = Literal[tuple(MARGINS)]  # type: ignore[valid-type]

# What each --recipe changes of the defaults, which are the ArcFace paper's; flags that are given
# override it. "best" is the winner of docs/study.md.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {
        "margin_s": 32.0,
        "margin_m": 0.3,
        "lr": 0.2,
        "schedule": "linear",
        "warmup_epochs": 0.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files and folders"""

    SCRIPTS: ClassVar[str] = "pre_process train lfw_eval"
    data_dir: str = setting("data", "archives and prepared data sets", resume=True)
    runs_dir: str = setting("runs", "training runs", "train lfw_eval", resume=True)
    images_dir: str = setting("images", "plots and images that the scripts make", resume=True)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine and random seed"""

    SCRIPTS: ClassVar[str] = "pre_process train lfw_eval"
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", resume=True)
    workers: int = setting(0, "threads; 0: one per core", low=0, resume=True)
    seed: int = setting(0, "random seed", "train lfw_eval", low=0)


@dataclasses.dataclass(frozen=True)
class PreProcessing:
    """Preprocessing"""

    SCRIPTS: ClassVar[str] = "pre_process"
    source: str = setting("", "archive, folder or .rec; default: everything known in data_dir")
    output: str = setting("", "where to write; default: data_dir/faces_<source>_112x112")
    aligned: bool = setting(False, "the images are aligned faces of 112x112: pack them as they are")
    identity_level: Literal["auto", "path", "1", "2", "3"] = setting(
        "auto", "identity: 1, the folder of an image; 2, the one around it; path: the whole path"
    )
    missed: Literal["auto", "skip", "crop"] = setting(
        "auto", "an image without a detected face: skip it, or crop centrally; auto: crop for LFW"
    )
    min_face: int = setting(0, "smallest face in pixels; 0: chosen from the image size", low=0)
    detect_batch: int = setting(64, "images per detection batch", low=1)
    max_file_mb: int = setting(200, "largest image file in MB; larger ones are skipped", low=1)
    max_ratio: int = setting(100, "largest compression ratio of an archive: zip bombs", low=1)
    shard: str = setting("", "prepare one part only, e.g. 2/8: the second of eight; then --merge")
    merge: bool = setting(False, "merge the parts that --shard made")
    download_lfw: bool = setting(False, "download LFW (funneled) and its pairs into data_dir first")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Backbone"""

    SCRIPTS: ClassVar[str] = "train"
    network: Literal["r18", "r34", "r50", "r100", "r152", "r200", "mobilefacenet", "tiny"] = (
        setting("r50", "backbone; lfw_eval.py: of a third-party state dict", "train lfw_eval")
    )
    use_se: bool = setting(False, "squeeze-and-excitation in each block", "train lfw_eval")
    emb_size: int = setting(512, "embedding dimension", low=1)
    dropout: float = setting(0.4, "dropout before the embedding layer", low=0, high=0.9)
    zero_init: bool = setting(False, "zero-init the last BN of each residual branch")


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Fine-tuning"""

    SCRIPTS: ClassVar[str] = "train"
    init: str = setting("", "begin with the backbone of a checkpoint: ours, or a state dict")
    freeze_epochs: int = setting(0, "epochs at the beginning that train the head alone", low=0)
    backbone_lr_factor: float = setting(
        1.0, "the backbone's learning rate, as a multiple of the head's", low=0
    )


@dataclasses.dataclass(frozen=True)
class MarginLoss:
    """Margin and loss"""

    SCRIPTS: ClassVar[str] = "train"
    margin: MarginName = setting("arcface", "loss, by its paper's name (heads/)")  # noqa: RUF009
    margin_m: float = setting(
        0.5,
        "margin: radians for arcface, a factor for sphereface; depends on --margin",
        low=0,
        high=3.2,
    )
    margin_s: float = setting(64.0, "scale of the logits; depends on --margin", low=0)
    margin_option: tuple[str, ...] = setting((), "further constants of a margin: {options}")
    focal_loss: float = setting(
        0.0, "focal loss with this gamma (the flag alone: 2); 0: cross entropy", low=0, alone=2.0
    )

    @property
    def margin_options(self) -> dict[str, float]:
        """The options of --margin by name, defaults where --margin-option gives none."""
        return _read_options(self.margin, self.margin_option)


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Training set"""

    SCRIPTS: ClassVar[str] = "train"
    train_set: str = setting(
        "", "folder with train.rec; default: data_dir/faces_webface_112x112", resume=True
    )
    max_classes: int = setting(0, "use the identities with most images only; 0: all", low=0)
    valid_fraction: float = setting(
        0.02, "share of each identity's images held out for validation", low=0, high=0.9
    )
    keep: str = setting("", "images to train on: a list of tools.label_noise", resume=True)
    hold_out: str = setting("", "identities to leave out: a list of tools.held_out", resume=True)
    cache: Literal["auto", "gpu", "ram", "none"] = setting(
        "auto", "where decoded images are kept; auto: the first that they fit in", resume=True
    )
    flip: bool = setting(
        True, "mirror half of the images; lfw_eval.py: add the mirror image", "train lfw_eval"
    )
    augment: Literal["none", "mild", "adaface"] = setting(
        "none", "adaface: its crop, low resolution and colour, 0.2 each; mild: weaker, no crop"
    )


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """Optimisation"""

    SCRIPTS: ClassVar[str] = "train"
    recipe: Literal["paper", "best"] = setting(
        "paper", "defaults of rate, schedule, margin: the ArcFace paper's, or docs/study.md's"
    )
    epochs: int = setting(32, "passes over the training set", low=1, resume=True)
    batch_size: int = setting(512, "images per step, over all processes", low=2)
    accumulate: int = setting(1, "gradient accumulation steps: less memory", low=1)
    checkpoint_activations: bool = setting(
        False, "activation checkpointing: far less memory, a third more time", resume=True
    )
    sync_bn: bool = setting(False, "several processes: batch normalisation over the whole batch")
    sample_rate: float = setting(
        1.0, "Partial FC: fraction of negative class centres sampled per step", low=1e-6, high=1
    )
    lr: float = setting(0.1, "peak learning rate, for the batch size as given", low=0)
    momentum: float = setting(0.9, "SGD momentum", low=0, high=1)
    weight_decay: float = setting(5e-4, "weight decay (L2 penalty)", low=0)
    decay_bn: bool = setting(True, "weight decay on BN, PReLU and biases, too")
    ema: float = setting(
        0.0, "EMA decay of the weights, evaluated beside them; 0: disabled", low=0, high=0.999999
    )
    schedule: Literal["step", "cosine", "linear", "poly"] = setting(
        "step", "learning rate schedule; linear and poly (quadratic): to zero"
    )
    milestones: tuple[int, ...] = setting((20, 28), "step schedule: epochs before which lr is /10")
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up", low=0)
    clip_norm: float = setting(0.0, "largest gradient norm; 0: no clipping", low=0)
    amp: bool = setting(True, "autocast to bfloat16, on GPUs without it to float16")
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "torch.compile the backbone, a minute at start; auto: in runs of 2,000+ steps"
    )


@dataclasses.dataclass(frozen=True)
class Logging:
    """Logging and checkpoints"""

    SCRIPTS: ClassVar[str] = "train"
    log_every: int = setting(20, "steps between two points in TensorBoard", low=1, resume=True)
    checkpoint_every: str = setting(
        "15m", "last.pt also within an epoch: 15m, minutes; 500, steps; 0: never", resume=True
    )
    resume: str = setting(
        "", "a run's folder or last.pt; the flag alone: the newest run", resume=True, alone="newest"
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation"""

    SCRIPTS: ClassVar[str] = "lfw_eval"
    checkpoint: str = setting("", "ours, a state dict, or .onnx; default: the newest run's best.pt")
    against: str = setting("", "a second one: is the difference statistically significant?")
    lfw: str = setting(
        "",
        "prepared folder or .bin; default: data_dir/faces_lfw_112x112",
        "train lfw_eval",
        resume=True,
    )
    pairs: str = setting(
        "",
        "LFW's format, or a list, CSV ...; default: pairs.txt with the set or in data_dir",
    )
    sets: str = setting("", "several test sets, e.g. lfw,cfp_fp,agedb_30: folders or .bin files")
    groups: str = setting(
        "", "the same, as demographic groups (RFW): mean, deviation and skewed error ratio"
    )
    as_: Literal["", "insightface", "paper"] = setting(
        "", "evaluation protocol preset; sets the next four and --flip"
    )
    fuse: Literal["sum", "concat"] = setting("sum", "how a face and its mirror image are combined")
    subtract_mean: bool = setting(False, "subtract the mean embedding of the other folds first")
    metric: Literal["cosine", "euclidean"] = setting("cosine", "how two embeddings are compared")
    threshold: Literal["folds", "best"] = setting(
        "folds", "best of the other nine folds, or best on the test pairs (optimistic)"
    )
    lfw_source: str = setting("", "original images for the galleries; default: pre_process.py's")
    robustness: bool = setting(False, "also with JPEG, blur, occlusion ...: six times the time")
    eval_batch: int = setting(256, "images per batch", "train lfw_eval", low=1, resume=True)


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """Input of a third-party model"""

    SCRIPTS: ClassVar[str] = "lfw_eval"
    input_mean: tuple[float, float, float] = setting(
        (0.5, 0.5, 0.5), "per-channel mean of the model's input, in [0, 1]"
    )
    input_std: tuple[float, float, float] = setting(
        (0.5, 0.5, 0.5), "per-channel std of the model's input, in [0, 1]"
    )
    bgr: bool = setting(False, "the model expects BGR")


@dataclasses.dataclass(frozen=True)
class Config(
    ModelInput,  # --help shows the groups from the last to the first
    Evaluation,
    Logging,
    Optimisation,
    TrainingSet,
    MarginLoss,
    FineTuning,
    Backbone,
    PreProcessing,
    Machine,
    Paths,
):
    """All settings; the defaults are the ArcFace paper's recipe for CASIA-WebFace (1801.07698)."""

    # A subclass, of one tool, names the shared settings that it reads here.
    SHARED: ClassVar[str] = ""
    # The settings given on the command line: a resumed run tells a wish from a default by it.
    given: tuple[str, ...] = ()
    # SHA-256 of the file of --init, which train.py notes when a run begins.
    init_sha256: str = ""


def parse_args(
    argv: Sequence[str] | None = None,
    script: str | None = None,
    settings: type[Config] = Config,
    doc: str | None = None,
) -> Any:
    """The settings that a command line asks for, an instance of `settings`.

    `script` limits the flags to those that this script reads, without it all are allowed; `doc` is
    its docstring, for --help. Exits with status 2 and a message, as argparse does, on unknown flags
    and wrong values.
    """
    parser = _make_parser(script, settings, doc or "")
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_advice(argv, unknown)}")
    given = vars(namespace)
    values = _derived_defaults(given) | given
    try:
        values["margin_option"] = normal_options(values["margin"], values["margin_option"])
        checkpoint_interval(values.get("checkpoint_every", Config.checkpoint_every))
    except ValueError as error:
        parser.error(str(error))
    return settings(**values, given=tuple(given))


def _advice(argv: Sequence[str], unknown: Sequence[str]) -> str:
    """What to do about an argument that no flag takes, where that can be told."""
    flag = argv[argv.index(unknown[0]) - 1]
    if unknown[0].lower() in ("true", "false", "yes", "no", "0", "1") and flag.startswith("--"):
        return f" ({flag} takes no value: {flag} is true, --no-{flag[2:]} is false)"
    return ""


def _derived_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that --recipe and --margin decide."""
    recipe = RECIPES[given.get("recipe", Config.recipe)]
    recipe_margin = recipe.get("margin", Config.margin)
    margin = given.get("margin", recipe_margin)
    values = {"margin": margin, "margin_option": ()}
    values |= {"margin_s": MARGINS[margin].scale, "margin_m": MARGINS[margin].margin}
    # A recipe's scale and margin are for its own --margin.
    return values | recipe if margin == recipe_margin else recipe | values


def _read_options(margin: str, texts: Sequence[str]) -> dict[str, float]:
    """The options of a margin by name, from NAME=VALUE; ValueError where one is not of it."""
    options = MARGINS[margin].options
    values = {name: option.default for name, option in options.items()}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in options:
            known = ", ".join(options) or "none"
            raise ValueError(
                f"--margin-option {text[:40]}: {margin} has no option {name[:40]!r} "
                f"(it has: {known})"
            )
        option = options[name]
        try:
            value = type(option.default)(number)
        except ValueError:
            raise ValueError(f"--margin-option {text[:40]} is not a number") from None
        if not option.low <= value <= option.high:
            raise ValueError(
                f"--margin-option {text[:40]} is not in {option.low} ... {option.high}"
            )
        values[name] = value
    return values


def normal_options(margin: str, texts: Sequence[str]) -> tuple[str, ...]:
    """All options of a margin, so that equal ones compare equal: (), ("h=0.4",) to ("h=0.4",).

    One that is off by default and not on, as arcface's easy=0, is left out.
    """
    options = MARGINS[margin].options
    values = _read_options(margin, texts).items()
    return tuple(f"{name}={value}" for name, value in values if value or options[name].default)


def checkpoint_interval(text: str) -> tuple[int, float]:
    """(steps, minutes) of --checkpoint-every, 0 where it is not by these; ValueError if invalid.

    "500" is (500, 0.0), "15m" (0, 15.0) and "0" (0, 0.0).
    """
    if text.isdecimal():
        return int(text), 0.0
    try:
        minutes = float(text[:-1]) if text.endswith("m") else -1.0
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise ValueError(
            f"--checkpoint-every {text[:40]} is neither minutes (15m) nor a number of steps (500)"
        )
    return 0, minutes


def settings_of(script: str | None, settings: type[Config] = Config) -> list[str]:
    """The names of the settings that a script reads; of all scripts where it is None."""
    names = []
    for owner in reversed(settings.__mro__):  # Paths first, a tool's own settings last
        for name, field in _fields_of(owner).items():
            scripts = field.metadata["scripts"] or getattr(owner, "SCRIPTS", "").split()
            shared = name in settings.SHARED.split()
            own = owner is settings and settings is not Config
            if own or shared or (settings is Config and (script is None or script in scripts)):
                names.append(name)
    return list(dict.fromkeys(names))


def fixed_on_resume() -> set[str]:
    """The names of the settings that make a run what it is: a resumed one may not change them."""
    fields = Config.__dataclass_fields__
    return {name for name in settings_of("train") if not fields[name].metadata["resume"]}


# ------------------------------------------------------------------------------ the parser


def _fields_of(owner: type) -> dict[str, dataclasses.Field]:
    """The settings that a class declares itself, inherited ones left out."""
    fields = getattr(owner, "__dataclass_fields__", {})
    own = inspect.get_annotations(owner)
    return {name: f for name, f in fields.items() if name in own and "help" in f.metadata}


def _make_parser(script: str | None, settings: type[Config], doc: str) -> argparse.ArgumentParser:
    """A parser of a script's flags, in groups; its help begins with the script's docstring."""
    prog, command = f"{script}.py", f"python {script}.py"
    if settings is not Config:
        prog = command = f"python -m tools.{script}"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{command} {_positionals(settings)}[--flag value ...]",
        description=doc.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(settings)
    offered = settings_of(script, settings)
    for owner in reversed(settings.__mro__):
        names = [name for name in _fields_of(owner) if name in offered]
        # A tool may declare a shared setting anew, with a default or a meaning of its own.
        names = [
            name for name in names if settings.__dataclass_fields__[name] is _fields_of(owner)[name]
        ]
        if names:
            group = parser.add_argument_group(owner.__doc__)
            for name in names:
                _add_flag(group, settings.__dataclass_fields__[name], hints[name])
    return parser


def _describe_options() -> str:
    """The options of all margins, for --help: `combined: m1 (default: 1.0), m3 (default: 0.2)`."""
    texts = []
    for margin, defaults in MARGINS.items():
        options = [f"{name} (default: {o.default})" for name, o in defaults.options.items()]
        if options:
            texts.append(f"{margin}: {', '.join(options)}")
    return "; ".join(texts)


def _positionals(settings: type[Config]) -> str:
    """How the usage line shows the arguments without flags: "IMAGE [IMAGE ...] "."""
    shown = ""
    for field in dataclasses.fields(settings):
        name = field.name.upper()
        forms = {"1": f"{name} ", "?": f"[{name}] ", "*": f"[{name} ...] "}
        forms["+"] = f"{name} [{name} ...] "
        shown += forms.get(field.metadata.get("positional", ""), "")
    return shown


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    """One setting as a flag: its type gives the parser, its metadata the help."""
    flag = "--" + field.name.rstrip("_").replace("_", "-")  # as_: "as" is a word of Python's
    meta, help = field.metadata, field.metadata["help"]
    is_tuple = typing.get_origin(hint) is tuple
    if field.default not in ("", ()):
        shown = " ".join(map(str, field.default)) if is_tuple else field.default
        help += f" (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    if field.name == "margin_option":
        help = help.format(options=_describe_options())
        options["metavar"] = "NAME=VALUE"
    options["help"] = help.replace("%", "%%")
    low, high = meta["low"], meta["high"]
    if is_tuple:
        kinds = typing.get_args(hint)
        options |= {"type": kinds[0], "nargs": "*" if kinds[-1] is Ellipsis else len(kinds)}
        options["action"] = _StoreTuple
    elif typing.get_origin(hint) is Literal:
        options["choices"] = [choice for choice in typing.get_args(hint) if choice]
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _in_range(hint, low, high)
        if meta["alone"] is not None:
            options |= {"nargs": "?", "const": meta["alone"]}
    if meta["positional"]:
        nargs = None if meta["positional"] == "1" else meta["positional"]
        options |= {"nargs": nargs, "metavar": field.name.upper()}
        group.add_argument(field.name, **options)
    else:
        group.add_argument(flag, dest=field.name, **options)


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
