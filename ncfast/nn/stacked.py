"""E modules of one architecture as one module with batched products: what trains several models at once.

`stack` copies the first module and puts a twin that holds all E sets of weights in the place of every layer; the code
of the containers (Encoder, Projector, Prior, ...) runs on it as it is. A twin's state has the names of a member's, and
in memory one member after the other, which is all that `unstack` needs to know.

Two layouts, each the one that moves no data between its layers:

- folded, for convolutions: [B, E·C, ...], the channels of one member after those of another. Convolutions have E
  groups; batch norm and whitening see E times as many channels, exactly; VectorQuantize takes members for heads with a
  codebook each.
- leading, for a transformer: [E, ..., C]. Linear layers are batched products, attention sees E times as many sequences.
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.nn.embedding import embedding
from ncfast.nn.projector import IterNorm
from ncfast.nn.transformer import RMSNorm
from ncfast.nn.vector_quantize import VectorQuantize


def stack(modules: Sequence[nn.Module], *, folded: bool) -> nn.Module:
    """One module that computes what `modules` compute, each from its own part of the input; it shares no memory.

    Args:
        modules: E modules of the same class and shapes.
        folded: the layout of inputs and outputs, folded or leading (see above).

    The attribute `members` of containers that have one is set to E.

    Raises:
        TypeError: a layer that has parameters and no twin here.
    """
    with torch.no_grad():
        twin = replaced(copy.deepcopy(modules[0]), len(modules), folded)
        each = [module.state_dict() for module in modules]
        for name, value in twin.state_dict().items():
            if value.dim() > 0:  # the others are counters, which all members share
                value.copy_(torch.stack([state[name] for state in each]).view_as(value))
    return twin.train(modules[0].training)


@torch.no_grad()
def unstack(twin: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Copies the weights and buffers of a stacked module into its members."""
    stacked = twin.state_dict()
    for e, module in enumerate(modules):
        for name, value in module.state_dict().items():
            source = stacked[name]
            value.copy_(source if value.dim() == 0 else source.reshape(len(modules), *value.shape)[e])


def replaced(module: nn.Module, E: int, folded: bool) -> nn.Module:
    """The twin of a layer, or a container with twins in it; values are filled in later."""
    make = (FOLDED_TWINS if folded else LEADING_TWINS).get(type(module))
    if make is not None:
        like = next(itertools.chain(module.parameters(), module.buffers()))
        return make(module, E).to(like.device, like.dtype)
    own = dict(module.named_parameters(recurse=False))
    if own and (folded or type(module).__module__.startswith("torch.")):
        raise TypeError(f"stack: no twin for {type(module).__name__} in the {'folded' if folded else 'leading'} layout")
    for name, parameter in own.items():
        setattr(module, name, nn.Parameter(parameter.new_empty(E, 1, *parameter.shape)))  # broadcasts over a batch
    if hasattr(module, "members"):
        module.members = E
    for name, child in module.named_children():
        setattr(module, name, replaced(child, E, folded))
    return module


class StackedLinear(nn.Module):
    """x [E, ..., in] -> [E, ..., out], or folded [..., E·in] -> [..., E·out]."""

    def __init__(self, layer: nn.Linear, E: int, *, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        self.weight = nn.Parameter(torch.empty(E, *layer.weight.shape))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty(E, *layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            return self.product(x)
        y = self.product(x.unflatten(-1, (len(self.weight), -1)).movedim(-2, 0))
        return y.movedim(0, -2).flatten(-2)

    def product(self, x: Tensor) -> Tensor:  # [E, ..., in] -> [E, ..., out]
        rows, weight = x.flatten(1, -2), self.weight.mT
        y = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, weight)
        return y.view(*x.shape[:-1], -1)

    def fused(self, x: Tensor, norm: nn.Module | None, gelu: bool, residual: Tensor | None) -> Tensor:
        """residual + gelu(self(norm(x))), all leading."""
        y = self.product(x if norm is None else norm(x))
        y = F.gelu(y) if gelu else y
        return y if residual is None else residual + y


class StackedLayerNorm(nn.Module):
    """x [E, ..., D] -> the same."""

    def __init__(self, layer: nn.LayerNorm, E: int) -> None:
        super().__init__()
        self.eps = layer.eps
        self.weight = nn.Parameter(torch.empty(E, *layer.weight.shape))
        self.bias = nn.Parameter(torch.empty(E, *layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        normal = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(of_members(self.bias, x), normal, of_members(self.weight, x))


class StackedRMSNorm(nn.Module):
    """x [E, ..., D] -> the same."""

    def __init__(self, layer: RMSNorm, E: int) -> None:
        super().__init__()
        self.eps = layer.eps
        self.weight = nn.Parameter(torch.empty(E, *layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * of_members(self.weight, x)


class StackedEmbedding(nn.Module):
    """ids [E, ...] -> [E, ..., D]."""

    def __init__(self, layer: nn.Embedding, E: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, *layer.weight.shape))

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


def of_members(vectors: Tensor, x: Tensor) -> Tensor:
    """vectors [E, D] -> [E, 1, ..., D], to broadcast over x [E, ..., D]."""
    return vectors.view(len(vectors), *[1] * (x.dim() - 2), -1)


def convolution(layer: nn.Conv2d | nn.ConvTranspose2d, E: int) -> nn.Module:
    options = {} if isinstance(layer, nn.Conv2d) else {"output_padding": layer.output_padding}
    return type(layer)(
        E * layer.in_channels,
        E * layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=E * layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        **options,
    )


def batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, E: int) -> nn.Module:
    return type(layer)(E * layer.num_features, layer.eps, layer.momentum)


def iter_norm(layer: IterNorm, E: int) -> IterNorm:
    return IterNorm(E * len(layer.weight), E * layer.groups)


def vector_quantize(layer: VectorQuantize, E: int) -> VectorQuantize:
    book = layer._codebook
    draws = book.has_dead_code_replacement or not book.flag("initted") or layer.stochastic_sample_codes
    if layer.heads > 1 or layer.has_projections or book.learnable_codebook or draws:
        raise TypeError("stack: VectorQuantize is stacked with one head and codes that only follow moving averages")
    layer.dim *= E
    layer.heads = book.num_codebooks = E
    layer.separate_codebook_per_head = True
    for name, buffer in list(book.named_buffers()):
        if buffer.dim() > 0:
            setattr(book, name, buffer.repeat(E, *[1] * (buffer.dim() - 1)))
    return layer


FOLDED_TWINS: dict[type, Callable[[nn.Module, int], nn.Module]] = {
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.Linear: lambda layer, E: StackedLinear(layer, E, folded=True),
    IterNorm: iter_norm,
    VectorQuantize: vector_quantize,
}
LEADING_TWINS: dict[type, Callable[[nn.Module, int], nn.Module]] = {
    nn.Linear: lambda layer, E: StackedLinear(layer, E, folded=False),
    nn.LayerNorm: StackedLayerNorm,
    nn.Embedding: StackedEmbedding,
    RMSNorm: StackedRMSNorm,
}
