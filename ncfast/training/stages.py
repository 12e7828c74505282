"""The stages as the training loop takes them: modules, losses and initial weights of a configuration."""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.data.augment import Augment
from ncfast.data.stats import DataStats
from ncfast.engine.device import kind
from ncfast.engine.loop import Stage, derived_seed, seeded
from ncfast.engine.precision import computing
from ncfast.engine.processes import ALONE, Processes
from ncfast.engine.step import Losses
from ncfast.models.prior import Prior
from ncfast.models.refiner import Refiner
from ncfast.models.trained import build_models, build_prior, build_refiner
from ncfast.models.vqvae import VQVAE
from ncfast.training.self_supervision import WITHOUT_LOSS, SelfSupervision
from ncfast.training.stage1 import Gaps, stage1_losses
from ncfast.training.stage2 import TokenDistribution, stage2_losses
from ncfast.training.stage3 import stage3_losses

MAX_DRAWS, MAX_DECODED = 8, 2**28  # of the codes of a series for the refiner; numbers in all of them


def new_vqvae(config: Config, data: DataStats) -> VQVAE:
    with seeded(config.seed, 1):
        return build_models(config, data)[0]


def new_self_supervision(config: Config) -> SelfSupervision | None:
    with seeded(config.seed, 1, 1):
        return None if config.ssl in WITHOUT_LOSS else SelfSupervision(config)


def new_prior(config: Config, vqvae: VQVAE, data: DataStats) -> Prior:
    with seeded(config.seed, 2):
        return build_prior(config, data, vqvae)


def make_stage1(
    config: Config,
    vqvae: VQVAE,
    x: Tensor,
    device: torch.device,
    processes: Processes = ALONE,
    observed: Tensor | None = None,
) -> Stage:
    """x: normalised series [N, C, L]; observed, bool like x, of series with gaps."""
    observed_share = 1.0 if observed is None else float(observed.double().mean())
    ssl = new_self_supervision(config)
    augment = None if config.ssl == "none" else Augment(config.augment)
    modules = on_device(nn.ModuleDict({"vqvae": vqvae} if ssl is None else {"vqvae": vqvae, "ssl": ssl}), device)

    def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        batch, B = x[rows], len(rows)
        own, loss_weight = processes.local_slice(B), processes.loss_weight(B)
        gaps = None
        if observed is None:
            view = None if augment is None else augment(batch, generator)
        else:
            seen = observed[rows]
            view, each = None, [seen]
            if augment is not None:
                view, seen = augment.with_observed(batch, seen, generator)
                each.append(seen)
            gaps = Gaps(torch.cat([seen[own] for seen in each]), observed_share)
        if processes.is_alone:
            return stage1_losses(vqvae, ssl, batch, view, config.view_weight, gaps=gaps, generator=generator)
        view = None if view is None else view[own]
        gather = partial(processes.all_rows, rows=B)
        return stage1_losses(vqvae, ssl, batch[own], view, config.view_weight, loss_weight, gather, gaps, generator)

    # Processes that round alike keep the same projector without a word; others have to agree on its gradients.
    whole = ssl if processes.is_alone or len(set(processes.gathered(kind(device)))) == 1 else None
    return dataclasses.replace(make_stage(1, config, modules, losses, len(x)), whole=whole)


def on_device(modules: nn.Module, device: torch.device) -> nn.Module:
    """Moved there, with the weights of convolutions in the order that the tensor cores of a GPU take; on a CPU a step
    takes an eighth less in it."""
    return modules.to(device, memory_format=torch.channels_last)


def make_stage2(
    config: Config,
    vqvae: VQVAE,
    prior: Prior,
    x: Tensor,
    labels: Tensor | None,
    device: torch.device,
    processes: Processes = ALONE,
    observed: Tensor | None = None,
    conditions: Tensor | None = None,
) -> Stage:
    """conditions: of a prior that has some, float64 [N, k] on the device; they become part of it."""
    if conditions is not None:  # of the series themselves, without their copies
        own = slice(len(prior.condition_embedding.rows))
        prior.condition_embedding.remember(conditions[own], None if labels is None else labels[own])
    distribution = TokenDistribution(vqvae, x, observed, config.token_temperature)
    modules = nn.ModuleDict({"prior": prior}).to(device)

    def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = distribution.draw(rows, generator)
        own, loss_weight = processes.local_slice(len(rows)), processes.loss_weight(len(rows))
        return stage2_losses(
            prior,
            tokens,
            None if labels is None else labels[rows],
            config,
            generator,
            own,
            loss_weight,
            None if conditions is None else conditions[rows],
        )

    return make_stage(2, config, modules, losses, len(x))


def new_refiner(config: Config, data: DataStats) -> Refiner | None:
    with seeded(config.seed, 3):
        return build_refiner(config, data)


def make_stage3(
    config: Config,
    vqvae: VQVAE,
    refiner: Refiner,
    x: Tensor,
    device: torch.device,
    processes: Processes = ALONE,
    observed: Tensor | None = None,
) -> Stage:
    """x and observed as for `make_stage1`; vqvae in eval mode, without a refiner. Sets the refiner's sigma."""
    distribution = TokenDistribution(vqvae, x, observed, config.refiner_temperature)
    modules = nn.ModuleDict({"refiner": refiner}).to(device)

    # Each series through several draws of its codes, decoded once.
    draws = max(1, min(MAX_DRAWS, MAX_DECODED // x.numel()))
    generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 3, 1))
    with torch.no_grad(), computing("fp32", device):
        decoded = torch.empty(draws, *x.shape, dtype=x.dtype, device=device)
        for rows in torch.arange(len(x), device=device).split(256):
            for draw in decoded:
                draw[rows] = vqvae.detokenize(distribution.draw(rows, generator))
        missed = (x - decoded).double()
        if observed is not None:
            missed = missed.masked_fill(~observed, torch.nan)
        refiner.sigma.copy_(missed.square().nanmean((0, 1, 3)).sqrt().clamp(min=1e-3)[:, None])
        del missed

    def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        own, loss_weight = processes.local_slice(len(rows)), processes.loss_weight(len(rows))
        x_hat = decoded[torch.randint(draws, rows.shape, device=device, generator=generator), rows]
        seen = None if observed is None else observed[rows]
        found = stage3_losses(refiner, x[rows], x_hat, generator, seen, own)
        return found if loss_weight == 1 else {name: loss_weight * value for name, value in found.items()}

    return make_stage(3, config, modules, losses, len(x))


def make_stage(number: int, config: Config, modules: nn.ModuleDict, losses: Losses, num_series: int) -> Stage:
    name, batch_size, epochs = {
        1: ("stage 1 (VQVAE)", config.batch_size, config.stage1_epochs),
        2: ("stage 2 (prior)", config.stage2_batch_size, config.stage2_epochs),
        3: ("stage 3 (refiner)", config.batch_size, config.refiner_epochs),
    }[number]
    return Stage(
        number=number,
        name=name,
        modules=modules,
        losses=losses,
        num_series=num_series,
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        precision=config.precision,
    )
