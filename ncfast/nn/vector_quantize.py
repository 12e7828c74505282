"""Vector quantisation, a drop-in for vector-quantize-pytorch's VectorQuantize (1.32.0)."""

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ncfast.nn.codebook import Codebook, unit
from ncfast.nn.recomputation import in_backward_pass, recomputable
from ncfast.nn.select_codes import Chosen, Selection
from ncfast.ops import dispatch, rotate_to_code
from ncfast.ops.rotate_to_code import rotated


class LossBreakdown(NamedTuple):
    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Replaces vectors by the nearest of K codes, which follow them by moving averages or learn by gradient.

    Arguments, results, state_dict keys and, under one seed, random draws are those of `VectorQuantize` of
    vector-quantize-pytorch 1.32.0; its checkpoints load here and the other way round. With default options neither
    distances nor one-hot rows are stored (memory O(M·D + K·D) for M vectors), and `torch.compile(fullgraph=True)`
    takes training and evaluation.

    What differs, on purpose:

    - The code of a vector is the nearest in float64, lowest index on ties; the original compares rounded float32 roots.
    - Codebook maths is float32 or better under any autocast, on the CPU too.
    - The output in training is the code itself, not a rotation that equals it up to rounding; a vector shorter than
      1e-6 gets the straight-through gradient instead of one that is a million times too large.
    - `straight_through=True` alone works: it turns the rotation trick off.
    - In training, `mask` works with projections and heads; with cosine similarity the loss takes normalised vectors
      under a mask too; without any unmasked vector it is 0, not NaN. `lens` works with `channel_last=False`.
    - The losses that need all similarities (cross-entropy, diversity) get their gradient from the codes of this
      forward, not from codes that the moving average has changed meanwhile.
    - The codebook can be set when it is learnable. Returned indices and losses share no memory with the module.
    - Saved affine statistics load into a fresh module.
    - Collectives run only within a process group of several processes: one all_reduce for counts and sums; k-means
      and dead-code revival add calls of the same size on every process, however many vectors it has.
    - The orthogonal loss of active codes leaves out those of masked vectors; `expire_codes_` draws from all sequences.
    - Losses are float32 or better for half-precision vectors too; an in-place step does not count affine statistics
      twice; with `indices`, padding is zeros.
    - Gradient checkpointing computes a pass again with the codes that it first saw, and moves nothing.
    - A compiled module looks at `_codebook.initted` when it is compiled, at `load_state_dict` and in an eager pass.
    - With a mask, or with more codes than vectors, dead codes are replaced by the same distribution of vectors, from
      another stream of random numbers.

    Args:
        dim: size of the vectors.
        codebook_size: K.
        codebook_dim: size of the codes; `dim` unless given. Where codebook_dim·heads is not dim, vectors pass a linear
            layer before and after.
        heads: parts of a vector that are quantised each for itself.
        separate_codebook_per_head: one codebook a head, or one for all.
        decay, eps: of the moving averages; Laplace smoothing of their counts.
        freeze_codebook: leave the codebook alone in training.
        kmeans_init, kmeans_iters, sync_kmeans: start the codes from k-means over the first batch (of all processes).
        use_cosine_sim: nearest by angle; vectors and codes are normalised.
        layernorm_after_project_in: LayerNorm after the first linear layer.
        threshold_ema_dead_code: a code whose moving count falls below is replaced by a vector of the batch; 0: never.
        channel_last: sequences are [B, n, dim], or [B, dim, n].
        accept_image_fmap, accept_3d_fmap: vectors come as [B, dim, h, w], or [B, dim, d, h, w].
        commitment_weight: of the mean squared distance between vectors and codes.
        commitment_use_cross_entropy_loss: cross-entropy over similarities in its place; stores them all.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: of the mean squared cosine
            between codes (arXiv 2112.00384, eq. 2), those of this batch only, and a random choice of so many.
        codebook_diversity_loss_weight, codebook_diversity_temperature: of minus the entropy of the mean soft
            assignment; stores all similarities.
        stochastic_sample_codes, sample_codebook_temp: in training, draw a code by similarity over temperature.
        straight_through: gumbel-softmax's gradient to the codes where `route_gradients_to_input` is off; otherwise the
            output's gradient goes to the vectors as it is.
        rotation_trick: the output's gradient is turned and scaled from code to vector (arXiv 2410.06424); on unless
            another is asked for.
        directional_reparam, directional_reparam_variance: DiVeQ's noise along the error in place of it.
        sync_codebook: sum statistics over processes; None: where there are several as it trains.
        sync_affine_param: so for the affine statistics.
        ema_update: whether codes follow by moving averages.
        vq_bridge: module that maps the codes [h, K, codebook_dim] before they are used (FVQ); they learn by gradient.
        manual_ema_update: averages move, but codes change only by `_codebook.update_ema()`.
        learnable_codebook: codes are a parameter.
        in_place_codebook_optimizer: makes an optimiser from parameters; one step for the codes within each forward.
        manual_in_place_optimizer_update: that step waits for `update_in_place_optimizer()`.
        affine_param, affine_param_batch_decay, affine_param_codebook_decay: codes are used with mean and variance of
            the vectors.
        sync_update_v: how far a learnable code's step looks ahead (vqtorch's eq. 21).
        return_zeros_for_masked_padding: masked outputs are zeros, or the input.
        route_gradients_to_input: False: the output has no gradient to the vectors.

    Raises:
        AssertionError: options that exclude each other. `forward`: ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        learns_by_gradient = directional_reparam or vq_bridge is not None
        ema_update = not learns_by_gradient if ema_update is None else ema_update
        learnable_codebook = learns_by_gradient if learnable_codebook is None else learnable_codebook
        if rotation_trick is None:
            rotation_trick = not directional_reparam and not straight_through and dim > 1
        for wrong, message in (
            (min(dim, codebook_size, heads) < 1, f"sizes are 1 or more; got {dim}, {codebook_size} and heads {heads}"),
            (use_cosine_sim and learnable_codebook, "use_cosine_sim does not go with a learnable codebook"),
            (use_cosine_sim and affine_param, "use_cosine_sim does not go with affine_param"),
            (
                straight_through + rotation_trick + directional_reparam > 1,
                "straight_through, rotation_trick and directional_reparam exclude each other",
            ),
            (
                directional_reparam and threshold_ema_dead_code == 0,
                "directional_reparam needs dead-code replacement: set threshold_ema_dead_code",
            ),
            (straight_through and learnable_codebook, "straight_through does not go with a learnable codebook"),
            (ema_update and learnable_codebook, "a learnable codebook needs ema_update=False"),
            (vq_bridge is not None and not learnable_codebook, "vq_bridge needs a learnable codebook"),
            (not 0 <= sync_update_v <= 1, f"sync_update_v is from 0 to 1; got {sync_update_v}"),
            (sync_update_v > 0 and not learnable_codebook, "sync_update_v needs a learnable codebook"),
        ):
            assert not wrong, f"VectorQuantize: {message}"

        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.codebook_size = codebook_size
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.learnable_codebook = learnable_codebook
        self.sync_update_v = sync_update_v
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)

        self._codebook = Codebook(
            dim=codebook_dim,
            codebook_size=codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=sync_codebook,
            learnable_codebook=learnable_codebook or self.has_codebook_orthogonal_loss,
            sample_codebook_temp=sample_codebook_temp,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self._codebook.parameters())
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def needs_similarities(self) -> bool:
        return self.has_codebook_diversity_loss or (self.commitment_use_cross_entropy_loss and self.has_commitment_loss)

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """[K, D], or [heads, K, D] with separate codebooks. Can be set."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    @property
    def code_counts(self) -> Tensor:
        """How many vectors of the last training batch chose each code, int64 [heads or 1, K], masked ones left out."""
        return self._codebook.code_counts

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the code frequencies of the last training batch: [], or [heads] of separate codebooks.

        From K where all codes are used alike down to 1.
        """
        frequency = self.code_counts / self.code_counts.sum(-1, keepdim=True).clamp(min=1)
        perplexity = torch.special.entr(frequency).sum(-1).exp()
        return perplexity if self.separate_codebook_per_head else perplexity[0]

    @property
    def code_usage(self) -> Tensor:
        """Share of the codes that the last training batch used: [], or [heads] of separate codebooks."""
        usage = (self.code_counts > 0).float().mean(-1)
        return usage if self.separate_codebook_per_head else usage[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices as `forward` returns them -> codes, laid out as x, with heads·codebook_dim channels."""
        return self.channels_back(self.codes_of(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices as `forward` returns them -> the quantised vectors, shaped as x."""
        return self.channels_back(self.project_out(self.codes_of(indices)))

    def codes_of(self, indices: Tensor) -> Tensor:
        """[B, ...] or, with several heads, [B, ..., heads] -> [B, ..., heads·D]; zeros for the -1 of padding."""
        codebook, padding = self.codebook, indices < 0
        indices = indices.clamp(min=0)
        if not self.separate_codebook_per_head:
            codes = codebook[indices]
        else:
            if self.heads == 1:
                indices, padding = indices[..., None], padding[..., None]
            codes = codebook[torch.arange(self.heads, device=indices.device), indices]
        codes = codes.masked_fill(padding[..., None], 0)
        return codes.flatten(-2) if self.heads > 1 or self.separate_codebook_per_head else codes

    def channels_back(self, codes: Tensor) -> Tensor:
        return codes if self.is_channel_last else codes.movedim(codes.dim() - 1, 1)

    def update_in_place_optimizer(self) -> None:
        """The step of `in_place_codebook_optimizer`, with gradients averaged over processes."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.syncs():
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= distributed.get_world_size()
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def expire_codes_(self, x: Tensor) -> None:
        """Replaces dead codes by vectors of x [B, n, heads·D]."""
        z = self.split_heads(self._codebook.transform_input(x))
        self._codebook.expire_codes_(z)

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """One step of the moving averages with indices found elsewhere; x, indices and mask as in `forward`."""
        x, _ = self.to_sequence(x, mask)
        z = self._codebook.transform_input(self.split_heads(self.project_in(x)))
        mask = self.mask_of(z, mask)
        indices = self.split_indices(indices, len(x))
        self._codebook.update(z, indices if mask is None else indices.masked_fill(~mask, -1), mask)

    update_ema_indices = update_indices

    # Layouts: x as the caller has it <-> sequences [B, n, C] <-> vectors of each codebook [H, M, D]

    @property
    def is_map(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap

    @property
    def is_channel_last(self) -> bool:
        return self.channel_last and not self.is_map

    def check(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> None:
        """Shapes that do not fit, in the words of who calls `forward`.

        Raises:
            ValueError: what was expected, what came, and the option that may be missing.
        """
        last = self.is_channel_last
        wanted = "[B, n, dim] or [B, dim]" if last else "[B, dim, n]"
        if self.is_map:
            wanted = "[B, dim, h, w]" if self.accept_image_fmap else "[B, dim, d, h, w]"
        channels = -1 if last or x.dim() == 2 else 1
        if x.dim() < 2 or x.shape[channels] != self.dim:
            hint = ""
            if x.dim() == 3 and last and x.shape[1] == self.dim:
                hint = "; for [B, dim, n] make it with channel_last=False"
            elif x.dim() in (4, 5) and x.shape[1] == self.dim:
                option = "accept_image_fmap" if x.dim() == 4 else "accept_3d_fmap"
                hint = f"; for feature maps make it with {option}=True"
            elif not last and x.dim() > 2 and x.shape[-1] == self.dim:
                hint = "; for vectors in the last dimension make it with channel_last=True and without a map option"
            raise ValueError(f"VectorQuantize: x is {wanted} with dim = {self.dim}; got {list(x.shape)}{hint}")
        if last and x.dim() == 4 and x.shape[1] == self.dim != x.shape[2] and not torch.compiler.is_compiling():
            warnings.warn(
                f"VectorQuantize: x {list(x.shape)} has dim = {self.dim} first and last; the last is taken. For "
                "images make it with accept_image_fmap=True",
                stacklevel=3,
            )
        if mask is None and lens is None:
            return
        name = "mask" if lens is None else "lens"
        if x.dim() < 3 or self.is_map:
            raise ValueError(f"VectorQuantize: {name} needs sequences, {wanted}; got x {list(x.shape)}")
        B, n = x.shape[0], x.shape[1] if last else x.shape[2]
        whole = [B, math.prod(x.shape[1:-1])] if last else [B, n]
        if mask is not None and (list(mask.shape) not in ([B, n], whole) or mask.dtype != torch.bool):
            raise ValueError(
                f"VectorQuantize: mask is bool [B, n] = [{B}, {n}] for x {list(x.shape)}; got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        if lens is not None and list(lens.shape) != [B]:
            raise ValueError(f"VectorQuantize: lens is [B] = [{B}] for x {list(x.shape)}; got {list(lens.shape)}")

    def to_sequence(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """x -> [B, n, C], and the sizes that n stands for: () of a single vector, (h, w) of an image, ..."""
        assert mask is None or (x.dim() > 2 and not self.is_map), "VectorQuantize: a mask needs sequences"
        if x.dim() == 2 and not self.is_map:
            return x[:, None], ()
        dims = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else 3
        assert x.dim() == dims or (x.dim() > dims and self.is_channel_last), (
            f"VectorQuantize: x has {dims} dimensions; got {list(x.shape)}"
        )
        if self.is_channel_last:
            return x.flatten(1, -2), x.shape[1:-1]
        return x.flatten(2).transpose(1, 2), x.shape[2:]

    def split_heads(self, x: Tensor) -> Tensor:
        """x [B, n, heads·D] -> [H, M, D]: [heads, B n, D] with separate codebooks, else [1, B heads n, D]."""
        B, n, _ = x.shape
        if self.heads == 1:
            return x.reshape(1, B * n, x.shape[-1])
        x = x.unflatten(-1, (self.heads, -1))  # [B, n, heads, D]
        if self.separate_codebook_per_head:
            return x.permute(2, 0, 1, 3).reshape(self.heads, B * n, x.shape[-1])
        return x.permute(0, 2, 1, 3).reshape(1, B * self.heads * n, x.shape[-1])

    def merge_heads(self, q: Tensor, B: int, n: int) -> Tensor:
        """[H, M, ..., D] -> [B, n, ..., heads·D]; what lies between exists only with one head."""
        if self.heads == 1:
            return q.reshape(B, n, *q.shape[2:])
        if self.separate_codebook_per_head:
            return q.reshape(self.heads, B, n, q.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        return q.reshape(B, self.heads, n, q.shape[-1]).permute(0, 2, 1, 3).flatten(2)

    def split_indices(self, indices: Tensor, B: int) -> Tensor:
        """[B, ...] or [B, ..., heads] -> [H, M]."""
        if self.heads == 1:
            return indices.reshape(1, -1)
        indices = indices.reshape(B, -1, self.heads)
        if self.separate_codebook_per_head:
            return indices.permute(2, 0, 1).reshape(self.heads, -1)
        return indices.permute(0, 2, 1).reshape(1, -1)

    def merge_indices(self, indices: Tensor, B: int, n: int) -> Tensor:
        """[H, M, ...] -> [B, n, ...] or [B, n, heads]."""
        if self.heads == 1:
            return indices.reshape(B, n, *indices.shape[2:])
        if self.separate_codebook_per_head:
            return indices.reshape(self.heads, B, n).permute(1, 2, 0)
        return indices.reshape(B, self.heads, n).permute(0, 2, 1)

    def mask_of(self, z: Tensor, mask: Tensor | None) -> Tensor | None:
        """mask [B, n] -> [H, M] of the vectors z [H, M, D]."""
        if mask is None:
            return None
        if not self.separate_codebook_per_head and self.heads > 1:
            mask = mask[:, None].expand(-1, self.heads, -1)
        return mask.reshape(1, -1).expand(z.shape[:2])

    @recomputable(lambda self: self._codebook, attributes=("_read", "_has_accumulated"))
    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ):
        """Quantises x; in training mode also moves the codebook.

        Args:
            x: [B, n, dim] or [B, dim]; [B, dim, n] without channel_last; [B, dim, h, w] or [B, dim, d, h, w] as feature
                maps. float32, float64, float16 or bfloat16.
            indices: int64, as returned: the loss is then the cross-entropy of the similarities against them, -1 being
                ignored, and only quantised vectors (of the codebook's size) and that loss are returned.
            mask: bool [B, n], False for padding.
            lens: int [B], lengths, in place of a mask.
            topk: so many nearest codes of each vector instead of one; the codebook stays as it is.
            sample_codebook_temp: in place of the constructor's.
            freeze_codebook: in place of the constructor's.
            return_loss_breakdown: return a LossBreakdown too.
            codebook_transform_fn: codes [h, K, D] -> codes of each vector [h, B, n, K, D] (QINCo).
            ema_update_weight: factor of each code's step, [K] or [h, K], or a function of (sums, counts) to it.
            accum_ema_update: keep this batch's statistics for the next step instead of making one.
            ema_update: in place of the constructor's.

        Returns:
            quantised vectors, shaped and typed as x; indices int64 [B, n], [B] or [B, h, w], with a last dimension of
            heads when there are several, -1 for padding; loss, a scalar (0 in evaluation). With topk a dimension of k
            follows the vectors' own, and losses are one for each choice.
        """
        assert mask is None or lens is None, "VectorQuantize: give mask or lens, not both"
        original, input_requires_grad = x, x.requires_grad
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        if topk is not None:
            topk = min(int(topk), self.codebook_size)
            assert topk > 0 and self.heads == 1, "VectorQuantize: topk is 1 or more, with a single head"
            assert not self.training or not (
                self.commitment_use_cross_entropy_loss or self.in_place_codebook_optimizer is not None
            ), "VectorQuantize: topk goes with neither cross-entropy commitment nor an in-place optimizer in training"

        self.check(x, mask, lens)
        x, spatial = self.to_sequence(x, mask)
        B, n, _ = x.shape
        if lens is not None:
            mask = torch.arange(spatial[0], device=x.device) < lens[:, None]
        if mask is not None and mask.shape[1] != n:
            mask = mask.repeat_interleave(n // mask.shape[1], dim=1)  # x [B, n, ..., dim]
        z = self.split_heads(self.project_in(x)).to(original.dtype)
        # Export has no autocast, and cannot save a program with a region that says so.
        exporting = dispatch.exporting()
        with contextlib.nullcontext() if exporting else torch.autocast(z.device.type, enabled=False):
            z = self._codebook.transform_input(z).contiguous()  # [H, M, D]
            rows = self.mask_of(z, mask)
            temperature = self._codebook.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
            if not self._codebook.flag("initted"):
                self._codebook.init_embed_(z, rows)
            if self._codebook.affine_param:
                self._codebook.update_affine(z, rows)

            samples = self.training and temperature > 0
            select = Selection(
                self._codebook,
                z,
                rows,
                n,
                temperature=temperature if samples and self.stochastic_sample_codes else None,
                topk=topk,
                transform=codebook_transform_fn,
                soft=temperature if samples and self.straight_through and not self.route_gradients_to_input else None,
                keep=indices is not None or (self.training and self.needs_similarities),
            )
            chosen = select()
            routes = self.training and input_requires_grad and self.route_gradients_to_input
            learns = self.learnable_codebook and not frozen and self.has_commitment_loss
            moves = self.training and topk is None

            def move(chosen: Chosen) -> None:
                if frozen:
                    self._codebook.count(chosen.masked)
                else:
                    self._codebook.update(z, chosen.masked, rows, ema_update_weight, accum_ema_update, ema_update)

            inplace_optimize = z.new_zeros((), dtype=torch.float32)
            if self.in_place_codebook_optimizer is not None and self.training and not frozen:
                if in_backward_pass():
                    raise RuntimeError(
                        "VectorQuantize: in_place_codebook_optimizer would take its step again where gradient "
                        "checkpointing computes the forward pass again; keep the module out of the checkpointed part"
                    )
                taken = chosen.take()
                move(chosen)
                moves = False
                inplace_optimize = self.step_in_place(taken, z, rows)
                chosen = select()

            # Whatever reads the codes comes before they move.
            if moves and codebook_transform_fn is None and not self.directional_reparam:
                q, commitment = self.rotate(z, chosen, routes, learns)
                move(chosen)
            else:
                taken = chosen.take()
                if moves:
                    move(chosen)
                q, commitment = self.route(z, taken, rows, topk, routes, learns)
            if self.training and self.sync_update_v > 0:
                q = q + self.sync_update_v * (q - q.detach())

            if indices is not None:
                loss = cross_entropy(chosen.similarities, self.split_indices(indices, B))
                return q.reshape(*(() if self.heads == 1 else q.shape[:1]), -1, n, q.shape[-1]), loss
            if self.commitment_use_cross_entropy_loss and self.has_commitment_loss and self.training:
                commitment = cross_entropy(chosen.similarities, chosen.masked)
            loss, breakdown = self.losses(chosen, commitment, inplace_optimize, topk)

        q = self.project_out(self.merge_heads(q, B, n))  # [B, n, (k,) dim]
        chosen_indices = self.merge_indices(chosen.masked, B, n)  # [B, n, (k,)] or [B, n, heads]
        if mask is not None:
            padding = torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            keep = mask[..., None]
            q = torch.where(keep, q, padding) if topk is None else torch.where(keep[..., None], q, padding[:, :, None])
        q, chosen_indices = restore(q, spatial), restore(chosen_indices, spatial)
        q = self.channels_back(q) if spatial else q
        if topk is not None:
            loss, commitment = (
                restore(each.reshape(B, n, topk), spatial) if each.dim() > 0 else each
                for each in (loss, breakdown.commitment)
            )
            breakdown = breakdown._replace(commitment=commitment)
        return (q, chosen_indices, loss, breakdown) if return_loss_breakdown else (q, chosen_indices, loss)

    def step_in_place(self, q: Tensor, z: Tensor, rows: Tensor | None) -> Tensor:
        """One step of the codes towards the vectors z that they were taken for; returns the loss, already used up."""
        loss = mean_square(q - z.detach(), rows)
        loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss

    def rotate(self, z: Tensor, chosen: Chosen, routes: bool, learns: bool) -> tuple[Tensor, Tensor]:
        """Quantised vectors [H, M, D] with their gradient, and the commitment loss, in training."""
        codes = chosen.codes if learns else chosen.codes.detach()
        q, commitment = rotate_to_code(z, codes, chosen.masked, rotate=self.rotation_trick)
        if not routes:
            q = chosen.take() if chosen.codes.requires_grad or chosen.soft is not None else q.detach()
        return q, commitment

    def route(
        self, z: Tensor, q: Tensor, rows: Tensor | None, topk: int | None, routes: bool, learns: bool
    ) -> tuple[Tensor, Tensor]:
        """The same, step by step, for what `rotate` does not know: evaluation, top-k, codes of each vector, DiVeQ.

        q: the codes taken [H, M, (k,) D]. With topk the commitment loss is one for each choice [H, M, k].
        """
        z = z if topk is None else z[:, :, None].expand_as(q)
        target = q if learns and self.training else q.detach() if self.training else q
        if topk is not None:
            commitment = squares(target - z).mean(-1)
            commitment = commitment if rows is None else commitment.masked_fill(~rows[..., None], 0)
        else:
            commitment = mean_square(target - z, rows) if self.training else z.new_zeros((), dtype=torch.float32)
        if routes:
            if self.directional_reparam:
                error = q - z
                noisy = error + math.sqrt(self.directional_reparam_variance) * torch.randn_like(error)
                q = z + unit(noisy).detach() * error.norm(dim=-1, keepdim=True)
            else:
                path = rotated(z, q.detach()) if self.rotation_trick else z
                q = q.detach() + (path - path.detach())
        return q, commitment

    def losses(
        self, chosen: Chosen, commitment: Tensor, inplace_optimize: Tensor, topk: int | None
    ) -> tuple[Tensor, LossBreakdown]:
        zero = torch.zeros_like(self.zero, dtype=torch.promote_types(self.zero.dtype, torch.float32))
        diversity = orthogonal = zero
        loss = zero.clone()
        if not self.training:
            if topk is None:
                return loss, LossBreakdown(zero, zero, zero, inplace_optimize)
            loss = commitment * self.commitment_weight if self.has_commitment_loss else commitment
            return loss, LossBreakdown(commitment, zero, zero, inplace_optimize)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loss.requires_grad_()  # so that backward() never fails, whatever the options
        if self.has_codebook_diversity_loss:
            soft = (chosen.similarities * self.codebook_diversity_temperature).softmax(-1)
            # The mean over sequences and heads, at each place in the sequence.
            mean = soft.unflatten(1, (-1, chosen.sequence_length)).mean((0, 1))  # [n, K]
            diversity = (mean * mean.clamp(min=1e-5).log()).sum(-1).mean()
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.has_commitment_loss:
            loss = loss + commitment * self.commitment_weight
        else:
            commitment = zero
        if self.has_codebook_orthogonal_loss:
            orthogonal = self.orthogonal_loss(chosen.masked)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        return loss, LossBreakdown(commitment, diversity, orthogonal, inplace_optimize)

    def orthogonal_loss(self, indices: Tensor) -> Tensor:
        """Mean squared cosine between codes, less that of a code with itself (arXiv 2112.00384, eq. 2)."""
        codes = self._codebook.embed.clone()  # a later pass of the same step moves them, beside autograd
        if self.orthogonal_reg_active_codes_only:
            assert not (self.heads > 1 and self.separate_codebook_per_head), (
                "VectorQuantize: orthogonal_reg_active_codes_only does not go with separate codebooks"
            )
            codes = codes[:, indices[indices >= 0].unique()]
        limit = self.orthogonal_reg_max_codes
        if limit is not None and codes.shape[1] > limit:
            codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[:limit]]
        h, K, _ = codes.shape
        codes = unit(codes)
        # |C Cᵀ|² = |Cᵀ C|²: the smaller of the two products.
        product = codes @ codes.mT if codes.shape[2] > K else codes.mT @ codes
        return product.square().sum() / (h * K**2) - 1 / K


def squares(difference: Tensor) -> Tensor:
    """In float32 or better."""
    return difference.square() if difference.dtype == torch.float64 else difference.float().square()


def mean_square(difference: Tensor, rows: Tensor | None) -> Tensor:
    """Mean of the squares [H, M, D], over the rows that count [H, M]; float32 or better."""
    square = squares(difference)
    if rows is None:
        return square.mean()
    return (square * rows[..., None]).sum() / (rows.sum() * square.shape[-1]).clamp(min=1)


def cross_entropy(similarities: Tensor, indices: Tensor) -> Tensor:
    """similarities [H, M, K] against indices [H, M], -1 being ignored."""
    return F.cross_entropy(similarities.flatten(0, 1), indices.flatten(), ignore_index=-1)


def restore(sequence: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """[B, n, ...] -> [B, *spatial, ...]."""
    return sequence.reshape(len(sequence), *spatial, *sequence.shape[2:])
