import dataclasses
import re
import subprocess
import sys
import typing

import pytest

import models
from config import MARGINS, RECIPES, Config, checkpoint_interval, parse_args, settings_of
from tests.helpers.paths import ROOT
from tools import detect_faces, held_out, ijb_eval, label_noise, make_bin, make_shards, synthetic
from training.saved_settings import config_from

SCRIPTS = {
    "pre_process": Config,
    "train": Config,
    "lfw_eval": Config,
    "synthetic": synthetic.Settings,
    "detect_faces": detect_faces.Settings,
    "make_shards": make_shards.Settings,
    "make_bin": make_bin.Settings,
    "ijb_eval": ijb_eval.Settings,
    "held_out": held_out.Settings,
    "label_noise": label_noise.Settings,
}
# Where the settings of a script are read, besides in the script itself.
READERS = {
    "lfw_eval": ["evaluation/evaluate"],
    "train": ["training/run_report"],
    "pre_process": ["preprocessing/prepare", "preprocessing/sources"],
}


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
    other = next(name for name in MARGINS if name != cfg.margin)
    cfg = parse_args(["--recipe", "best", "--margin", other], "train")
    assert (cfg.margin_s, cfg.margin_m) == MARGINS[other][1:3]
    assert parse_args(["--recipe", "paper"], "train") == Config(given=("recipe",))


def test_types_follow_the_fields():
    argv = ["--lr", "1e-2", "--epochs", "3", "--milestones", "1", "2", "--use-se"]
    argv += ["--no-flip", "--network", "r18"]
    cfg = parse_args(argv, "train")
    assert (cfg.lr, cfg.epochs, cfg.milestones) == (0.01, 3, (1, 2))
    assert (cfg.use_se, cfg.flip, cfg.network) == (True, False, "r18")
    assert set(cfg.given) == {"lr", "epochs", "milestones", "use_se", "flip", "network"}


def test_checkpoint_every_is_minutes_or_steps(capsys):
    assert [checkpoint_interval(text) for text in ("0", "500", "15m", "0.5m")] == [
        (0, 0.0),
        (500, 0.0),
        (0, 15.0),
        (0, 0.5),
    ]
    for text in ("15s", "1.5", "nanm", "infm", ""):
        with pytest.raises(SystemExit):
            parse_args(["--checkpoint-every", text], "train")
        assert f"{text} is neither minutes (15m) nor a number" in capsys.readouterr().err


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
def test_help_lists_exactly_the_settings_of_a_script_in_groups(script, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"], script, SCRIPTS[script], "What it does.\n\n    an example\n")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    offered = re.findall(r"^  (--[a-z0-9-]+)", printed, re.MULTILINE)
    names = settings_of(script, SCRIPTS[script])
    if script == "detect_faces":  # its images have no flag
        names.remove("image")
        assert "\n  IMAGE  " in printed
    assert sorted(offered) == sorted(f"--{n.rstrip('_').replace('_', '-')}" for n in names)
    assert "What it does.\n\n    an example\n" in printed
    assert printed.splitlines()[0].startswith("usage: python ")
    titles = re.findall(r"^(\S.*):$", printed, re.MULTILINE)
    assert titles[0] == "options"
    assert len(titles) >= 3
    assert "{," not in printed and ",}" not in printed  # no empty choice
    assert "%(" not in printed and "{options}" not in printed


def test_train_offers_at_most_50_settings():
    assert len(settings_of("train")) <= 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_every_setting_it_offers(script):
    own = script if SCRIPTS[script] is Config else f"tools/{script}"
    paths = [ROOT / f"{name}.py" for name in (own, *READERS.get(script, []))]
    code = "".join(path.read_text("utf-8") for path in paths if path.exists())
    read = set(re.findall(r"\b(?:cfg\.|run\.|settings\[')(\w+)", code))
    read |= {"margin_option"}  # by cfg.margin_options
    unread = set(settings_of(script, SCRIPTS[script])) - read
    assert not unread, f"{own}.py offers {unread} and does not read them"


def test_a_tools_settings_go_before_the_shared_ones_of_the_same_name():
    cfg = parse_args([], "synthetic", synthetic.Settings)
    assert isinstance(cfg, Config)
    assert (cfg.output, Config().output) == ("demo/data", "")
    assert "lr" not in settings_of("synthetic", synthetic.Settings)
    with pytest.raises(SystemExit):
        parse_args(["--lr", "0.1"], "synthetic", synthetic.Settings)


def test_the_options_of_a_margin():
    def options(line):
        return parse_args(line.split(), "train").margin_options

    assert options("--margin combined") == {"m1": 1.0, "m3": 0.2}
    assert options("--margin combined --margin-option m3=0.1") == {"m1": 1.0, "m3": 0.1}
    assert options("--margin combined --margin-option m3=0") == {"m1": 1.0, "m3": 0.0}
    assert options("--margin arcface --margin-option easy=0") == {"easy": 0}
    assert options("--margin subcenter --margin-option subcenters=2") == {"subcenters": 2}
    assert options("--margin arcface --margin-option easy=1") == {"easy": 1}
    # However they are written, equal options make equal settings: a run can be resumed with them.
    a = parse_args(["--margin", "adaface"], "train")
    b = parse_args(["--margin", "adaface", "--margin-option", "h=.333"], "train")
    assert a.margin_option == b.margin_option == ("h=0.333",)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--margin-option subcenters=2", "arcface has no option 'subcenters' (it has: easy"),
        ("--margin combined --margin-option h=1", "no option 'h' (it has: m1, m3)"),
        ("--margin combined --margin-option m1=x", "m1=x is not a number"),
        ("--margin combined --margin-option m1=5", "m1=5 is not in 0.1 ... 4.0"),
        ("--margin adaface --margin-option h=nan", "h=nan is not in"),
        ("--margin subcenter --margin-option subcenters=1.5", "subcenters=1.5 is not a number"),
        ("--margin adaface --margin-option h", "h is not a number"),
    ],
)
def test_a_wrong_option_of_a_margin_is_a_message(line, text, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(line.split(), "train")
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_focal_loss_alone_is_gamma_2():
    assert parse_args(["--focal-loss"], "train").focal_loss == 2.0
    assert parse_args(["--focal-loss", "1.5"], "train").focal_loss == 1.5
    assert parse_args([], "train").focal_loss == 0.0


def test_network_choices_are_the_registry():
    hint = typing.get_type_hints(Config)["network"]
    assert typing.get_args(hint) == tuple(models.NETWORKS)


def test_importing_config_loads_nothing_heavy():
    code = "import sys, config; assert not {'torch', 'numpy', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
