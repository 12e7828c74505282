"""What trains the refiner: of which series it learns."""

import numpy as np
import pytest
import torch
from runs import SMALL, waves

from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.training import fit, stages

CPU = torch.device("cpu")


def stage3(x, **options):
    dataset = from_arrays(x, None)
    options = {**SMALL, "refiner": "flow", "refiner_dim": 8, "precision": "fp32", **options}
    config, data = fit.resolve_config(make_config(**options), dataset, CPU), DataStats.of(dataset)
    x, observed = data.normalise_observed(dataset.X_train, CPU)
    vqvae = stages.new_vqvae(config, data).eval()
    stage = stages.make_stage3(config, vqvae, stages.new_refiner(config, data), x, CPU, observed=observed)
    return stage, vqvae, x, observed


@pytest.mark.parametrize("levels", [1, 2])
def test_sigma_is_what_the_nearest_codes_miss(levels):
    stage, vqvae, x, _ = stage3(waves(20, channels=2)[0], refiner_temperature=0.0, codebook_levels=levels)
    missed = (x - vqvae.reconstruct(x)).square().mean((0, 2)).sqrt()
    torch.testing.assert_close(stage.modules["refiner"].sigma, missed[:, None])


@pytest.mark.filterwarnings("ignore:.*missing values")
def test_sigma_is_of_what_was_observed():
    x = waves(20)[0]
    x[:, :, 10:30:2] = np.nan
    stage, vqvae, x, observed = stage3(x, refiner_temperature=0.0)
    missed = (x - vqvae.reconstruct(x, observed)).square()[observed].mean().sqrt()
    torch.testing.assert_close(stage.modules["refiner"].sigma, missed.view(1, 1))
    assert stage.losses(torch.arange(8), torch.Generator().manual_seed(0))["loss"].isfinite()


def test_series_go_through_several_draws_of_their_codes(monkeypatch):
    seen = []
    plain = stages.stage3_losses

    def watched(refiner, x, x_hat, *more):
        seen.append((x, x_hat))
        return plain(refiner, x, x_hat, *more)

    monkeypatch.setattr(stages, "stage3_losses", watched)
    for limit, most in ((2**28, stages.MAX_DRAWS), (3 * 20 * 61, 3), (1, 1)):
        monkeypatch.setattr(stages, "MAX_DECODED", limit)
        seen.clear()
        stage, _, x, _ = stage3(waves(20)[0], refiner_temperature=5.0)
        generator, rows = torch.Generator().manual_seed(0), torch.tensor([3, 7])
        for _ in range(60):
            stage.losses(rows, generator)
        assert all(torch.equal(own, x[rows]) for own, _ in seen)
        assert len(torch.stack([x_hat[0] for _, x_hat in seen]).unique(dim=0)) == most


def test_epochs_are_half_of_stage_1s_or_as_asked():
    dataset = from_arrays(*waves(20))
    for options, epochs in (
        ({"stage1_epochs": 11}, 6),
        ({"stage1_epochs": 10, "refiner_epochs": 3}, 3),
        ({"stage1_epochs": 10, "refiner": "none"}, None),
    ):
        assert fit.resolve_config(make_config(**options), dataset, CPU).refiner_epochs == epochs


@pytest.mark.parametrize(("n", "steps"), [(10, 1000), (100, 2000), (1000, 6000)])
def test_few_series_get_fewer_steps_of_stage_2(n, steps):
    dataset = from_arrays(np.random.default_rng(0).normal(size=(n, 1, 32)).astype(np.float32), None)
    per_epoch = -(-n // 256)
    config = fit.resolve_config(make_config(stretch=0.0), dataset, CPU)
    assert config.stage2_epochs == -(-steps // per_epoch)
    given = fit.resolve_config(make_config(stretch=0.0, stage2_steps=7), dataset, CPU)
    assert given.stage2_epochs == -(-7 // per_epoch)
