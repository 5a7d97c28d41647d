import dataclasses

import pytest
import torch

from config import MARGINS, Config, checkpoint_interval, parse_args
from training.saved_settings import config_from

# What the version of 2026-11-24 wrote that this one does not have.
OLD = {
    "margin_m1": 1.0,
    "margin_m3": 0.2,
    "adaface_h": 0.333,
    "elastic_std": 0.0125,
    "subcenters": 3,
    "gamma": 2.0,
    "keep_checkpoints": 2,
    "identities": 200,
    "images_per_identity": 16,
    "lfw_identities": 100,
    "shard_images": 50000,
    "make_pairs": 0,
    "held_out_identities": 500,
    "hard_negatives": False,
    "nearer_by": 12.0,
    "max_angle": 90.0,
    "ijb": "",
    "detector_score": True,
    "norm_weight": True,
    "easy_margin": False,
    "poly_power": 2.0,
    "checkpoint_steps": 0,
    "checkpoint_minutes": 15.0,
}


@pytest.mark.parametrize(
    ("changed", "margin", "options"),
    [
        ({}, "arcface", ()),
        ({"easy_margin": True}, "arcface", ("easy=1",)),
        ({"easy_margin": True}, "cosface", ()),
        ({"margin_m3": 0.1}, "combined", ("m1=1.0", "m3=0.1")),
        ({"adaface_h": 0.5}, "adaface", ("h=0.5",)),
        ({"elastic_std": 0.05}, "elastic_cos", ("std=0.05",)),
        ({"subcenters": 2}, "subcenter", ("subcenters=2",)),
    ],
)
def test_settings_of_the_version_before_are_translated(changed, margin, options):
    values = dataclasses.asdict(Config(margin=margin)) | OLD | {"focal_loss": False} | changed
    del values["margin_option"], values["checkpoint_every"]
    assert config_from(values) == Config(margin=margin, margin_option=options)
    assert set(config_from(values).margin_options) == set(MARGINS[margin].options)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"poly_power": 1.0}, "linear"),
        ({"poly_power": 2}, "poly"),
        ({"poly_power": 3.0, "schedule": "cosine"}, "cosine"),
    ],
)
def test_a_poly_schedule_of_the_version_before_keeps_its_exponent(old, new):
    assert config_from({"schedule": "poly"} | old).schedule == new


def test_a_poly_schedule_that_is_no_more_is_refused():
    with pytest.raises(ValueError, match=r"its poly schedule has the exponent 3\.0, not 1 or 2"):
        config_from({"schedule": "poly", "poly_power": 3.0})


@pytest.mark.parametrize(
    ("steps", "minutes", "every", "interval"),
    [
        (0, 15.0, "15m", (0, 15.0)),
        (500, 15.0, "500", (500, 0.0)),
        (0, 0.0, "0m", (0, 0.0)),
    ],
)
def test_checkpoints_of_the_version_before_are_as_frequent(steps, minutes, every, interval):
    old = {"checkpoint_steps": steps, "checkpoint_minutes": minutes}
    assert config_from(old).checkpoint_every == every
    assert checkpoint_interval(every) == interval


def test_options_of_the_version_of_yesterday_are_kept_beside_the_easy_margin():
    old = {"margin": "subcenter", "margin_option": ("subcenters=2",), "easy_margin": False}
    assert config_from(old).margin_option == ("subcenters=2",)


def test_focal_loss_of_the_version_before_is_its_gamma():
    old = OLD | {"focal_loss": True, "gamma": 1.5}
    assert config_from(old).focal_loss == 1.5
    assert config_from(OLD | {"focal_loss": False}).focal_loss == 0.0


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
        *(("margin", value) for value in ("arc", None, ["arcface"])),
        *(("margin_option", value) for value in ("h=1", ("h=1",), (1,), None)),
        *(("amp", value) for value in (1, None)),
        *(("checkpoint_every", value) for value in ("15s", "-1", "m", "nanm", "infm", 15, None)),
        *(("data_dir", value) for value in (1, b"data")),
        *(("margin_m", 4.0), ("warp", 1), (7, 1)),
    ],
)
def test_values_that_no_flag_would_take_are_named(name, value):
    with pytest.raises(ValueError, match=str(name).replace("_", "-")):
        config_from({name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"focal_loss": True, "gamma": "2"},
        {"focal_loss": True, "gamma": None},
        {"margin": "adaface", "adaface_h": "x"},
        {"margin": "adaface", "adaface_h": torch.zeros(2)},
        {"margin": "subcenter", "subcenters": 0},
        {"margin": ["adaface"], "adaface_h": 1.0},
        {"easy_margin": "yes"},
        {"easy_margin": torch.zeros(2)},
        {"easy_margin": True, "margin_option": "easy=1"},
        {"schedule": "poly", "poly_power": torch.zeros(2)},
        {"checkpoint_steps": torch.ones(2), "checkpoint_minutes": 15.0},
        {"checkpoint_minutes": "x"},
    ],
)
def test_wrong_values_of_the_version_before_are_refused(values):
    with pytest.raises(ValueError):
        config_from(values)
