"""One step of iterative decoding (Chang et al., MaskGIT, arXiv 2202.04200, section 3.2)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch, philox

CONVENTIONS = ("paper", "google")
LIMIT = 2**16  # of steps and positions: the bits that an address of philox has for each

MAX_CODES_TRITON = 4096  # the codes of one position are one tile

# Elements that the reference takes at once: 128 MiB of float64.
BLOCK = 2**24


def weight_scale(K: int) -> float:
    """The weight of the likeliest of K codes: weights are integers, and their sum is at most 2⁵³."""
    return 2.0 ** (53 - max(1, (K - 1).bit_length()))


def unmask_step_reference(
    logits: Tensor,
    tokens: Tensor,
    sample: Tensor,
    *,
    seed: int | Tensor,
    step: int,
    num_masked: int | Tensor,
    choice_temperature: float = 0.0,
    positions: Tensor | None = None,
    width: int | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    convention: str = "paper",
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, in float64 from the logits on; the arguments are those of `unmask_step`."""
    (B, m, K), n = logits.shape, tokens.shape[1]
    every = torch.arange(n, device=tokens.device)
    if positions is None:
        positions = every.expand(B, n)
    real = (positions >= 0) & (positions < n)
    position = torch.where(real, positions, 0)  # [B, m]
    # Padding looks at a column behind the last: there may be no other.
    drawn = real & (F.pad(tokens, (0, 1)).gather(1, torch.where(real, positions, n)) == K)
    at = {"seed": seed, "sample": sample[:, None], "position": position, "step": step}

    u = philox.uniform(**at, stream=philox.TOKENS)  # [B, m]
    rows = max(1, BLOCK // max(1, m * K))
    parts = []
    for first in range(0, B, rows):
        block = slice(first, first + rows)
        other = None if unconditional is None else unconditional[block]
        scores = guided(logits[block], other, guidance_scale) / temperature
        parts.append(draw(scores, u[block], top_k))
    code, probability = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else (position, u)

    masked = torch.zeros_like(drawn)
    if not (isinstance(num_masked, int) and num_masked == 0):
        confidence = torch.log(probability + 1e-5 if convention == "paper" else probability)
        if choice_temperature != 0:
            # 1 - u is exact, so its logarithm is as good as log1p(-u).
            gumbel = -torch.log(-torch.log(1 - philox.uniform(**at, stream=philox.CONFIDENCE)))
            confidence = confidence + choice_temperature * gumbel
        confidence = torch.where(probability > 0, confidence, -torch.inf)
        confidence = torch.where(drawn, confidence, torch.inf)
        count = torch.as_tensor(num_masked, device=tokens.device).expand(B)[:, None]  # [B, 1]
        # A stable sort ranks ties by position, so the same numbers always mask the same tokens.
        ascending, order = confidence.sort(dim=-1, stable=True)
        if convention == "paper":
            masked = order.argsort(dim=-1) < count
        else:
            fewer = torch.minimum(count, drawn.sum(-1, keepdim=True) - 1).clamp(min=1, max=m)
            threshold = F.pad(ascending, (0, 1), value=torch.inf).gather(1, fewer)
            masked = (confidence < threshold) & (count > 0)

    # What is not drawn goes to a column of its own, which is cut off.
    out = F.pad(tokens, (0, 1)).scatter(1, torch.where(drawn, position, n), torch.where(masked, K, code))[:, :n]
    out = out.contiguous()
    remaining = torch.where(out == K, every, n).sort(dim=1).values
    width = default_width(num_masked, n) if width is None else width
    return out, F.pad(remaining[:, :width], (0, max(0, width - n)), value=n)


def guided(logits: Tensor, unconditional: Tensor | None, guidance_scale: float) -> Tensor:
    """u + s (c - u) in float64; equal logits stay as they are, -inf too."""
    logits = logits.double()
    if unconditional is None:
        return logits
    unconditional = unconditional.double()
    return torch.where(logits == unconditional, logits, unconditional + guidance_scale * (logits - unconditional))


def draw(scores: Tensor, u: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """A code of each position and its probability: scores float64 [B, m, K], u [B, m] -> int64 and float64 [B, m].

    Weights are rounded to integers, 2⁻⁴³ of the largest for K = 1024, far finer than u. Their sums are then exact in
    any order, and the code is the same on every device.
    """
    K = scores.shape[-1]
    top = scores.amax(-1, keepdim=True)
    sound = top.isfinite()  # no NaN, no infinity, something that is not -infinity
    scores = torch.where(sound, scores, 0)
    if 0 < top_k < K:
        last = scores.topk(top_k).values[..., -1:]
        above, level = scores > last, scores == last
        room = top_k - above.sum(-1, keepdim=True)
        scores = torch.where(above | (level & (level.cumsum(-1) <= room)), scores, -torch.inf)
    scale = weight_scale(K)
    weights = (scores - torch.where(sound, top, 0)).exp_().mul_(scale)
    cdf = weights.round().cumsum_(-1)
    total = cdf[..., -1]
    code = (cdf <= (u * total)[..., None]).sum(-1)
    probability = weights.gather(-1, code[..., None]).squeeze(-1) / total
    sound = sound.squeeze(-1)
    return torch.where(sound, code, 0), torch.where(sound, probability, 0)


def default_width(num_masked: int | Tensor, n: int) -> int:
    return n if isinstance(num_masked, Tensor) else num_masked


def unmask_step(
    logits: Tensor,
    tokens: Tensor,
    sample: Tensor,
    *,
    seed: int | Tensor,
    step: int,
    num_masked: int | Tensor,
    choice_temperature: float = 0.0,
    positions: Tensor | None = None,
    width: int | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    convention: str = "paper",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One MaskGIT step: sample the masked positions, rank them by noisy confidence, mask the least sure again.

    A position is drawn when it is masked in `tokens` and listed in `positions`: its code from
    softmax(top_k(logits / temperature)), by one uniform number through the inverse CDF. Of the drawn positions those
    of the least confidence are masked again:

    - "paper" (NC-VQVAE, TimeVQVAE): confidence = log(p + 1e-5) + choice_temperature * Gumbel; exactly `num_masked`,
      equal confidence by position, the lower first.
    - "google" (google-research/maskgit, parallel_decode.py): confidence = log p + choice_temperature * Gumbel; those
      below the m-th smallest (from 0), m = max(1, min(num_masked, drawn - 1)): one at least is revealed and one
      stays masked; equal confidence masks fewer. num_masked = 0 is its last step, in which all are revealed.

    The random numbers are addressed by (seed; sample, step, position), so a series does not depend on the batch it is
    drawn in. All arithmetic from the logits on is float64, and the sums are exact: the same logits give the same
    integers whatever the implementation and the device. No host synchronisation, no loop over rows.

    A position whose scores hold a NaN or +infinity, or nothing but -infinity, gets code 0 and the least confidence.

    Args:
        logits: float32, float64, float16 or bfloat16 [B, m, K], of the positions that `positions` lists.
        tokens: int64 [B, n] in 0..K; K marks a masked position.
        sample: global index of each row, int64 [B].
        seed: 64 bits; an int64 tensor without dimensions lets a CUDA graph be replayed with another one.
        step: number of this step, from 0, below 65536.
        num_masked: positions a row that stay masked after this step (0 in the last one); one number, or int64 [B].
            Where fewer are drawn, all of them stay masked.
        choice_temperature: scale of the Gumbel noise in the confidence, already annealed for this step.
        positions: int64 [B, m], ascending in each row; an entry that is not in 0..n-1, such as n, is padding, and its
            logits are ignored. None: m = n, and logits row j is that of position j.
        width: columns of the positions that are returned; by default `num_masked`, or n if that is a tensor.
        unconditional: logits without the class, like `logits`: u + guidance_scale * (c - u) takes their place.
        guidance_scale: 1 ignores `unconditional`.
        temperature: divides the logits, both for the draw and for the confidence; above 0.
        top_k: keep the k likeliest codes of a position, of equal ones the lowest; 0 keeps all.
        convention: "paper" or "google".
        impl: "auto" (the fastest that can run the call), "reference", "cpp" (float32) or "triton".

    Returns:
        tokens int64 [B, n], those known before as they were, and the positions that are still masked, int64
        [B, width], ascending, filled up with n.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit; an unknown convention or impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(logits, tokens, sample, seed, step, num_masked, positions, width, unconditional)
    check_options(choice_temperature, guidance_scale, temperature, top_k, convention)
    name = dispatch.choose("unmask_step", impl, why_not(logits.device, logits.dtype, logits.shape[-1]))
    if guidance_scale == 1:
        unconditional = None
    width = default_width(num_masked, tokens.shape[1]) if width is None else width
    if name == "reference":
        return unmask_step_reference(
            logits,
            tokens,
            sample,
            seed=seed,
            step=step,
            num_masked=num_masked,
            choice_temperature=choice_temperature,
            positions=positions,
            width=width,
            unconditional=unconditional,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            convention=convention,
        )
    seeds, seed = (seed, 0) if isinstance(seed, Tensor) else (None, as_int64(seed))
    counts, num_masked = (num_masked, 0) if isinstance(num_masked, Tensor) else (None, num_masked)
    return OPERATORS[name](
        logits.contiguous(),
        None if unconditional is None else unconditional.contiguous(),
        tokens.contiguous(),
        sample.contiguous(),
        None if positions is None else positions.contiguous(),
        seeds,
        None if counts is None else counts.contiguous(),
        seed,
        step,
        num_masked,
        width,
        choice_temperature,
        guidance_scale,
        temperature,
        top_k,
        convention == "google",
    )


def as_int64(seed: int) -> int:
    """The low 64 bits, in two's complement."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63


def check(logits, tokens, sample, seed, step, num_masked, positions, width, unconditional) -> None:
    m = tokens.shape[-1] if positions is None else positions.shape[-1]
    if (
        logits.dim() != 3
        or tokens.dim() != 2
        or logits.shape[:2] != (tokens.shape[0], m)
        or sample.shape != tokens.shape[:1]
        or (positions is not None and positions.shape != logits.shape[:2])
    ):
        raise ValueError(
            "unmask_step: logits are [B, m, K], tokens [B, n], sample [B], positions [B, m] (or None: m = n); got "
            f"{list(logits.shape)}, {list(tokens.shape)}, {list(sample.shape)}, "
            f"{None if positions is None else list(positions.shape)}"
        )
    if logits.shape[2] == 0 or tokens.shape[1] > LIMIT:
        raise ValueError(
            f"unmask_step: 1 code or more, {LIMIT} positions or fewer; got {logits.shape[2]} and {tokens.shape[1]}"
        )
    if logits.dtype not in dispatch.DTYPE_CODES:
        raise ValueError(f"unmask_step: logits are float32, float64, float16 or bfloat16; got {logits.dtype}")
    if unconditional is not None and (unconditional.shape != logits.shape or unconditional.dtype != logits.dtype):
        raise ValueError(
            f"unmask_step: unconditional is like logits, {list(logits.shape)} {logits.dtype}; got "
            f"{list(unconditional.shape)} {unconditional.dtype}"
        )
    if isinstance(seed, Tensor) and seed.dim() != 0:
        raise ValueError(f"unmask_step: a seed that is a tensor has no dimensions; got {list(seed.shape)}")
    if isinstance(num_masked, Tensor):
        if num_masked.shape != tokens.shape[:1]:
            raise ValueError(
                f"unmask_step: num_masked is a number, or [B] = {list(tokens.shape[:1])}; got {list(num_masked.shape)}"
            )
    elif num_masked < 0:
        raise ValueError(f"unmask_step: num_masked is 0 or more; got {num_masked}")
    if not 0 <= step < LIMIT:
        raise ValueError(f"unmask_step: step is in 0..{LIMIT - 1}; got {step}")
    if width is not None and width < 0:
        raise ValueError(f"unmask_step: width is 0 or more; got {width}")
    for name, tensor in (
        ("tokens", tokens),
        ("sample", sample),
        ("seed", seed),
        ("num_masked", num_masked),
        ("positions", positions),
        ("unconditional", unconditional),
    ):
        if not isinstance(tensor, Tensor):
            continue
        if name != "unconditional" and tensor.dtype != torch.int64:
            raise ValueError(f"unmask_step: {name} is int64; got {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(
                f"unmask_step: logits are on {logits.device} and {name} on {tensor.device}; move them to one device"
            )


def check_options(choice_temperature, guidance_scale, temperature, top_k, convention) -> None:
    if not 0 <= choice_temperature < math.inf:
        raise ValueError(f"unmask_step: choice_temperature is 0 or more; got {choice_temperature}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"unmask_step: temperature is above 0; got {temperature}")
    if not -math.inf < guidance_scale < math.inf:
        raise ValueError(f"unmask_step: guidance_scale is finite; got {guidance_scale}")
    if top_k < 0:
        raise ValueError(f"unmask_step: top_k is 0 (all codes) or more; got {top_k}")
    if convention not in CONVENTIONS:
        raise ValueError(f"unmask_step: convention is {' or '.join(CONVENTIONS)}; got {convention!r}")


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, num_codes: int = 1) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    wide = f"{num_codes} codes: the kernel takes up to {MAX_CODES_TRITON}" if num_codes > MAX_CODES_TRITON else None
    unfit_cpp = None if dtype == torch.float32 else f"{dtype} logits: the kernel is float32"
    return dispatch.table(device, cpp=unfit_cpp, triton=wide)


def empty_results(
    logits, unconditional, tokens, sample, positions, seeds, counts, seed, step, num_masked, width, *options
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty(tokens.shape[0], width, dtype=tokens.dtype, device=tokens.device)


def run_cpp(
    logits, unconditional, tokens, sample, positions, seeds, counts, seed, step, num_masked, width, *options
) -> tuple[Tensor, Tensor]:
    (B, m, K), n = logits.shape, tokens.shape[1]
    out, remaining = torch.empty_like(tokens), torch.empty(B, width, dtype=tokens.dtype)
    seed = seed if seeds is None else seeds.item()  # on the CPU: no device to wait for
    inputs = (logits, unconditional, tokens, sample, positions, counts, B, m, n, K, seed, step, num_masked)
    dispatch.native("_C", "unmask_step", *inputs, *options, width, torch.get_num_threads(), out, remaining)
    return out, remaining


def run_triton(logits: Tensor, *others) -> tuple[Tensor, Tensor]:
    return dispatch.triton("unmask_step.unmask_step_triton")(weight_scale(logits.shape[-1]), logits, *others)


# All contiguous; `seeds` (no dimensions) and `counts` [B] take the place of `seed` and `num_masked`
# -> tokens [B, n], positions [B, width]
OPERATORS = dispatch.operator(
    "unmask_step(Tensor logits, Tensor? unconditional, Tensor tokens, Tensor sample, Tensor? positions, "
    "Tensor? seeds, Tensor? counts, SymInt seed, SymInt step, SymInt num_masked, SymInt width, "
    "float choice_temperature, float guidance_scale, float temperature, SymInt top_k, bool google) "
    "-> (Tensor, Tensor)",
    empty_results,
    cpp=run_cpp,
    triton=run_triton,
)
