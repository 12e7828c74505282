"""VectorQuantize against vector-quantize-pytorch 1.32.0: values, gradients, codebook state and random draws.

Where the original crashes or contradicts its own documentation there is nothing to compare with; what holds there
instead is in test_vector_quantize.py.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncfast.nn.vector_quantize import VectorQuantize

original = pytest.importorskip("vector_quantize_pytorch", reason="the package that VectorQuantize stands in for")
from vector_quantize_pytorch import hierarchical_vq, random_projection_quantizer, residual_vq  # noqa: E402

if not hasattr(original.VectorQuantize(2, 2)._codebook, "reset_cluster_size"):
    pytest.skip("written for the options of vector-quantize-pytorch 1.32", allow_module_level=True)

OriginalVQ = original.VectorQuantize  # kept here, as some tests put ours in its place
B, N, D, K = 3, 11, 8, 16

pytestmark = pytest.mark.filterwarnings("ignore:k-means starts:UserWarning")

# Both sides sum a few hundred float32 terms, in different orders: relative errors of 1e-6, some of which pass through a
# division by a small count or by the distance to a code. A wrong formula is off by far more than 1e-4.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# The original computes losses and the rotation in the input's dtype, eight (eleven) bits each; ours need not.
BFLOAT16 = {"rtol": 5e-2, "atol": 6e-2}
FLOAT16 = {"rtol": 7e-3, "atol": 7e-3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


# Of a fresh original: memory that nothing was written to yet.
UNWRITTEN = {"_codebook.codebook_mean", "_codebook.codebook_variance"}


class Case(NamedTuple):
    options: dict[str, Any]
    forward: dict[str, Any]  # arguments of forward beside x; those that depend on training or eval are in `eval`
    eval: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the input
    module_dtype: torch.dtype | None
    input_grad: bool
    after: Any  # called with the module after each backward pass
    gradients: bool  # whether to compare them in training
    tolerance: dict[str, float]

    def build(self, module):
        options = dict(self.options)
        if "vq_bridge" in options:
            options["vq_bridge"] = options["vq_bridge"]()  # a module each
        vq = module(**{"dim": D, "codebook_size": K, **options})
        return vq if self.module_dtype is None else vq.to(self.module_dtype)

    def pair(self):
        """The original with separated codes, and ours with its state."""
        torch.manual_seed(0)
        theirs, ours = self.build(OriginalVQ), self.build(VectorQuantize)
        state = theirs.state_dict()
        if not self.options.get("kmeans_init"):
            codes = torch.randn_like(state["_codebook.embed"])
            codes = F.normalize(codes, dim=-1) if self.options.get("use_cosine_sim") else codes
            state |= {"_codebook.embed": codes, "_codebook.embed_avg": codes.clone()}
        for name in UNWRITTEN & state.keys():
            state[name] = torch.zeros_like(state[name])
        ours.load_state_dict(state, strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return theirs, ours


def case(
    shape=(B, N, D),
    forward=None,
    eval=None,
    dtype=torch.float32,
    module_dtype=None,
    input_grad=True,
    after=None,
    gradients=True,
    tolerance=FLOAT32,
    **options,
):
    forward = forward or {}
    return Case(
        options,
        forward,
        forward if eval is None else eval,
        shape,
        dtype,
        module_dtype,
        input_grad,
        after,
        gradients,
        tolerance,
    )


def shifted_codes(codes, shape=(B, N)):
    """A codebook of its own for every position, as ResidualVQ's implicit neural codebooks have it."""
    return codes[:, None, None] + 0.3 * randn(*shape, 1, codes.shape[-1])


def halved(embed_sum, cluster_size):
    return torch.where(cluster_size > 1, 0.6, 1.0)


bridge = partial(nn.Linear, D, D)
sgd = partial(torch.optim.SGD, lr=2.0)  # a large step: the mean over all elements makes the gradient small
adam = partial(torch.optim.Adam, lr=0.05)
update_ema = lambda vq: vq._codebook.update_ema()  # noqa: E731
update_in_place = lambda vq: vq.update_in_place_optimizer()  # noqa: E731

# The similarities' gradient: the original takes it from the codes after the update, ours from those of the forward.
MOVING = {"gradients": False}
LEARNED = {"learnable_codebook": True, "ema_update": False}
MASK = {"mask": some(B, N)}
LENS = {"lens": torch.tensor([11, 4, 7])}

