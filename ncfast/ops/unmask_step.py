"""One step of iterative decoding (Chang et al., MaskGIT, arXiv 2202.04200, section 3.2)."""

import torch
from torch import Tensor

from ncfast.ops import dispatch, philox


def unmask_step_reference(
    logits: Tensor,
    tokens: Tensor,
    sample: Tensor,
    *,
    seed: int,
    step: int,
    num_masked: int,
    choice_temperature: float,
) -> Tensor:
    """Fill every masked position, then mask the `num_masked` least confident of them again."""
    K = logits.shape[-1]
    position = torch.arange(tokens.shape[1], device=tokens.device)  # [n]
    at = {"seed": seed, "sample": sample[:, None], "position": position, "step": step}

    # Inverse-CDF sampling takes one uniform number a position and is exact.
    cdf = logits.double().softmax(-1).cumsum(-1)  # [B, n, K]
    u = philox.uniform(**at, stream=philox.TOKENS)  # [B, n]
    drawn = (cdf <= u[..., None] * cdf[..., -1:]).sum(-1).clamp(max=K - 1)
    masked = tokens == K
    tokens = torch.where(masked, drawn, tokens)
    if num_masked == 0:
        return tokens

    probability = logits.float().softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    gumbel = -torch.log(-torch.log1p(-philox.uniform(**at, stream=philox.CONFIDENCE)))
    confidence = torch.log(probability + 1e-5) + choice_temperature * gumbel
    confidence = torch.where(masked, confidence, torch.inf)
    # A stable sort ranks ties by position, so the same numbers always mask the same tokens.
    rank = confidence.argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where(rank < num_masked, K, tokens)


def unmask_step(
    logits: Tensor,
    tokens: Tensor,
    sample: Tensor,
    *,
    seed: int,
    step: int,
    num_masked: int,
    choice_temperature: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """One MaskGIT step: sample the masked positions, rank them by noisy confidence, mask the least sure again.

    The random numbers are addressed by (seed; sample, step, position), so a series does not depend on the batch it is
    drawn in. No host synchronisation, no loop over rows.

    Args:
        logits: of every position [B, n, K], guidance already applied.
        tokens: int64 [B, n] in 0..K; K marks a masked position.
        sample: global index of each row, int64 [B].
        seed: 64 bits.
        step: number of this step, from 0.
        num_masked: positions a row that stay masked after this step (0 in the last one).
        choice_temperature: scale of the Gumbel noise added to log(p + 1e-5), already annealed for this step.
        impl: "auto" or "reference".

    Returns:
        int64 [B, n] with `num_masked` entries of K in each row. Positions known before keep their token.

    Raises:
        ValueError: shapes that do not fit.
    """
    dispatch.choose("unmask_step", impl, why_not(logits.device))
    if logits.dim() != 3 or tokens.shape != logits.shape[:2] or sample.shape != tokens.shape[:1]:
        raise ValueError(
            "unmask_step: logits are [B, n, K], tokens [B, n], sample [B]; got "
            f"{list(logits.shape)}, {list(tokens.shape)}, {list(sample.shape)}"
        )
    return unmask_step_reference(
        logits,
        tokens,
        sample,
        seed=seed,
        step=step,
        num_masked=num_masked,
        choice_temperature=choice_temperature,
    )


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
