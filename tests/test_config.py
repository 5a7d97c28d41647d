import dataclasses
import re
import subprocess
import sys
import typing

import pytest
import torch

import models
from config import MARGIN_DEFAULTS, RECIPES, Config, config_from, parse_args
from tests.helpers.paths import ROOT

SCRIPTS = (
    "synthetic",
    "pre_process",
    "shards",
    "train",
    "lfw_eval",
    "make_bin",
    "ijb_eval",
    "held_out",
    "label_noise",
)


def test_defaults_are_the_papers_recipe():
    cfg = parse_args([])
    assert (cfg.network, cfg.batch_size, cfg.lr, cfg.epochs) == ("r50", 512, 0.1, 32)
    assert (cfg.margin_s, cfg.margin_m, cfg.milestones) == (64.0, 0.5, (20, 28))
    assert (cfg.momentum, cfg.weight_decay, cfg.schedule) == (0.9, 5e-4, "step")
    assert cfg == Config()


def test_a_recipe_changes_defaults_and_what_is_given_goes_before_it():
    best = RECIPES["best"]
    cfg = parse_args(["--recipe", "best"], "train")
    assert {name: getattr(cfg, name) for name in best} == best
    assert cfg == dataclasses.replace(Config(**best), recipe="best", given=("recipe",))
    assert config_from({**best}) == Config(**best)  # each a setting, within its range
    assert parse_args(["--recipe", "best", "--lr", "0.5"], "train").lr == 0.5
    # Another margin comes with a scale of its own.
    other = next(name for name in MARGIN_DEFAULTS if name != cfg.margin)
    cfg = parse_args(["--recipe", "best", "--margin", other], "train")
    assert (cfg.margin_s, cfg.margin_m) == MARGIN_DEFAULTS[other]
    assert parse_args(["--recipe", "paper"], "train") == Config(given=("recipe",))


def test_types_follow_the_fields():
    argv = ["--lr", "1e-2", "--epochs", "3", "--milestones", "1", "2", "--easy-margin"]
    argv += ["--no-flip", "--network", "r18"]
    cfg = parse_args(argv, "train")
    assert (cfg.lr, cfg.epochs, cfg.milestones) == (0.01, 3, (1, 2))
    assert (cfg.easy_margin, cfg.flip, cfg.network) == (True, False, "r18")
    assert set(cfg.given) == {"lr", "epochs", "milestones", "easy_margin", "flip", "network"}


def test_resume_takes_a_path_or_means_the_newest():
    assert parse_args(["--resume"], "train").resume == "newest"
    assert parse_args(["--resume", "runs/a"], "train").resume == "runs/a"
    assert parse_args([], "train").resume == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-flag"],
        ["--epochs", "many"],
        ["--epochs", "0"],
        ["--epochs", "1.5"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--dropout", "1"],
        ["--network", "r49"],
        ["--flip", "False"],  # booleans take no value
        ["--epoch", "3"],  # no abbreviations
        ["--input-mean", "0.5", "0.5"],
    ],
)
def test_wrong_arguments_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(argv)
    assert error.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_a_script_refuses_the_flags_of_another():
    with pytest.raises(SystemExit):
        parse_args(["--lr", "0.1"], "pre_process")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_exactly_the_knobs_of_a_script(script, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"], script)
    assert ended.value.code == 0
    offered = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    fields = [f for f in dataclasses.fields(Config) if script in f.metadata.get("scripts", [])]
    assert offered == {f"--{field.name.rstrip('_').replace('_', '-')}" for field in fields}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_every_knob_it_offers(script):
    split = {"train": ("train", "training/dataset", "training/run", "training/engine")}
    split["train"] += ("training/resume",)
    split["pre_process"] = ("pre_process", "preprocessing/prepare", "preprocessing/sources")
    split["label_noise"] = ("tools/label_noise", "training/dataset", "training/resume")
    split["shards"] = ("tools/make_shards",)
    script_file = script if script == "lfw_eval" else f"tools/{script}"
    modules = split.get(script, (script_file,))
    code = "".join((ROOT / f"{module}.py").read_text("utf-8") for module in modules)
    read = set(re.findall(r"\bcfg\.(\w+)", code))
    for field in dataclasses.fields(Config):
        if script in field.metadata.get("scripts", []):
            assert field.name in read, f"{script}.py offers {field.name} and does not read it"


def test_network_choices_are_the_registry():
    hint = typing.get_type_hints(Config)["network"]
    assert typing.get_args(hint) == tuple(models.NETWORKS)


def test_importing_config_loads_nothing_heavy():
    code = "import sys, config; assert not {'torch', 'numpy', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_configuration_comes_back_from_its_dict():
    cfg = parse_args(["--milestones", "--lr", "1", "--resume", "--no-flip"], "train")
    assert config_from(dataclasses.asdict(cfg)) == cfg
    assert config_from({}) == Config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in ("0.1", None, True, -1, float("nan"), torch.tensor(0.1))),
        *(("batch_size", value) for value in (1, 8.0, "8", torch.zeros(9))),
        *(("network", value) for value in ("r51", None, ["tiny"], torch.zeros(2))),
        *(("milestones", value) for value in ([1], (1, "2"), (1.5,), 3, torch.zeros(2))),
        *(("input_mean", value) for value in ((0.5, 0.5), (0.5, 0.5, "x"))),
        *(("amp", value) for value in (1, None)),
        *(("data_dir", value) for value in (1, b"data")),
        *(("margin_m", 4.0), ("warp", 1), (7, 1)),
    ],
)
def test_values_that_no_flag_would_take_are_named(name, value):
    with pytest.raises(ValueError, match=str(name).replace("_", "-")):
        config_from({name: value})