CASES = {
    # projections and heads
    "default": case(),
    "one_dimension": case(dim=1, shape=(B, N, 1)),
    "one_code": case(codebook_size=1),
    "many_codes": case(codebook_size=300),
    "codebook_dim": case(codebook_dim=5),
    "layernorm": case(codebook_dim=5, layernorm_after_project_in=True),
    "layernorm_without_projection": case(layernorm_after_project_in=True),
    "heads": case(heads=2, codebook_dim=4),
    "heads_projected": case(heads=3),
    "separate_heads": case(heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "separate_heads_projected": case(heads=3, codebook_dim=5, separate_codebook_per_head=True),
    "separate_one_head": case(separate_codebook_per_head=True),
    # layouts
    "channel_first": case(channel_last=False, shape=(B, D, N)),
    "channel_first_projected": case(channel_last=False, shape=(B, D, N), codebook_dim=5),
    "channel_first_heads": case(channel_last=False, shape=(B, D, N), heads=2, codebook_dim=4),
    "image": case(accept_image_fmap=True, shape=(B, D, 3, 5)),
    "image_projected": case(accept_image_fmap=True, shape=(B, D, 3, 5), codebook_dim=5),
    "image_heads": case(accept_image_fmap=True, shape=(B, D, 3, 5), heads=2, codebook_dim=4),
    "image_separate_heads": case(
        accept_image_fmap=True, shape=(B, D, 3, 5), heads=2, codebook_dim=4, separate_codebook_per_head=True
    ),
    "volume": case(accept_3d_fmap=True, shape=(B, D, 2, 3, 4)),
    "volume_heads": case(accept_3d_fmap=True, shape=(B, D, 2, 3, 4), heads=2),
    "single": case(shape=(13, D)),
    "single_projected": case(shape=(13, D), codebook_dim=5),
    "single_heads": case(shape=(13, D), heads=2, codebook_dim=4),
    "single_separate_heads": case(shape=(13, D), heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "single_channel_first": case(shape=(13, D), channel_last=False),
    # how the codebook follows
    "decay_eps": case(decay=0.93, eps=0.1),
    "decay_1": case(decay=1.0),
    "frozen": case(freeze_codebook=True),
    "frozen_by_forward": case(forward={"freeze_codebook": True}),
    "thawed_by_forward": case(freeze_codebook=True, forward={"freeze_codebook": False}),
    "no_ema": case(ema_update=False),
    "no_ema_by_forward": case(forward={"ema_update": False}),
    "ema_by_forward": case(ema_update=False, forward={"ema_update": True}),
    "manual_ema": case(manual_ema_update=True),
    "manual_ema_updated": case(manual_ema_update=True, after=update_ema),
    "manual_ema_cosine": case(manual_ema_update=True, use_cosine_sim=True, after=update_ema),
    "ema_weight": case(forward={"ema_update_weight": torch.linspace(0, 1, K)}),
    "ema_weight_per_head": case(
        heads=2, codebook_dim=4, separate_codebook_per_head=True, forward={"ema_update_weight": randn(2, K).abs()}
    ),
    "ema_weight_callable": case(forward={"ema_update_weight": halved}),
    "ema_weight_callable_per_head": case(
        heads=2, codebook_dim=4, separate_codebook_per_head=True, forward={"ema_update_weight": halved}
    ),
    "ema_accumulated_only": case(forward={"accum_ema_update": True}),
    # dead codes
    "dead_codes": case(threshold_ema_dead_code=1),
    "dead_codes_all_the_time": case(threshold_ema_dead_code=3, codebook_size=24),
    "dead_codes_cosine": case(threshold_ema_dead_code=1, use_cosine_sim=True),
    "dead_codes_projected": case(threshold_ema_dead_code=1, codebook_dim=5),
    "dead_codes_heads": case(threshold_ema_dead_code=1, heads=2, codebook_dim=4),
    "dead_codes_separate_heads": case(
        threshold_ema_dead_code=1, heads=2, codebook_dim=4, separate_codebook_per_head=True
    ),
    "dead_codes_no_ema": case(threshold_ema_dead_code=1, ema_update=False),
    "dead_codes_learned": case(threshold_ema_dead_code=1, **LEARNED),
    # Codes that are replaced between the forward and the backward pass that used them.
    "dead_codes_learned_in_use": case(threshold_ema_dead_code=3, **LEARNED),
    "learned_ema_by_forward": case(forward={"ema_update": True}, **LEARNED),
    "dead_codes_frozen": case(threshold_ema_dead_code=1, freeze_codebook=True),
    "dead_codes_manual_ema": case(threshold_ema_dead_code=1, manual_ema_update=True, after=update_ema),
    "dead_codes_image": case(threshold_ema_dead_code=1, accept_image_fmap=True, shape=(B, D, 3, 5)),
    # cosine similarity
    "cosine": case(use_cosine_sim=True),
    "cosine_projected": case(use_cosine_sim=True, codebook_dim=5),
    "cosine_heads": case(use_cosine_sim=True, heads=2, codebook_dim=4),
    "cosine_separate_heads": case(use_cosine_sim=True, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "cosine_no_rotation": case(use_cosine_sim=True, rotation_trick=False),
    "cosine_single": case(use_cosine_sim=True, shape=(13, D)),
    # k-means
    "kmeans": case(kmeans_init=True),
    "kmeans_three_iterations": case(kmeans_init=True, kmeans_iters=3),
    "kmeans_cosine": case(kmeans_init=True, use_cosine_sim=True),
    "kmeans_heads": case(kmeans_init=True, heads=2, codebook_dim=4),
    "kmeans_separate_heads": case(kmeans_init=True, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "kmeans_more_codes_than_rows": case(kmeans_init=True, codebook_size=50),
    "kmeans_projected": case(kmeans_init=True, codebook_dim=5),
    "kmeans_dead_codes": case(kmeans_init=True, threshold_ema_dead_code=2),
    "kmeans_learned": case(kmeans_init=True, **LEARNED),
    "kmeans_image": case(kmeans_init=True, accept_image_fmap=True, shape=(B, D, 3, 5)),
    # how gradients reach the input
    "rotation": case(rotation_trick=True),
    "no_rotation": case(rotation_trick=False),
    "no_rotation_heads": case(rotation_trick=False, heads=2),
    "no_route": case(route_gradients_to_input=False),
    "no_route_learned": case(route_gradients_to_input=False, **LEARNED),
    "gumbel_straight_through": case(straight_through=True, rotation_trick=False),
    "gumbel_straight_through_routed_by_softmax": case(
        straight_through=True, rotation_trick=False, route_gradients_to_input=False, **MOVING
    ),
    "gumbel_straight_through_sampled": case(
        straight_through=True,
        rotation_trick=False,
        route_gradients_to_input=False,
        stochastic_sample_codes=True,
        sample_codebook_temp=0.7,
        **MOVING,
    ),
    "gumbel_straight_through_heads": case(
        straight_through=True, rotation_trick=False, route_gradients_to_input=False, heads=2, codebook_dim=4, **MOVING
    ),
    "gumbel_straight_through_orthogonal": case(
        straight_through=True,
        rotation_trick=False,
        route_gradients_to_input=False,
        orthogonal_reg_weight=10.0,
        **MOVING,
    ),
    "gumbel_straight_through_cosine": case(
        straight_through=True, rotation_trick=False, route_gradients_to_input=False, use_cosine_sim=True, **MOVING
    ),
    "no_input_grad": case(input_grad=False),
    "no_input_grad_projected": case(input_grad=False, codebook_dim=5),
    "no_input_grad_learned": case(input_grad=False, **LEARNED),
    "directional": case(directional_reparam=True, threshold_ema_dead_code=1),
    "directional_variance": case(
        directional_reparam=True, threshold_ema_dead_code=1, directional_reparam_variance=0.3, codebook_dim=5
    ),
    "directional_heads": case(directional_reparam=True, threshold_ema_dead_code=1, heads=2, codebook_dim=4),
    # sampling
    "sampled": case(stochastic_sample_codes=True),
    "sampled_warm": case(stochastic_sample_codes=True, sample_codebook_temp=3.0),
    "sampled_cold_by_forward": case(stochastic_sample_codes=True, forward={"sample_codebook_temp": 0.3}),
    "sampled_at_0": case(stochastic_sample_codes=True, sample_codebook_temp=0.0),
    "sampled_cosine": case(stochastic_sample_codes=True, use_cosine_sim=True, sample_codebook_temp=0.2),
    "sampled_heads": case(stochastic_sample_codes=True, heads=2, codebook_dim=4),
    "sampled_separate_heads": case(
        stochastic_sample_codes=True, heads=2, codebook_dim=4, separate_codebook_per_head=True
    ),
    "sampled_dead_codes": case(stochastic_sample_codes=True, threshold_ema_dead_code=1),
    "sampled_kmeans": case(stochastic_sample_codes=True, kmeans_init=True),
    # More similarities than are worth holding at once: drawn a block of rows at a time, from the same stream.
    "sampled_many": case(stochastic_sample_codes=True, dim=4, codebook_size=4096, shape=(1, 1100, 4)),
    "sampled_learned": case(stochastic_sample_codes=True, **LEARNED),
    "sampled_top3": case(stochastic_sample_codes=True, forward={"topk": 3}),
    # codebooks that gradients train
    "learned": case(**LEARNED),
    "learned_no_rotation": case(rotation_trick=False, **LEARNED),
    "learned_heads": case(heads=2, codebook_dim=4, **LEARNED),
    "learned_separate_heads": case(heads=2, codebook_dim=4, separate_codebook_per_head=True, **LEARNED),
    "learned_projected": case(codebook_dim=5, **LEARNED),
    "learned_frozen": case(freeze_codebook=True, **LEARNED),
    "learned_frozen_by_forward": case(forward={"freeze_codebook": True}, **LEARNED),
    "sync_update": case(sync_update_v=0.4, **LEARNED),
    "sync_update_no_rotation": case(sync_update_v=1.0, rotation_trick=False, **LEARNED),
    "sync_update_no_route": case(sync_update_v=0.4, route_gradients_to_input=False, **LEARNED),
    "in_place": case(in_place_codebook_optimizer=sgd, **LEARNED),
    "in_place_adam": case(in_place_codebook_optimizer=adam, **LEARNED),
    "in_place_heads": case(in_place_codebook_optimizer=sgd, heads=2, codebook_dim=4, **LEARNED),
    "in_place_separate_heads": case(
        in_place_codebook_optimizer=sgd, heads=2, codebook_dim=4, separate_codebook_per_head=True, **LEARNED
    ),
    "in_place_projected": case(in_place_codebook_optimizer=sgd, codebook_dim=5, **LEARNED),
    "in_place_frozen": case(in_place_codebook_optimizer=sgd, forward={"freeze_codebook": True}, **LEARNED),
    "in_place_sampled": case(in_place_codebook_optimizer=sgd, stochastic_sample_codes=True, **LEARNED),
    "in_place_dead_codes": case(in_place_codebook_optimizer=sgd, threshold_ema_dead_code=1, **LEARNED),
    "in_place_breakdown": case(in_place_codebook_optimizer=sgd, forward={"return_loss_breakdown": True}, **LEARNED),
    "in_place_manual": case(
        in_place_codebook_optimizer=sgd, manual_in_place_optimizer_update=True, after=update_in_place, **LEARNED
    ),
    "bridge": case(vq_bridge=bridge),
    "bridge_separate_heads": case(
        vq_bridge=partial(nn.Linear, 4, 4), heads=2, codebook_dim=4, separate_codebook_per_head=True
    ),
    "bridge_in_place": case(vq_bridge=bridge, in_place_codebook_optimizer=sgd),
    "bridge_top3": case(vq_bridge=bridge, forward={"topk": 3}),
    "affine": case(affine_param=True),
    "affine_decays": case(affine_param=True, affine_param_batch_decay=0.6, affine_param_codebook_decay=0.3),
    "affine_learned": case(affine_param=True, **LEARNED),
    "affine_heads": case(affine_param=True, heads=2, codebook_dim=4),
    "affine_separate_heads": case(affine_param=True, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "affine_dead_codes": case(affine_param=True, threshold_ema_dead_code=1),
    "affine_masked": case(affine_param=True, forward=MASK),
    "affine_bridge": case(affine_param=True, vq_bridge=bridge),
    # losses
    "no_commitment": case(commitment_weight=0.0),
    "no_commitment_learned": case(commitment_weight=0.0, **LEARNED),
    "commitment_weight": case(commitment_weight=0.25, codebook_dim=5),
    "cross_entropy": case(commitment_use_cross_entropy_loss=True, **MOVING),
    "cross_entropy_heads": case(commitment_use_cross_entropy_loss=True, heads=2, codebook_dim=4, **MOVING),
    "cross_entropy_separate_heads": case(
        commitment_use_cross_entropy_loss=True, heads=2, codebook_dim=4, separate_codebook_per_head=True, **MOVING
    ),
    "cross_entropy_cosine": case(commitment_use_cross_entropy_loss=True, use_cosine_sim=True, **MOVING),
    "cross_entropy_sampled": case(commitment_use_cross_entropy_loss=True, stochastic_sample_codes=True, **MOVING),
    "cross_entropy_learned": case(commitment_use_cross_entropy_loss=True, commitment_weight=0.5, **LEARNED),
    "cross_entropy_masked": case(commitment_use_cross_entropy_loss=True, forward=MASK, **MOVING),
    "cross_entropy_masked_heads": case(
        commitment_use_cross_entropy_loss=True, forward=MASK, heads=2, codebook_dim=4, rotation_trick=False, **MOVING
    ),
    "diversity": case(codebook_diversity_loss_weight=0.7, codebook_diversity_temperature=3.0, **MOVING),
    "diversity_heads": case(
        codebook_diversity_loss_weight=0.7, codebook_diversity_temperature=3.0, heads=2, codebook_dim=4, **MOVING
    ),
    "diversity_separate_heads": case(
        codebook_diversity_loss_weight=0.7,
        codebook_diversity_temperature=3.0,
        heads=2,
        codebook_dim=4,
        separate_codebook_per_head=True,
        **MOVING,
    ),
    "diversity_learned": case(codebook_diversity_loss_weight=0.7, codebook_diversity_temperature=3.0, **LEARNED),
    "diversity_cosine": case(
        codebook_diversity_loss_weight=0.7, codebook_diversity_temperature=3.0, use_cosine_sim=True, **MOVING
    ),
    # The default temperature of 100 multiplies the distances' rounding of 1e-6.
    "diversity_cold": case(codebook_diversity_loss_weight=0.7, tolerance={"rtol": 2e-3, "atol": 1e-4}, **MOVING),
    "orthogonal": case(orthogonal_reg_weight=10.0),
    "orthogonal_heads": case(orthogonal_reg_weight=10.0, heads=2, codebook_dim=4),
    "orthogonal_separate_heads": case(
        orthogonal_reg_weight=10.0, heads=2, codebook_dim=4, separate_codebook_per_head=True
    ),
    "orthogonal_active": case(orthogonal_reg_weight=10.0, orthogonal_reg_active_codes_only=True),
    "orthogonal_active_heads": case(
        orthogonal_reg_weight=10.0, orthogonal_reg_active_codes_only=True, heads=2, codebook_dim=4
    ),
    "orthogonal_max": case(orthogonal_reg_weight=10.0, orthogonal_reg_max_codes=6),
    "orthogonal_active_max": case(
        orthogonal_reg_weight=10.0, orthogonal_reg_active_codes_only=True, orthogonal_reg_max_codes=6
    ),
    "orthogonal_learned": case(orthogonal_reg_weight=10.0, **LEARNED),
    "orthogonal_cosine": case(orthogonal_reg_weight=10.0, use_cosine_sim=True),
    "orthogonal_no_input_grad": case(orthogonal_reg_weight=10.0, input_grad=False),
    "orthogonal_no_route": case(orthogonal_reg_weight=10.0, route_gradients_to_input=False),
    "breakdown": case(forward={"return_loss_breakdown": True}),
    "breakdown_of_everything": case(
        forward={"return_loss_breakdown": True},
        commitment_weight=0.3,
        orthogonal_reg_weight=10.0,
        codebook_diversity_loss_weight=0.7,
        codebook_diversity_temperature=3.0,
        heads=2,
        codebook_dim=4,
        **MOVING,
    ),
    # masks, where the original can train with one
    "masked": case(forward=MASK),
    "masked_not_zeroed": case(forward=MASK, return_zeros_for_masked_padding=False),
    "masked_nothing": case(forward={"mask": torch.ones(B, N, dtype=torch.bool)}),
    "masked_channel_first": case(forward=MASK, channel_last=False, shape=(B, D, N)),
    "masked_channel_first_not_zeroed": case(
        forward=MASK, channel_last=False, shape=(B, D, N), return_zeros_for_masked_padding=False
    ),
    "masked_no_commitment_heads": case(forward=MASK, commitment_weight=0.0, heads=2, codebook_dim=4),
    "masked_no_commitment_separate_heads": case(
        forward=MASK, commitment_weight=0.0, heads=3, codebook_dim=5, separate_codebook_per_head=True
    ),
    "masked_no_commitment_cosine": case(forward=MASK, commitment_weight=0.0, use_cosine_sim=True),
    "masked_no_rotation": case(forward=MASK, rotation_trick=False),
    "masked_learned": case(forward=MASK, **LEARNED),
    "masked_in_place": case(forward=MASK, in_place_codebook_optimizer=sgd, **LEARNED),
    "lens": case(forward=LENS),
    "lens_with_an_empty_row": case(forward={"lens": torch.tensor([11, 0, 7])}),
    "lens_not_zeroed": case(forward=LENS, return_zeros_for_masked_padding=False),
    "lens_no_commitment_projected": case(freeze_codebook=True, commitment_weight=0.0, forward=LENS, codebook_dim=5),
    # several candidates
    "top3": case(forward={"topk": 3}),
    "top1": case(forward={"topk": 1}),
    "top_more_than_there_are": case(forward={"topk": K + 3}),
    "top3_breakdown": case(forward={"topk": 3, "return_loss_breakdown": True}),
    "top3_projected": case(forward={"topk": 3}, codebook_dim=5),
    "top3_cosine": case(forward={"topk": 3}, use_cosine_sim=True),
    "top3_learned": case(forward={"topk": 3}, **LEARNED),
    "top3_no_rotation": case(forward={"topk": 3}, rotation_trick=False),
    "top3_no_commitment": case(forward={"topk": 3}, commitment_weight=0.0),
    "top3_masked": case(forward={"topk": 3, **MASK}),
    "top3_masked_not_zeroed": case(forward={"topk": 3, **LENS}, return_zeros_for_masked_padding=False),
    "top3_channel_first": case(forward={"topk": 3}, channel_last=False, shape=(B, D, N)),
    "top3_image": case(forward={"topk": 3}, accept_image_fmap=True, shape=(B, D, 3, 5)),
    "top3_volume": case(forward={"topk": 3}, accept_3d_fmap=True, shape=(B, D, 2, 3, 4)),
    "top3_single": case(forward={"topk": 3}, shape=(13, D)),
    "top3_directional": case(forward={"topk": 3}, directional_reparam=True, threshold_ema_dead_code=1),
    "top3_separate_one_head": case(forward={"topk": 3}, separate_codebook_per_head=True),
    "top3_in_eval_only": case(eval={"topk": 3}, commitment_weight=0.3),
    "top3_orthogonal": case(forward={"topk": 3}, orthogonal_reg_weight=10.0, orthogonal_reg_active_codes_only=True),
    "top3_diversity": case(forward={"topk": 3}, codebook_diversity_loss_weight=0.7, codebook_diversity_temperature=3.0),
    # the loss against given codes
    "targets": case(forward={"indices": randint(K, B, N)}, **MOVING),
    "targets_some_ignored": case(forward={"indices": randint(K, B, N).where(some(B, N), -1)}, **MOVING),
    "targets_heads": case(forward={"indices": randint(K, B, N, 2)}, heads=2, codebook_dim=4, **MOVING),
    "targets_separate_heads": case(
        forward={"indices": randint(K, B, N, 2)}, heads=2, codebook_dim=4, separate_codebook_per_head=True, **MOVING
    ),
    "targets_projected": case(forward={"indices": randint(K, B, N)}, codebook_dim=5, **MOVING),
    "targets_cosine": case(forward={"indices": randint(K, B, N)}, use_cosine_sim=True, **MOVING),
    "targets_learned": case(forward={"indices": randint(K, B, N)}, **LEARNED),
    "targets_single": case(forward={"indices": randint(K, 13, 1)}, shape=(13, D), **MOVING),
    # codebooks that depend on the position
    "transform": case(forward={"codebook_transform_fn": shifted_codes}),
    "transform_cosine": case(forward={"codebook_transform_fn": shifted_codes}, use_cosine_sim=True),
    "transform_learned": case(forward={"codebook_transform_fn": shifted_codes}, **LEARNED),
    "transform_no_rotation": case(forward={"codebook_transform_fn": shifted_codes}, rotation_trick=False),
    "transform_top3": case(forward={"codebook_transform_fn": shifted_codes, "topk": 3}),
    "transform_masked": case(forward={"codebook_transform_fn": shifted_codes, **MASK}),
    "transform_sampled": case(forward={"codebook_transform_fn": shifted_codes}, stochastic_sample_codes=True),
    "transform_targets": case(forward={"codebook_transform_fn": shifted_codes, "indices": randint(K, B, N)}),
    "transform_diversity": case(
        forward={"codebook_transform_fn": shifted_codes},
        codebook_diversity_loss_weight=0.7,
        codebook_diversity_temperature=3.0,
    ),
    # dtypes
    "bfloat16_input": case(dtype=torch.bfloat16, tolerance=BFLOAT16),
    "bfloat16_input_no_rotation": case(dtype=torch.bfloat16, tolerance=BFLOAT16, rotation_trick=False),
    "bfloat16_input_top3": case(dtype=torch.bfloat16, tolerance=BFLOAT16, forward={"topk": 3}),
    "bfloat16_input_masked": case(dtype=torch.bfloat16, tolerance=BFLOAT16, forward=MASK),
    "float16_input": case(dtype=torch.float16, tolerance=FLOAT16),
    "float16_input_heads": case(dtype=torch.float16, tolerance=FLOAT16, heads=2, codebook_dim=4),
    "float64_input": case(dtype=torch.float64),
    "float64_input_cosine": case(dtype=torch.float64, use_cosine_sim=True),
    "float64_input_top3": case(dtype=torch.float64, forward={"topk": 3}),
    "float64_input_accumulated": case(dtype=torch.float64, forward={"accum_ema_update": True}),
    "float64_input_straight_through": case(
        dtype=torch.float64, straight_through=True, rotation_trick=False, route_gradients_to_input=False, **MOVING
    ),
    "float64_module": case(dtype=torch.float64, module_dtype=torch.float64, codebook_dim=5),
    "float64_module_learned": case(dtype=torch.float64, module_dtype=torch.float64, **LEARNED),
    "bfloat16_module": case(dtype=torch.bfloat16, module_dtype=torch.bfloat16, tolerance=BFLOAT16),
    "float16_module": case(dtype=torch.float16, module_dtype=torch.float16, tolerance=FLOAT16),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LAYOUTS = dict(list(CASES.items())[: list(CASES).index("decay_eps")])


def check_close(ours, theirs, tolerance, what, **options):
    exact = {"rtol": 0, "atol": 0}
    tolerance = tolerance if theirs.is_floating_point() else exact
    torch.testing.assert_close(ours, theirs, **tolerance, **options, msg=lambda message: f"{what}: {message}")


def check_named(ours, theirs, tolerance, what):
    """Both are name -> tensor or None, in order."""
    assert list(ours) == list(theirs), what
    for name, reference in theirs.items():
        assert (ours[name] is None) == (reference is None), f"{what} {name}"
        if reference is not None:
            check_close(ours[name], reference, tolerance, f"{what} {name}")


def named(outputs):
    """What forward returned, the members of the loss breakdown among it, by name."""
    if len(outputs) == 2:
        return dict(zip(("quantize", "cross_entropy"), outputs, strict=True))
    quantize, indices, loss, *breakdown = outputs
    return {"quantize": quantize, "indices": indices, "loss": loss, **(breakdown[0]._asdict() if breakdown else {})}


def run(vq, x, seed, arguments):
    """A forward and a backward pass: outputs, random state, gradients."""
    torch.manual_seed(seed)
    outputs = named(vq(x, **arguments))
    drawn = torch.get_rng_state()
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name, output in outputs.items():
        weight = torch.randn(output.shape, generator=generator).to(output.dtype)
        # The graph of the in-place loss is spent: forward itself went back through it.
        if output.grad_fn is not None and name != "inplace_optimize":
            total = total + (output * weight).sum()
    if torch.is_tensor(total):
        total.backward()
    return outputs, drawn, {"x": x.grad, **{name: parameter.grad for name, parameter in vq.named_parameters()}}


def waiting(vq):
    """What accum_ema_update stored for the next update."""
    return {name: getattr(vq._codebook, name).grad for name in ("cluster_size", "embed_avg")}


@torch.no_grad()
def descend(vq, rate):
    for parameter in vq.parameters():
        if parameter.grad is not None:
            parameter.sub_(rate * parameter.grad)
            parameter.grad = None


def check_step(theirs, ours, case, seed, arguments, what, x=None):
    x = randn(*case.shape, seed=seed).to(case.dtype) if x is None else x
    (outputs, drawn, gradients), (our_outputs, our_drawn, our_gradients) = (
        run(vq, x.clone().requires_grad_(case.input_grad), seed, arguments) for vq in (theirs, ours)
    )
    assert list(our_outputs) == list(outputs), what
    for name, output in outputs.items():
        # A loss in half precision may as well be float32.
        half = output.dtype in (torch.float16, torch.bfloat16) and name not in ("quantize", "indices")
        assert not half or our_outputs[name].dtype in (output.dtype, torch.float32), f"{what}, {name}"
        check_close(our_outputs[name], output, case.tolerance, f"{what}, {name}", check_dtype=not half)
        # The original's empty loss is a buffer that its first training step marks, and the in-place loss is spent.
        if output is not theirs.zero and name != "inplace_optimize":
            assert our_outputs[name].requires_grad == output.requires_grad, f"{what}, {name}: requires_grad"
    assert torch.equal(our_drawn, drawn), f"{what}: other random numbers drawn"
    compare_gradients = case.gradients or not theirs.training or arguments.get("freeze_codebook")
    if compare_gradients:
        check_named(our_gradients, gradients, case.tolerance, f"{what}, gradient of")
    check_named(waiting(ours), waiting(theirs), case.tolerance, f"{what}, accumulated for")
    for vq in (theirs, ours) if theirs.training else ():
        if case.after is not None:
            case.after(vq)
        descend(vq, 0.05 if compare_gradients else 0)
    check_named(ours.state_dict(), theirs.state_dict(), case.tolerance, f"{what}, state")


@cases
def test_same_seed_same_module(case):
    modules = []
    for module in (OriginalVQ, VectorQuantize):
        torch.manual_seed(3)
        modules.append((case.build(module), torch.get_rng_state()))
    (theirs, drawn), (ours, our_drawn) = modules
    state, our_state = theirs.state_dict(), ours.state_dict()
    for name in UNWRITTEN & state.keys():
        state[name].zero_(), our_state[name].zero_()
    check_named(our_state, state, {"rtol": 0, "atol": 0}, "state")
    # An optimizer's state goes by the order of the parameters.
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert torch.equal(our_drawn, drawn)
    for name in ("dim", "heads", "codebook_size", "has_projections", "use_cosine_sim", "learnable_codebook"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.ema_update == theirs.ema_update


@cases
def test_training_steps_then_eval(case):
    theirs, ours = case.pair()
    for step in range(3):
        check_step(theirs, ours, case, step, case.forward, f"step {step}")
    theirs.eval(), ours.eval()
    check_step(theirs, ours, case, 9, case.eval, "eval")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.gradients])
def test_gradients_of_similarities_with_a_frozen_codebook(name):
    theirs, ours = CASES[name].pair()
    for step in range(3):
        check_step(theirs, ours, CASES[name], step, CASES[name].forward | {"freeze_codebook": True}, f"step {step}")


@pytest.mark.parametrize("name", ["default", "kmeans", "kmeans_cosine", "kmeans_separate_heads", "sampled", "top3"])
def test_eval_before_any_training(name):
    case = CASES[name]
    theirs, ours = (vq.eval() for vq in case.pair())
    check_step(theirs, ours, case, 0, case.eval, "eval")
    assert bool(ours._codebook.initted)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", ["rotation", "no_rotation", "separate_heads", "separate_heads_projected", "learned"])
def test_rows_on_and_far_from_their_codes(name, noise):
    case = CASES[name]
    theirs, ours = case.pair()
    codes = F.pad(theirs.codebook.detach().flatten(0, -2), (0, D))[:, :D]
    x = codes[randint(len(codes), B, N)] + noise * randn(B, N, D, seed=1)
    check_step(theirs, ours, case, 0, {}, f"noise {noise}", x=x)


@pytest.mark.parametrize("name", ["default", "no_rotation", "heads", "separate_heads", "cosine", "learned", "top3"])
def test_strides_of_input_and_gradient_do_not_matter(name):
    case = CASES[name]
    results = []
    for vq in case.pair():
        x = randn(N, D, B).permute(2, 0, 1).requires_grad_()
        assert not x.is_contiguous()
        quantize, _, loss = vq(x, **case.forward)
        quantize.mT.sum().backward(retain_graph=True)  # a gradient whose strides are 0
        loss.sum().backward()
        results.append({"quantize": quantize, "gradient": x.grad})
    check_named(results[1], results[0], FLOAT32, "strided")


@pytest.mark.parametrize("name", ["default", "dead_codes", "kmeans", "learned", "no_commitment", "codebook_dim"])
def test_steps_without_autograd(name):
    theirs, ours = CASES[name].pair()
    for training in (True, True, False):
        for context in (torch.no_grad, torch.inference_mode):
            outputs = []
            for vq in (theirs.train(training), ours.train(training)):
                torch.manual_seed(0)
                with context() if not training else torch.no_grad():
                    outputs.append(named(vq(randn(*CASES[name].shape))))
            check_named(outputs[1], outputs[0], FLOAT32, f"training {training}")
            check_named(ours.state_dict(), theirs.state_dict(), FLOAT32, f"training {training}, state")


def test_targets_with_a_mask():
    theirs, ours = CASES["targets"].pair()
    x, targets, mask = randn(B, N, D), randint(K, B, N), MASK["mask"]
    (quantize, loss), (our_quantize, our_loss) = (vq(x, indices=targets, mask=mask) for vq in (theirs, ours))
    check_close(our_loss, loss, FLOAT32, "loss")
    check_close(our_quantize[mask], quantize[mask], FLOAT32, "quantize")  # what stands for padding is nobody's business
    check_named(ours.state_dict(), theirs.state_dict(), FLOAT32, "state")


def test_unwritten_affine_statistics_of_a_fresh_original_do_not_matter():
    case = CASES["affine"]
    theirs, ours = case.pair()
    state = {name: torch.full_like(t, torch.nan) if name in UNWRITTEN else t for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state), ours.load_state_dict(state)
    for step in range(2):
        check_step(theirs, ours, case, step, {}, f"step {step}")


def test_accumulated_updates_come_with_the_next():
    theirs, ours = CASES["dead_codes"].pair()
    for step, accumulate in enumerate([True, True, False, False]):
        check_step(theirs, ours, CASES["dead_codes"], step, {"accum_ema_update": accumulate}, f"step {step}")


def test_straight_through_needs_no_other_option():
    """The original refuses straight_through=True without rotation_trick=False, which is what it must mean."""
    case = CASES["gumbel_straight_through"]
    theirs, _ = case.pair()
    ours = VectorQuantize(dim=D, codebook_size=K, straight_through=True)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        check_step(theirs, ours, case, step, {}, f"step {step}")


@pytest.mark.parametrize("of", ["__init__", "forward"])
def test_signature(of):
    theirs, ours = (inspect.signature(getattr(vq, of)).parameters.values() for vq in (OriginalVQ, VectorQuantize))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize(
    "options",
    [
        {"rotation_trick": True, "straight_through": True},
        {"rotation_trick": True, "directional_reparam": True, "threshold_ema_dead_code": 2},
        {"directional_reparam": True},
        {"use_cosine_sim": True, **LEARNED},
        {"learnable_codebook": True},
        {"straight_through": True, "rotation_trick": False, **LEARNED},
        {"vq_bridge": nn.Identity(), "learnable_codebook": False},
        {"vq_bridge": nn.Identity(), "ema_update": True},
        {"sync_update_v": 0.5},
        {"sync_update_v": 1.5, **LEARNED},
        {"affine_param": True, "use_cosine_sim": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_refuses_the_same_combinations(options):
    with pytest.raises(AssertionError):
        OriginalVQ(D, K, **options)
    with pytest.raises((AssertionError, ValueError)):
        VectorQuantize(D, K, **options)


# Where float32 distances cannot tell codes apart, another index is right as long as its code is no farther.
NEAR_TIES = {
    "gauss": lambda: (randn(400, 16), randn(300, 16, seed=1)),
    "initial_scale": lambda: (randn(400, 64), 0.02 * randn(300, 64, seed=1)),
    "offset": lambda: (randn(400, 16) + 30, randn(300, 16, seed=1) + 30),
    "duplicates": lambda: (randn(400, 16), randn(60, 16, seed=1).repeat(5, 1)),
    "on_a_code": lambda: (randn(300, 16, seed=1)[randint(300, 400)], randn(300, 16, seed=1)),
}


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("data", NEAR_TIES.values(), ids=NEAR_TIES)
def test_no_code_is_farther_than_the_originals(data, training, cosine):
    x, codes = data()
    codes = F.normalize(codes, dim=-1) if cosine else codes
    chosen = []
    for module in (OriginalVQ, VectorQuantize):
        vq = module(x.shape[1], len(codes), use_cosine_sim=cosine).train(training)
        vq.codebook = codes
        quantize, indices, _ = vq(x[None])
        torch.testing.assert_close(quantize[0], codes[indices[0]], **FLOAT32)
        chosen.append(codes[indices[0]].double())
    x = F.normalize(x, dim=-1, eps=1e-6).double() if cosine else x.double()
    theirs, ours = ((-(x * code).sum(-1) if cosine else (x - code).square().sum(-1)) for code in chosen)
    assert (ours <= theirs + 1e-6 * theirs.abs() + 1e-12).all()


# Masks and codebooks that outnumber the rows: other random numbers, the same rule.
REPLACEMENTS = {
    "masked": (dict(codebook_size=K), MASK),
    "lens": (dict(codebook_size=K), LENS),
    "masked_cosine": (dict(codebook_size=K, use_cosine_sim=True, commitment_weight=0.0), MASK),
    "more_codes_than_rows": (dict(codebook_size=100), {}),
    "more_codes_than_rows_cosine": (dict(codebook_size=100, use_cosine_sim=True), {}),
    "more_codes_than_valid_rows": (dict(codebook_size=40), {"mask": some(B, N, seed=5)}),
    "nothing_valid": (dict(codebook_size=K), {"mask": torch.zeros(B, N, dtype=torch.bool)}),
}


@pytest.mark.parametrize("module", [OriginalVQ, VectorQuantize], ids=["original", "ours"])
@pytest.mark.parametrize(("options", "forward"), REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replacement_where_the_random_stream_is_not_shared(module, options, forward):
    threshold = 1.5
    case_ = case(**options)
    plain, _ = case_.pair()  # an original that replaces nothing says which codes must die
    vq = module(dim=D, **options, threshold_ema_dead_code=threshold)
    vq.load_state_dict(plain.state_dict())
    x = randn(B, N, D)
    plain(x, **forward), vq(x, **forward)
    expected, codebook = plain._codebook, vq._codebook
    mask = (
        torch.arange(N) < forward["lens"][:, None] if "lens" in forward else forward.get("mask", torch.ones(B, N) > 0)
    )
    rows = F.normalize(x[mask], dim=-1) if options.get("use_cosine_sim") else x[mask]
    dead = expected.cluster_size[0] < threshold
    replaced = (codebook.embed - expected.embed)[0].abs().amax(-1) > 1e-4
    assert not (replaced & ~dead).any()
    assert replaced.sum() == min(dead.sum(), len(rows))
    drawn = [(rows - code).abs().amax(-1).argmin().item() for code in codebook.embed[0][replaced]]
    assert len(set(drawn)) == len(drawn)  # without replacement
    torch.testing.assert_close(codebook.embed[0][replaced], rows[drawn])
    torch.testing.assert_close(codebook.embed_avg[0][replaced], rows[drawn] * threshold)
    assert (codebook.cluster_size[0][replaced] == threshold).all()
    for name in ("embed", "embed_avg", "cluster_size"):
        kept = getattr(codebook, name)[0][~replaced], getattr(expected, name)[0][~replaced]
        torch.testing.assert_close(*kept, **FLOAT32)


SOME = some(B, N, seed=2)
UPDATES = {
    "default": (case(), (B, N), {}),
    "projected": (case(codebook_dim=5), (B, N), {}),
    "cosine": (case(use_cosine_sim=True), (B, N), {}),
    "heads": (case(heads=2, codebook_dim=4), (B, N, 2), {}),
    "separate_heads": (case(heads=2, codebook_dim=4, separate_codebook_per_head=True), (B, N, 2), {}),
    "channel_first": (case(channel_last=False, shape=(B, D, N)), (B, N), {}),
    "image": (case(accept_image_fmap=True, shape=(B, D, 3, 5)), (B, 3, 5), {}),
    "volume": (case(accept_3d_fmap=True, shape=(B, D, 2, 3, 4)), (B, 2, 3, 4), {}),
    "dead_codes": (case(threshold_ema_dead_code=1), (B, N), {}),
    "no_ema": (case(ema_update=False), (B, N), {}),
    "manual_ema": (case(manual_ema_update=True), (B, N), {}),
    "affine": (case(affine_param=True), (B, N), {}),
    "masked": (case(), (B, N), {"mask": SOME}),
    "masked_projected": (case(codebook_dim=5), (B, N), {"mask": SOME}),
    "masked_heads": (case(heads=2, codebook_dim=4), (B, N, 2), {"mask": SOME}),
    "masked_separate_heads": (
        case(heads=2, codebook_dim=4, separate_codebook_per_head=True),
        (B, N, 2),
        {"mask": SOME},
    ),
}


@pytest.mark.parametrize("method", ["update_indices", "update_ema_indices"])
@pytest.mark.parametrize(("case", "shape", "arguments"), UPDATES.values(), ids=UPDATES)
def test_update_from_given_indices(case, shape, arguments, method):
    theirs, ours = case.pair()
    x, indices = randn(*case.shape), randint(K, *shape)
    if arguments:
        indices[~SOME] = -1  # as forward returns them
    for vq in (theirs, ours):
        torch.manual_seed(0)
        if "affine_param" in case.options:
            vq(x)  # sets the batch statistics
        getattr(vq, method)(x, indices, **arguments)
    check_named(ours.state_dict(), theirs.state_dict(), FLOAT32, "state")


@pytest.mark.parametrize("name", ["dead_codes", "dead_codes_heads", "dead_codes_separate_heads", "dead_codes_cosine"])
def test_expire_codes(name):
    theirs, ours = CASES[name].pair()
    x = randn(1, 33, D)  # one sequence: of several, the original draws from the first only
    for training in (False, True):
        for vq in (theirs, ours):
            vq.train(training)
            vq._codebook.cluster_size[:, ::3] = 0.5
            torch.manual_seed(0)
            vq.expire_codes_(x)
        check_named(ours.state_dict(), theirs.state_dict(), FLOAT32, f"training {training}")
        assert (ours._codebook.cluster_size[:, ::3] == (1 if training else 0.5)).all()


def invertible(case):
    """Where the original's get_output_from_indices works."""
    options = case.options
    heads, separate = options.get("heads", 1) > 1, "separate_codebook_per_head" in options
    channel_first = not options.get("channel_last", True) or any("fmap" in option for option in options)
    projected = options.get("codebook_dim", D) * options.get("heads", 1) != options.get("dim", D)
    return heads == separate and not (channel_first and projected)


@pytest.mark.parametrize("name", [name for name, case in LAYOUTS.items() if invertible(case)])
def test_codes_and_outputs_from_indices(name):
    case = LAYOUTS[name]
    theirs, ours = (vq.eval() for vq in case.pair())
    check_close(ours.codebook, theirs.codebook, {"rtol": 0, "atol": 0}, "codebook")
    quantize, indices, _ = ours(randn(*case.shape))
    for method in ("get_codes_from_indices", "get_output_from_indices"):
        codes = getattr(ours, method)(indices)
        check_close(codes, getattr(theirs, method)(indices), FLOAT32, method)
    check_close(codes, quantize, FLOAT32, "output")


@pytest.mark.parametrize("name", ["default", "separate_heads", "cosine", "codebook_dim"])
def test_codebook_setter(name):
    case = CASES[name]
    theirs, ours = case.pair()
    codes = randn(*theirs.codebook.shape, seed=4)
    for vq in (theirs, ours):
        vq.codebook = codes
    # The original leaves its averages, and the next step would take the codes back towards where they were.
    theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    theirs._codebook.cluster_size.fill_(1)
    check_named(ours.state_dict(), theirs.state_dict(), {"rtol": 0, "atol": 0}, "state")
    check_step(theirs, ours, case, 0, {}, "after")


class Residual(NamedTuple):
    options: dict[str, Any]
    forward: dict[str, Any]
    shape: tuple[int, ...]
    groups: int
    dead_codes: bool
    after: Any


def residual(shape=(B, N, D), forward=None, groups=0, after=None, **options):
    return Residual({"num_quantizers": 3, "codebook_size": K, **options}, forward or {}, shape, groups, False, after)


# Few codes for many rows: a row that is a code by itself leaves a residual of mere rounding to the next layer.
KMEANS = {"kmeans_init": True, "codebook_size": 5, "shape": (B, 60, D)}
RESIDUALS = {
    "default": residual(),
    "projected": residual(codebook_dim=5),
    "codebook_sizes": residual(codebook_size=(16, 9, 5)),
    "shared": residual(shared_codebook=True),
    "shared_dead_codes": residual(shared_codebook=True, threshold_ema_dead_code=2),
    "shared_in_place": residual(shared_codebook=True, in_place_codebook_optimizer=sgd, **LEARNED),
    "shared_kmeans": residual(shared_codebook=True, **KMEANS),
    "kmeans": residual(kmeans_iters=4, **KMEANS),
    "kmeans_dead_codes": residual(threshold_ema_dead_code=4, **KMEANS),
    "cosine": residual(use_cosine_sim=True),
    "sampled": residual(stochastic_sample_codes=True, sample_codebook_temp=0.2),
    "sampled_shared": residual(stochastic_sample_codes=True, shared_codebook=True, threshold_ema_dead_code=1),
    "learned": residual(quant_grad_frac=0.3, **LEARNED),
    "no_rotation": residual(rotation_trick=False),
    "masked": residual(forward=MASK),
    "image": residual(accept_image_fmap=True, shape=(B, D, D, D)),  # the one shape of image that the original takes
    "all_codes": residual(forward={"return_all_codes": True}),
    "frozen": residual(forward={"freeze_codebook": True}),
    "dropout": residual(quantize_dropout=True, forward={"rand_quantize_dropout_fixed_seed": 2}),
    "beam": residual(beam_size=3),
    "beam_masked": residual(beam_size=2, eval_beam_size=3, forward=MASK),
    "beam_shared": residual(beam_size=2, shared_codebook=True, threshold_ema_dead_code=1),
    "beam_learned": residual(beam_size=2, beam_score_quantizer_weights=[1.0, 0.5, 0.25], **LEARNED),
    "implicit": residual(implicit_neural_codebook=True, mlp_kwargs={"dim_hidden": 6, "depth": 2}),
    "directional": residual(diveq=True),
    "directional_dead_codes": residual(diveq=True, threshold_ema_dead_code=1),
    "orthogonal": residual(orthogonal_reg_weight=10.0),
    "grouped": residual(groups=2),
    "grouped_shared": residual(groups=2, shared_codebook=True, threshold_ema_dead_code=1),
    "grouped_kmeans": residual(groups=2, **KMEANS),
    "grouped_sampled": residual(groups=2, stochastic_sample_codes=True, quantize_dropout=True),
    "grouped_beam": residual(groups=2, beam_size=2),
    "grouped_masked": residual(groups=2, forward=MASK),
}


def build_residual(case, monkeypatch, module):
    monkeypatch.setattr(residual_vq, "VectorQuantize", module)
    torch.manual_seed(0)
    if case.groups:
        return residual_vq.GroupedResidualVQ(dim=D, groups=case.groups, **case.options)
    return residual_vq.ResidualVQ(dim=D, **case.options)


@pytest.mark.parametrize("case", RESIDUALS.values(), ids=RESIDUALS)
def test_inside_residual_vq(case, monkeypatch):
    theirs, ours = (build_residual(case, monkeypatch, module) for module in (OriginalVQ, VectorQuantize))
    assert {type(m) for m in ours.modules()} & {VectorQuantize} and VectorQuantize is not OriginalVQ
    state = theirs.state_dict()
    if not case.options.get("kmeans_init"):
        for name in state:
            if name.endswith(("embed", "embed_avg")):
                codes = 0.7 ** (3 if case.options.get("shared_codebook") else 1) * randn(*state[name].shape)
                state[name] = F.normalize(codes, dim=-1) if case.options.get("use_cosine_sim") else codes
    theirs.load_state_dict(state), ours.load_state_dict(state)
    for step in range(4):
        if step == 3:
            theirs.eval(), ours.eval()
        results = []
        for vq in (theirs, ours):
            x = randn(*case.shape, seed=step).requires_grad_()
            torch.manual_seed(step)
            outputs = vq(x, **case.forward)
            quantize, loss = outputs[0], outputs[-1 if len(outputs) == 2 else 2]
            total = (quantize * randn(*quantize.shape)).sum() + loss.sum()
            if total.grad_fn is not None:
                total.backward()
            gradients = {"x": x.grad, **{name: p.grad for name, p in vq.named_parameters()}}
            results.append((dict(enumerate(outputs)), gradients, {"rng": torch.get_rng_state()}))
        for mine, reference, what in zip(*reversed(results), ("output", "gradient of", "random"), strict=True):
            check_named(mine, reference, FLOAT32, f"step {step}, {what}")
        descend(theirs, 0.05), descend(ours, 0.05)
        check_named(ours.state_dict(), theirs.state_dict(), FLOAT32, f"step {step}, state")
    if len(outputs) > 2 and not case.options.get("implicit_neural_codebook"):
        codes = ours.get_output_from_indices(outputs[1])
        check_close(codes, theirs.get_output_from_indices(outputs[1]), FLOAT32, "get_output_from_indices")


HIERARCHIES = {
    "shared": ({}, {}),
    "one_each": ({"shared_codebook": False, "rotation_trick": True}, {}),
    "sampled": ({"stochastic_sample_codes": True}, {}),
    "image": ({"scales": (1, (2, 3), 4), "accept_image_fmap": True}, {}),
    "masked": ({}, {"lens": torch.tensor([8, 5, 3])}),
    "orthogonal": ({"orthogonal_reg_weight": 10.0}, {}),
}


@pytest.mark.parametrize(("options", "forward"), HIERARCHIES.values(), ids=HIERARCHIES)
def test_inside_hierarchical_vq(options, forward, monkeypatch):
    """One module several times in a forward pass, its codebook moving between them."""
    options = {"dim": D, "codebook_size": K, "scales": (1, 3, 8), "kmeans_init": False, **options}
    pair = []
    for module in (OriginalVQ, VectorQuantize):
        monkeypatch.setattr(hierarchical_vq, "VectorQuantize", module)
        torch.manual_seed(0)
        pair.append(hierarchical_vq.HierarchicalVQ(threshold_ema_dead_code=0, **options))
    state = pair[0].state_dict()
    state = {name: randn(*t.shape) if name.endswith(("embed", "embed_avg")) else t for name, t in state.items()}
    for vq in pair:
        vq.load_state_dict(state)
    for step in range(3):
        results = []
        for vq in pair:
            x = randn(B, D, *((4, 4) if "accept_image_fmap" in options else (8,)), seed=step).requires_grad_()
            torch.manual_seed(step)
            quantize, indices, loss = vq(x, **forward)
            ((quantize * randn(*x.shape)).sum() + loss).backward()
            results.append({"quantize": quantize, **dict(enumerate(indices)), "loss": loss, "gradient": x.grad})
        check_named(results[1], results[0], FLOAT32, f"step {step}")
        check_named(pair[1].state_dict(), pair[0].state_dict(), FLOAT32, f"step {step}, state")


@pytest.mark.parametrize("codebooks", [1, 3])
def test_inside_random_projection_quantizer(codebooks, monkeypatch):
    results = []
    for module in (OriginalVQ, VectorQuantize):
        monkeypatch.setattr(random_projection_quantizer, "VectorQuantize", module)
        torch.manual_seed(0)
        quantizer = random_projection_quantizer.RandomProjectionQuantizer(
            dim=D, num_codebooks=codebooks, codebook_dim=6, codebook_size=30
        )
        assert type(quantizer.vq) is module
        x = randn(B, 50, D)
        indices = quantizer(x)
        results.append({"indices": indices, "loss": quantizer(x, indices=randint(30, *indices.shape))})
    check_named(results[1], results[0], FLOAT32, "output")
