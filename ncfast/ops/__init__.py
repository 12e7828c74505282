"""The operations, one file each: plain-PyTorch reference, public function, implementations, registration."""

from ncfast.ops.barlow_twins_loss import barlow_twins_loss, barlow_twins_loss_reference
from ncfast.ops.batch_norm import batch_norm, batch_norm_reference
from ncfast.ops.code_stats import code_stats, code_stats_reference
from ncfast.ops.fused_linear import fused_linear, fused_linear_reference
from ncfast.ops.iter_norm import iter_norm, iter_norm_reference
from ncfast.ops.layer_norm import layer_norm, layer_norm_reference
from ncfast.ops.masked_attention import masked_attention, masked_attention_reference
from ncfast.ops.nearest_code import nearest_code, nearest_code_reference
from ncfast.ops.rotate_to_code import rotate_to_code, rotate_to_code_reference
from ncfast.ops.thin_conv_transpose import thin_conv_transpose, thin_conv_transpose_reference
from ncfast.ops.unmask_step import unmask_step, unmask_step_reference
from ncfast.ops.vibcreg_loss import vibcreg_loss, vibcreg_loss_reference
from ncfast.ops.vicreg_loss import vicreg_loss, vicreg_loss_reference

__all__ = [
    "barlow_twins_loss",
    "barlow_twins_loss_reference",
    "batch_norm",
    "batch_norm_reference",
    "code_stats",
    "code_stats_reference",
    "fused_linear",
    "fused_linear_reference",
    "iter_norm",
    "iter_norm_reference",
    "layer_norm",
    "layer_norm_reference",
    "masked_attention",
    "masked_attention_reference",
    "nearest_code",
    "nearest_code_reference",
    "rotate_to_code",
    "rotate_to_code_reference",
    "thin_conv_transpose",
    "thin_conv_transpose_reference",
    "unmask_step",
    "unmask_step_reference",
    "vibcreg_loss",
    "vibcreg_loss_reference",
    "vicreg_loss",
    "vicreg_loss_reference",
]
