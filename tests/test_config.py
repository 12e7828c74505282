import argparse
import dataclasses

import pytest

from ncfast.cli.flags import add_config_arguments, given_config_values
from ncfast.config import Config, make_config
from ncfast.errors import UserError


def test_defaults_presets_and_given_values():
    assert make_config() == Config()
    paper = dataclasses.asdict(make_config("paper"))
    # What the authors ran, whatever `default` becomes.
    authors = {
        "n_fft": 8,
        "dim": 64,
        "residual_blocks": 4,
        "codebook_size": 32,
        "codebook_init": "random",
        "dead_code_threshold": 0.0,
        "codebook_decay": 0.9,
        "codebook_levels": 1,
        "detail": 0.0,
        "samples_per_column": 0,
        "level": "off",
        "view_weight": 0.1,
        "projector_dim": 4096,
        "prior_dim": 256,
        "prior_layers": 4,
        "prior_heads": 2,
        "prior_head_dim": 64,
        "prior_ff_mult": 1,
        "prior_dropout": 0.0,
        "token_temperature": 1.0,
        "refiner": "none",
        "stretch": 0.0,
        "embeddings": "learned",
        "class_dropout": 0.2,
        "decoding_steps": 10,
        "choice_temperature": 4.0,
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "unmasking": "paper",
        "stage1_epochs": 1000,
        "stage2_epochs": 1000,
        "batch_size": 128,
        "stage2_batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 1e-3,
    }
    assert {name: paper[name] for name in authors} == authors
    assert make_config("paper", stage1_epochs=3).stage1_epochs == 3
    assert make_config(augment="warp").augment == ("warp",)
    assert make_config(learning_rate=1).learning_rate == 1.0


def test_a_config_survives_json():
    config = make_config(augment=["warp", "gauss"], ssl_weight=0.5)
    assert make_config(**dataclasses.asdict(config)) == config


def test_every_field_is_a_flag_and_only_given_flags_count():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    assert given_config_values(parser.parse_args([])) == {}
    for f in dataclasses.fields(Config):
        assert f"--{f.name.replace('_', '-')}" in parser.format_help()
    line = "--ssl barlow --augment warp gauss --stage1-epochs 7 --learning-rate 2e-3 --ssl-weight 0.5 --seed 4"
    assert given_config_values(parser.parse_args(line.split())) == {
        "ssl": "barlow",
        "augment": ["warp", "gauss"],
        "stage1_epochs": 7,
        "learning_rate": 2e-3,
        "ssl_weight": 0.5,
        "seed": 4,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "fast"}, "preset is one of default, paper; got 'fast'"),
        (
            {"ssl": "moco"},
            "--ssl is one of none, barlow, vicreg, vibcreg, ntxent, byol, simsiam, sigreg, visreg, views; got 'moco'",
        ),
        ({"stage1_epoch": 3}, "no option 'stage1_epoch'; did you mean 'stage1_epochs'?"),
        ({"batch_size": 1}, "--batch-size is at least 2; got 1"),
        ({"batch_size": 2.5}, "--batch-size is an integer; got 2.5"),
        ({"batch_size": True}, "--batch-size is an integer; got True"),
        ({"class_dropout": 1.5}, "--class-dropout is at least 0 and at most 1; got 1.5"),
        ({"learning_rate": float("inf")}, "--learning-rate is at least 0; got inf"),
        ({"view_weight": float("nan")}, "--view-weight is a finite number; got nan"),
        ({"learning_rate": "1e-3"}, "--learning-rate is a number; got '1e-3'"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError) as error:
        make_config(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("projector_dim", 1, 2**20),
        ("n_fft", 4, None),
        ("dim", 1, 2**16),
        ("residual_blocks", 0, 1000),
        ("codebook_size", 2, 65535),  # a token is a uint16 on disk
        ("codebook_levels", 1, 8),
        ("detail", 0, 1),
        ("prior_dropout", 0, 0.9),
        ("token_temperature", 0, None),
        ("refiner_dim", 1, 4096),
        ("refiner_temperature", 0, None),
        ("refinements", 0, 1000),
        ("refiner_epochs", 1, 10**7),
        ("dead_code_threshold", 0, None),
        ("halvings", 1, None),
        ("codebook_decay", 0, 1),
        ("prior_dim", 1, 2**16),
        ("prior_layers", 1, 1000),
        ("prior_heads", 1, 4096),
        ("prior_head_dim", 1, 4096),
        ("prior_ff_mult", 1, 1024),
        ("class_dropout", 0, 1),
        ("decoding_steps", 1, 1000),
        ("choice_temperature", 0, None),
        ("guidance_scale", 0, None),
        ("temperature", 1e-3, None),
        ("top_k", 0, 2**31 - 1),  # an int of C++
        ("stage1_epochs", 1, 10**7),
        ("stage2_epochs", 1, 10**7),
        ("stage1_steps", 1, 10**8),
        ("stage2_steps", 1, 10**8),
        ("batch_size", 2, None),
        ("stage2_batch_size", 1, None),
        ("learning_rate", 0, None),
        ("weight_decay", 0, None),
        ("seed", 0, 2**63 - 1),  # an int64
    ],
)
def test_limits_are_allowed_and_nothing_beyond_them(name, smallest, largest):
    step = 1e-9 if isinstance(getattr(make_config(), name), float) else 1
    for limit, beyond in ((smallest, smallest - step), (largest, None if largest is None else largest + step)):
        if limit is None:
            continue
        assert getattr(make_config(**{name: limit}), name) == limit
        with pytest.raises(UserError, match=f"at (least|most) {limit}"):
            make_config(**{name: beyond})


def test_the_default_preset_is_what_the_experiments_chose():
    """docs/experiments.md; everything else is as the authors have it."""
    default, paper = dataclasses.asdict(make_config()), dataclasses.asdict(make_config("paper"))
    assert {name: value for name, value in default.items() if value != paper[name]} == {
        "augment": ("warp",),
        "view_weight": 1.0,
        "n_fft": 4,
        "codebook_size": 128,
        "detail": 0.2,
        "samples_per_column": 32,
        "level": "auto",
        "class_dropout": None,
        "refiner": "flow",
        "stretch": None,
        "projector_dim": 1024,
        "decoding_steps": 40,
        "choice_temperature": 1000.0,
        "stage1_epochs": None,
        "stage2_epochs": None,
    }
    assert (default["stage1_steps"], default["stage2_steps"], default["seed"]) == (3000, None, 0)
