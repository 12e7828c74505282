"""The codes of VectorQuantize and how they follow the vectors: moving averages, k-means start, dead-code revival."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ncfast.nn.draw_rows import all_reduce, draw_rows
from ncfast.ops import code_stats, dispatch, nearest_code

# Scales codes exactly. argmin |z - s e|² = argmax z·e - s |e|²/2: at this s the second term is lost in rounding.
COSINE_SCALE = 2.0**-20


def unit(x: Tensor) -> Tensor:
    """x / |x|. A vector of zeros, which has no direction, stays one and gets no gradient, instead of one of 1e6."""
    if not x.requires_grad:
        return F.normalize(x, dim=-1, eps=1e-6)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm.clamp_min(1e-6), torch.inf)


def are_finite(z: Tensor) -> Tensor:
    """Of vectors [..., D] -> bool [...]."""
    return torch.linalg.vector_norm(z.float(), torch.inf, dim=-1) < torch.inf  # isfinite takes four launches


class Codebook(nn.Module):
    """H codebooks of K codes, with the names and state of vector-quantize-pytorch's (`VectorQuantize._codebook`).

    State: `embed` [H, K, D], a buffer or, when `learnable_codebook`, a parameter; `embed_avg` [H, K, D] and
    `cluster_size` [H, K], the moving averages of sums and counts; `initted`, whether k-means has run. Not saved:
    `code_counts` [H, K], how many vectors of the last training batch chose each code.

    Vectors are [H, M, D] here, their codes int64 [H, M] with -1 for a masked one.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool | None = False,
        learnable_codebook: bool = False,
        sample_codebook_temp: float = 1.0,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.kmeans_iters = kmeans_iters
        self.sync_kmeans = sync_kmeans
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.reset_cluster_size = threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        self.use_ddp = use_ddp
        self.learnable_codebook = learnable_codebook
        self.sample_codebook_temp = sample_codebook_temp
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.vq_bridge = vq_bridge
        self.affine_param = affine_param
        self.sync_affine_param = sync_affine_param
        self.affine_param_batch_decay = affine_param_batch_decay
        self.affine_param_codebook_decay = affine_param_codebook_decay

        if kmeans_init:
            embed = torch.zeros(num_codebooks, codebook_size, dim)
        else:
            embed = nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim))
            embed = unit(embed) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # Integers: half() on the module must not round them.
        counts = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64)
        self.register_buffer("code_counts", counts, persistent=False)
        if affine_param:
            self.register_buffer("batch_mean", None)
            self.register_buffer("batch_variance", None)
            self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
            self.register_buffer("codebook_mean", torch.zeros(num_codebooks, 1, dim))
            self.register_buffer("codebook_variance_needs_init", torch.tensor(True))
            self.register_buffer("codebook_variance", torch.ones(num_codebooks, 1, dim))

        # The last reading of each buffer that a forward branches on: the buffer, its version, its value.
        self._read: dict[str, tuple[Tensor | None, int, bool]] = {"initted": (None, -1, not kmeans_init)}
        if affine_param:
            self._read["codebook_mean_needs_init"] = (None, -1, True)
        self._has_accumulated = False

    def flag(self, name: str) -> bool:
        """The value of a boolean buffer, which decides, whoever has written it: a checkpoint, a copy, the caller.

        Reading it would stall a GPU each time, so it is read when it is another tensor or has been written since. In a
        compiled graph it cannot be read: there it is what it was when last read, or set here.
        """
        before, version, value = self._read[name]
        if torch.compiler.is_compiling():
            return value
        buffer = getattr(self, name)
        now = -1 if buffer.is_inference() else buffer._version
        if buffer is not before or version != now or now < 0:
            value = bool(buffer)
            self._read[name] = (buffer, now, value)
        return value

    def set_flag(self, name: str, value: bool) -> None:
        buffer = getattr(self, name)
        buffer.fill_(value)
        if torch.compiler.is_compiling():
            self._read[name] = (None, -1, value)
        else:
            self._read[name] = (buffer, -1 if buffer.is_inference() else buffer._version, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name in ("batch_mean", "batch_variance") if self.affine_param else ():
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved, device=self.embed.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._read:  # also for a graph that is compiled next
            self.flag(name)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Codes [H, K, D] from elsewhere, and averages that would make them: each as if one vector had chosen it."""
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1)
        self.set_flag("initted", True)

    def transform_input(self, z: Tensor) -> Tensor:
        return unit(z) if self.use_cosine_sim else z

    # Codes and distances

    def codes(self) -> Tensor:
        """[H, K, D] as the vectors meet them, float32 or better: through the bridge and the affine map."""
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        embed = embed if embed.dtype == torch.float64 else embed.float()
        if torch.compiler.is_compiling() and not dispatch.exporting():
            # Inductor of torch 2.10 and 2.11 has operators read the codes after the moving average has written them.
            embed = Snapshot.apply(embed)
        if self.vq_bridge is not None:
            embed = self.vq_bridge(embed)
        if self.affine_param:
            embed = (embed - self.codebook_mean) * (1 / self.affine_scale()) + self.batch_mean
        return embed

    def affine_scale(self) -> Tensor:
        """Standard deviation of the codes over that of the vectors [H, 1, D]."""
        return (self.codebook_variance.clamp(min=1e-5) / self.batch_variance.clamp(min=1e-5)).sqrt()

    def nearest(self, z: Tensor, codes: Tensor) -> Tensor:
        """int64 [H, M]: the code at the smallest distance, or at the smallest angle."""
        return nearest_code(z, codes * COSINE_SCALE if self.use_cosine_sim else codes)

    def similarities(self, z: Tensor, codes: Tensor) -> Tensor:
        """[H, M, K]: minus the Euclidean distances, or the cosines; differentiable, and as large as it says."""
        z = z if z.dtype == torch.float64 else z.float()
        codes = codes.to(z.dtype)
        if self.use_cosine_sim:
            return z @ codes.mT
        squares = z.square().sum(-1, keepdim=True) + codes.square().sum(-1)[:, None]
        return -torch.baddbmm(squares, z, codes.mT, alpha=-2).clamp(min=1e-8).sqrt()

    # Start

    @torch.no_grad()
    def init_embed_(self, z: Tensor, mask: Tensor | None = None) -> None:
        """k-means over the first batch, when the buffer `initted` says that the codes have not been given yet."""
        if self.flag("initted"):
            return
        sync = self.syncs(self.sync_kmeans)
        if (z.shape[1] == 0 and not sync) or (sync and not self.training):
            return  # outside training the other processes may not be here
        z = z.detach()
        finite = are_finite(z)
        if not torch.compiler.is_compiling() and not finite.all():
            mask = finite if mask is None else mask & finite
            z = z.nan_to_num(0.0, 0.0, 0.0)
        means = self.first_means(z, mask, sync)
        counts = self.cluster_size
        for _ in range(self.kmeans_iters):
            indices = self.nearest(z, means)
            indices = indices if mask is None else indices.masked_fill(~mask, -1)
            counts, sums = code_stats(z, indices, self.codebook_size)
            if sync:
                counts, sums = all_reduce(counts, sums)
            moved = sums / counts.clamp(min=1)[..., None]
            moved = unit(moved) if self.use_cosine_sim else moved
            means = torch.where(counts[..., None] == 0, means.to(moved.dtype), moved)
        if torch.compiler.is_compiling():
            # The buffer may say otherwise than when it was last read; then everything stays.
            before = [each.clone() for each in (self.embed_avg, self.cluster_size, self.embed)]
        self.embed_avg.copy_(means * counts[..., None])
        self.cluster_size.copy_(counts)
        self.update_ema()
        if torch.compiler.is_compiling():
            for own, old in zip((self.embed_avg, self.cluster_size, self.embed), before, strict=True):
                own.data.copy_(torch.where(self.initted, old, own))
        self.set_flag("initted", True)

    def first_means(self, z: Tensor, mask: Tensor | None, sync: bool) -> Tensor:
        """Vectors drawn from the batch [H, K, D]; the same one several times when there are fewer than codes."""
        (H, M, D), K = z.shape, self.codebook_size
        if not sync and mask is None and M < K:
            warnings.warn(f"k-means starts {K} codes from {M} vectors: some will be equal", stacklevel=2)
            rows = torch.stack([torch.randint(0, M, (K,), device=z.device) for _ in range(H)])
            return z.gather(1, rows[..., None].expand(-1, -1, D))
        means, available, _ = draw_rows(z, mask, K, sync)
        slots = torch.arange(K, device=z.device).expand(H, K)
        slots = slots % (available.clamp(min=1) if isinstance(available, Tensor) else available)
        return means.gather(1, slots[..., None].expand_as(means))

    @torch.no_grad()
    def update_affine(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Moving mean and variance of the vectors and, in training, of the codes."""
        z = z.detach().float()
        needs_init = self.flag("codebook_mean_needs_init")
        if self.training or needs_init:
            embed = self.embed.detach().float()
            mean, variance = embed.mean(1, keepdim=True), embed.var(1, keepdim=True, unbiased=False)
            for average, new in ((self.codebook_mean, mean), (self.codebook_variance, variance)):
                if needs_init:
                    average.copy_(new)  # whatever it holds, NaN too
                else:
                    average.lerp_(new.to(average), 1 - self.affine_param_codebook_decay)
            if needs_init:
                self.set_flag("codebook_mean_needs_init", False)
                self.codebook_variance_needs_init.fill_(False)
        weight = z.new_ones(z.shape[:2]) if mask is None else mask.to(z.dtype)
        weight = weight[..., None]  # [H, M, 1]
        total, number = (weight * z).sum(1, keepdim=True), weight.sum(1, keepdim=True)
        sync = self.training and self.syncs(self.sync_affine_param)
        if sync:
            total, number = all_reduce(total, number)
        mean = total / number
        deviation = (weight * (z - mean).square()).sum(1, keepdim=True)
        if sync:
            (deviation,) = all_reduce(deviation)
        variance = deviation / number
        if self.batch_mean is None:
            with torch.inference_mode(False):  # tensors made in it could never be changed in training
                self.batch_mean, self.batch_variance = (torch.empty_like(each) for each in (self.codebook_mean,) * 2)
            self.batch_mean, self.batch_variance = (
                own.copy_(new) for own, new in ((self.batch_mean, mean), (self.batch_variance, variance))
            )
        else:
            self.batch_mean.lerp_(mean, 1 - self.affine_param_batch_decay)
            self.batch_variance.lerp_(variance, 1 - self.affine_param_batch_decay)

    # Following the vectors

    @torch.no_grad()
    def update(
        self,
        z: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """One step of the moving averages from a batch, and of what hangs on them; see VectorQuantize.forward.

        z [H, M, D]; indices int64 [H, M], -1 where `mask` is False.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and not self.has_dead_code_replacement:
            self.count(indices)
            return
        z = z.detach()
        # A vector with a NaN or infinity counts nowhere. On a CPU the sums tell whether there is one.
        if not self.looks(z):
            indices = indices.masked_fill(~are_finite(z), -1)
        counts, sums = code_stats(z, indices, self.codebook_size)
        if self.looks(z) and not math.isfinite(float(sums.sum())):
            finite = are_finite(z)
            mask = finite if mask is None else mask & finite
            counts, sums = code_stats(z, indices.masked_fill(~finite, -1), self.codebook_size)
        if self.affine_param:
            # The sums of the vectors mapped to where the codes live: the map is affine, so it can come after the sum.
            number = counts[..., None]
            sums = (sums - number * self.batch_mean) * self.affine_scale() + number * self.codebook_mean
        if self.syncs():
            counts, sums = all_reduce(counts, sums)
        self.code_counts.copy_(counts)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        if accum_ema_update:
            for buffer, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
                new = new.to(buffer)
                buffer.grad = new if buffer.grad is None else buffer.grad + new
            self._has_accumulated = True
            return
        self.move_average(self.cluster_size, counts, ema_update_weight)
        self.move_average(self.embed_avg, sums, ema_update_weight)
        self._has_accumulated = False
        if ema_update and not self.manual_ema_update:
            self.update_ema()
        self.expire_codes_(z, mask)

    @staticmethod
    def looks(z: Tensor) -> bool:
        """Whether values may be looked at: on a GPU that costs a stall, and in a compiled graph it cannot be done."""
        return z.device.type == "cpu" and not torch.compiler.is_compiling()

    @torch.no_grad()
    def count(self, indices: Tensor) -> None:
        """Sets `code_counts` from indices [H, M]."""
        no_vectors = self.embed.new_empty(*indices.shape, 0, dtype=torch.float32)
        counts, _ = code_stats(no_vectors, indices, self.codebook_size)
        self.code_counts.copy_(counts)

    def move_average(self, average: Tensor, new: Tensor, weight: Tensor | None) -> None:
        """average ← average + (1 - decay) weight (new - average); what has been accumulated adds to `new`."""
        if self._has_accumulated and average.grad is not None:
            new = new + average.grad
            average.grad = None
        new = new.to(average)
        if weight is None:
            average.lerp_(new, 1 - self.decay)
            return
        weight = weight if weight.dim() == 2 else weight[None]  # [H or 1, K]
        if weight.shape[-1] != self.codebook_size:
            raise ValueError(
                f"VectorQuantize: ema_update_weight is [{self.codebook_size}], one weight a code, or [h, "
                f"{self.codebook_size}]; got {list(weight.shape)}"
            )
        weight = weight.reshape(*weight.shape, *[1] * (average.dim() - 2))
        average.lerp_(new, ((1 - self.decay) * weight).to(average).expand_as(average))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Codes from the moving averages, with Laplace smoothing of the counts."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        codes = self.embed_avg / smoothed[..., None]
        # Through .data: as a parameter (orthogonal regularisation), it may be part of the graph of this very step.
        self.embed.data.copy_(unit(codes) if self.use_cosine_sim else codes)

    @torch.no_grad()
    def expire_codes_(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Replaces codes whose moving count is below the threshold by vectors [H, ..., D] drawn from the batch.

        Draws without replacement: when more codes are dead than vectors are there, the others stay for a later step.
        """
        if not self.has_dead_code_replacement or not self.training:
            return
        z = z.detach().reshape(z.shape[0], -1, z.shape[-1])
        sync = self.syncs()
        dead = self.cluster_size < self.threshold_ema_dead_code  # [H, K]
        # Where it cannot be looked at, the draw is always made.
        if (self.looks(z) and not dead.any()) or (z.shape[1] == 0 and not sync):
            return
        z = unit(z) if self.use_cosine_sim else z
        rows, available, keys = draw_rows(z, mask, self.codebook_size, sync)
        if keys is not None:
            lot = (keys + ~dead).argsort(-1).argsort(-1)  # [H, K]: the dead ones' places in a random order
            dead = dead & (lot < available)
        # The first dead code takes the first row, the second the second, and so on.
        rows = rows.gather(1, (dead.cumsum(-1) - 1).clamp(min=0)[..., None].expand_as(rows)).to(self.embed_avg)
        self.cluster_size.masked_fill_(dead, self.reset_cluster_size)
        dead = dead[..., None]
        self.embed_avg.copy_(torch.where(dead, rows * self.reset_cluster_size, self.embed_avg))
        self.embed.data.copy_(torch.where(dead, rows, self.embed.data))

    def update_indices(
        self,
        z: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """`update` from indices found elsewhere: z [B, n, D] or [H, B, n, D], indices [...], -1 where masked.

        mask: bool [B, n], or [B', n] with B a multiple of B' when heads have been folded into the batch.
        """
        if z.dim() < 4:
            z, indices = z[None], indices[None]
        H, B, n, _ = z.shape
        indices = indices.reshape(H, B * n)
        if mask is not None:
            mask = mask[:, None].expand(-1, B // len(mask), -1).reshape(1, B * n).expand(H, -1)
            indices = indices.masked_fill(~mask, -1)
        self.update(z.flatten(1, 2), indices, mask, ema_update_weight, accum_ema_update, ema_update)

    update_ema_indices = update_indices

    def syncs(self, wanted: bool = True) -> bool:
        """Whether statistics are summed over processes: asked for, or not said, and there are several now."""
        return (
            wanted
            and self.use_ddp is not False
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )


class Snapshot(torch.autograd.Function):
    """A copy that stays a copy: a compiler may make one again in the backward pass, from what has changed by then."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.ops.ncfast.snapshot(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


dispatch.library.define("snapshot(Tensor x) -> Tensor")
dispatch.library.impl("snapshot", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("ncfast::snapshot", torch.empty_like, lib=dispatch.library)
