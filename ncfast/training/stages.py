"""Both stages as the training loop takes them: modules, losses and initial weights of a configuration."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.data.augment import Augment
from ncfast.data.gaps import interpolated
from ncfast.data.stats import DataStats
from ncfast.engine.device import kind
from ncfast.engine.loop import Stage, derived_seed
from ncfast.engine.processes import ALONE, Processes
from ncfast.engine.step import Losses
from ncfast.models.prior import Prior
from ncfast.models.refiner import Refiner, refiner_losses
from ncfast.models.trained import build_models, build_prior, build_refiner
from ncfast.models.vqvae import VQVAE
from ncfast.training.self_supervision import WITHOUT_LOSS, SelfSupervision
from ncfast.training.stage1 import Gaps, stage1_losses
from ncfast.training.stage2 import TokenDistribution, stage2_losses


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
    missing: float = 0.0,
) -> Stage:
    """x: normalised series [N, C, L]; observed, bool like x, of series with gaps, of which a share `missing` is missing
    before their ends."""
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
            parts = [shown(batch, seen, missing, generator)]
            view = None
            if augment is not None:
                view, seen = augment.with_observed(batch, seen, generator)
                parts.append((view, seen, seen))
            gaps = Gaps(*[torch.cat([part[own] for part in kind]) for kind in zip(*parts, strict=True)], observed_share)
        if processes.is_alone:
            return stage1_losses(vqvae, ssl, batch, view, config.view_weight, gaps=gaps)
        view = None if view is None else view[own]
        gather = partial(processes.all_rows, rows=B)
        return stage1_losses(vqvae, ssl, batch[own], view, config.view_weight, loss_weight, gather, gaps)

    # Processes that round alike keep the same projector without a word; others have to agree on its gradients.
    whole = ssl if processes.is_alone or len(set(processes.gathered(kind(device)))) == 1 else None
    return dataclasses.replace(make_stage(1, config, modules, losses, len(x)), whole=whole)


def shown(x: Tensor, observed: Tensor, missing: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder sees of x [B, C, L], what of that is observed, and what is: about as many values again as are
    missing are hidden from it, another share in each series, so that it learns to do without."""
    if missing == 0:
        return x, observed, observed
    hidden = 2 * missing * torch.rand(len(x), 1, 1, device=x.device, generator=generator)
    visible = observed & (torch.rand(x.shape, device=x.device, generator=generator) >= hidden)
    return interpolated(x, visible), visible, observed


def on_device(modules: nn.Module, device: torch.device) -> nn.Module:
    """Moved there; on a GPU with the weights of convolutions in the order that its tensor cores take."""
    if device.type == "cuda":
        return modules.to(device, memory_format=torch.channels_last)
    return modules.to(device)


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
    if conditions is not None:
        prior.condition_embedding.remember(conditions, labels)
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
    distribution = TokenDistribution(vqvae, x, observed, config.refiner_temperature)
    modules = nn.ModuleDict({"refiner": refiner}).to(device)

    @torch.no_grad()
    def decoded(rows: Tensor, generator: torch.Generator) -> Tensor:
        """Train series through stochastic codes [B, C, L]."""
        return vqvae.detokenize(distribution.draw(rows, generator))

    generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 3, 1))
    error, count = 0, 0
    for rows in torch.arange(len(x), device=device).split(256):
        missed = (x[rows] - decoded(rows, generator)).double()
        if observed is not None:
            missed = missed.masked_fill(~observed[rows], torch.nan)
        error, count = error + missed.square().nansum((0, 2)), count + (~missed.isnan()).sum((0, 2))
    refiner.sigma.copy_((error / count).sqrt().clamp(min=1e-3)[:, None])

    def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        own, loss_weight = processes.local_slice(len(rows)), processes.loss_weight(len(rows))
        x_hat = decoded(rows, generator)
        seen = None if observed is None else observed[rows]
        found = refiner_losses(refiner, x[rows], x_hat, generator, seen, own)
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


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Torch's CPU generator set from `words` inside the block and put back after it: for initial weights."""
    previous = torch.get_rng_state()
    torch.default_generator.manual_seed(derived_seed(*words))
    try:
        yield
    finally:
        torch.set_rng_state(previous)
