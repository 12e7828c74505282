import argparse
import dataclasses

import pytest

from ncfast.config import Config, add_config_arguments, given_config_values, make_config
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
        "view_weight": 0.1,
        "projector_dim": 4096,
        "prior_dim": 256,
        "prior_layers": 4,
        "prior_heads": 2,
        "prior_head_dim": 64,
        "prior_ff_mult": 1,
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
        ({"ssl": "byol"}, "--ssl is one of none, barlow, vicreg, vibcreg, views; got 'byol'"),
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
