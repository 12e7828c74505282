"""Convolutional encoder and decoder between a spectrogram and a grid of latent vectors (NC-VQVAE, section 3)."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.nn.synchronised import BatchNorm, group_of
from ncfast.ops import batch_norm, thin_conv_transpose
from ncfast.ops.batch_norm import activate_and_pad
from ncfast.ops.thin_conv_transpose import takes_triton

SLOPE = nn.LeakyReLU().negative_slope

# No convolution that a batch norm follows, with or without a residual sum between, has a bias: the norm takes the mean
# away, and the bias with it, so that its gradient is zero.


def num_downsampling_blocks(length: int, n_fft: int = 8, samples_per_column: int = 0) -> int:
    """How often the encoder halves the time axis: log2(length / (8 (log2 n_fft - 1))) times, at least once.

    Truncated as in the authors' runs, so that 7 to 15 columns of latents remain of 70 samples and more; less often
    where a column would stand for more than `samples_per_column` samples, unless that is 0.
    """
    rate = max(1, round(length / (math.log2(n_fft) - 1) / 8))
    by_length = 1 + max(0, int(math.log2(rate)) - 1)
    if samples_per_column == 0:
        return by_length
    hop = n_fft // 4
    return min(by_length, max(1, int(math.log2(max(1, samples_per_column // hop)))))


def down_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Halves the width: [B, in, H, W], padded on all sides by replicas to H + 2, W + 2 -> [B, out, H, W // 2]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, (3, 4), stride=(1, 2), bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(SLOPE),
    )


def up_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Doubles the width: [B, in, H, W] -> [B, out, H, 2W]."""
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, (3, 4), stride=(1, 2), padding=(1, 1), bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(SLOPE),
    )


def in_turns(x: Tensor, views: int) -> bool:
    """Whether views pass one after the other all the same: a batch of both is 10 % slower on a CPU, whose caches are
    small, where on a GPU it halves the launches."""
    return views > 1 and x.device.type == "cpu"


def count_batches(network: nn.Module, views: int) -> None:
    """What `normalised` leaves to do of a batch norm's layer in training, in one launch for all of a network."""
    norms = [each for each in network.modules() if isinstance(each, BatchNorm) and each.training]
    if norms:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], views)


def normalised(
    norm: BatchNorm,
    x: Tensor,  # [views·B, C, H, W]
    residual: Tensor | None = None,  # as x
    *,
    slope: float = 1.0,
    then_slope: float | None = None,
    pad: bool = False,
    views: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """LeakyReLU(norm(x + residual)), in training as if the layer were called once a view; see `ops.batch_norm`.

    But for `num_batches_tracked`, for which there is `count_batches`.
    """
    if norm.training:
        return batch_norm(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            residual,
            views=views,
            momentum=norm.momentum,
            eps=norm.eps,
            slope=slope,
            then_slope=then_slope,
            pad=pad,
            group=group_of(norm),
        )
    y = norm(x if residual is None else x + residual.to(x.dtype))
    return activate_and_pad(y, slope, then_slope, pad)


class ResidualBlock(nn.Module):
    """Conv1x1(LeakyReLU([BatchNorm] Conv3x3(a))) of a = LeakyReLU(x): what is added to x before a batch norm."""

    def __init__(self, channels: int, *, inner_norm: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, channels, 3, padding=1, bias=not inner_norm),
            nn.BatchNorm2d(channels) if inner_norm else nn.Identity(),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, channels, 1, bias=False),
        )

    def forward(self, activated: Tensor, views: int = 1) -> Tensor:  # LeakyReLU(x) [views·B, channels, H, W]
        _, first, norm, _, second = self.block
        y = first(activated)
        if isinstance(norm, nn.BatchNorm2d):
            return second(normalised(norm, y, slope=SLOPE, views=views))
        return second(F.leaky_relu(y, SLOPE))


def residual_stack(channels: int, num_blocks: int, *, inner_norm: bool) -> list[nn.Module]:
    blocks = [(ResidualBlock(channels, inner_norm=inner_norm), nn.BatchNorm2d(channels)) for _ in range(num_blocks)]
    return [module for pair in blocks for module in pair]


def run_residual_stack(stack: list[nn.Module], x: Tensor, activated: Tensor, views: int) -> Tensor:
    """x and LeakyReLU(x) [views·B, C, H, W] -> x, with x = BatchNorm(x + block(x)) for each pair of modules."""
    for k in range(0, len(stack), 2):
        block, norm = stack[k], stack[k + 1]
        inner = block(activated, views)
        if k + 2 < len(stack):  # the next block wants both
            x, activated = normalised(norm, inner, x, then_slope=SLOPE, views=views)
        else:
            x = normalised(norm, inner, x, views=views)
    return x


class Encoder(nn.Sequential):
    """u [B, in_channels, H, W] -> z [B, dim, H, W'], with W halved `num_down` times."""

    def __init__(self, in_channels: int, dim: int, num_down: int, num_residual: int) -> None:
        super().__init__(
            down_block(in_channels, dim),
            *[down_block(dim, dim) for _ in range(num_down - 1)],
            *residual_stack(dim, num_residual, inner_norm=True),
        )
        self.num_down = num_down

    def forward(self, u: Tensor, views: int = 1) -> Tensor:
        """u [views·B, in_channels, H, W], view after view: each is normalised by its own statistics in training."""
        if in_turns(u, views):
            return torch.cat([self(view) for view in u.chunk(views)])
        count_batches(self, views)
        downs, stack = list(self)[: self.num_down], list(self)[self.num_down :]
        x = F.pad(u, (1, 1, 1, 1), mode="replicate")
        if self.training:  # the layout of the weights then, and of the kernels, of convolutions as of norms
            x = x.contiguous(memory_format=torch.channels_last)
        for k, (conv, norm, _) in enumerate(downs):
            x = conv(x)
            if k + 1 < len(downs):
                x = normalised(norm, x, slope=SLOPE, pad=True, views=views)
        if not stack:
            return normalised(norm, x, slope=SLOPE, views=views)
        x, activated = normalised(norm, x, slope=SLOPE, then_slope=SLOPE, views=views)
        return run_residual_stack(stack, x, activated, views)


class Decoder(nn.Module):
    """z [B, dim, H, W'] -> u [B, out_channels, *size]: up once more than the encoder goes down, then resized."""

    def __init__(self, out_channels: int, dim: int, num_up: int, num_residual: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size  # (H, W), W' being W halved num_up times
        self.num_residual = num_residual
        self.blocks = nn.Sequential(
            *residual_stack(dim, num_residual, inner_norm=False),
            *[up_block(dim, dim) for _ in range(num_up - 1)],
            nn.ConvTranspose2d(dim, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
            nn.ConvTranspose2d(out_channels, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
        )
        self.resize = LinearResize((size[1] >> num_up) << (num_up + 1), size[1])

    def forward(self, z: Tensor, views: int = 1) -> Tensor:
        """z [views·B, dim, H, W'], view after view, as in the encoder."""
        if in_turns(z, views):
            return torch.cat([self(view) for view in z.chunk(views)])
        count_batches(self, views)
        blocks = list(self.blocks)
        stack, ups, last = blocks[: 2 * self.num_residual], blocks[2 * self.num_residual : -2], blocks[-2:]
        x = run_residual_stack(stack, z, F.leaky_relu(z, SLOPE), views)
        for conv, norm, _ in ups:
            x = normalised(norm, conv(x), slope=SLOPE, views=views)
        return self.resize(thinned(last[1], last[0](x)))


def thinned(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """conv(x) of the decoder's last layer, x [B, E·C, H, W]: in float32 under any autocast where the kernel takes it.

    For 256 x 2 x 5 x 120, a few MB, cuDNN takes some 250 us of a training step on an H100.
    """
    if takes_triton(x, conv.weight, conv.groups):
        return thin_conv_transpose(x, conv.weight, conv.bias, groups=conv.groups)
    return conv(x)


class LinearResize(nn.Module):
    """x [..., before] -> [..., after] by linear interpolation, the ends staying the ends.

    F.interpolate(mode="bilinear", align_corners=True) where the height stays, to rounding. Each element of the result,
    and each of the gradient, is gathered from those that it depends on by a map made once: no atomics, so the gradient
    is the same bit for bit on a GPU too.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after
        taps: list[list[tuple[int, float]]] = []  # of each output: inputs and their weights
        for k in range(after):
            left, part = divmod(k * (before - 1), max(after - 1, 1))
            weight = part / max(after - 1, 1)
            taps.append([(left, 1 - weight), (min(left + 1, before - 1), weight)])
        uses: list[list[tuple[int, float]]] = [[] for _ in range(before)]  # of each input: outputs
        for k, pairs in enumerate(taps):
            for j, weight in pairs:
                if weight > 0:
                    uses[j].append((k, weight))
        longest = max(1, *map(len, uses))
        uses = [pairs + [(0, 0.0)] * (longest - len(pairs)) for pairs in uses]
        for name, table in (("forward", taps), ("backward", uses)):
            index = torch.tensor([[i for i, _ in pairs] for pairs in table])
            weight = torch.tensor([[w for _, w in pairs] for pairs in table], dtype=torch.float32)
            self.register_buffer(f"{name}_index", index.T.contiguous(), persistent=False)  # [taps, after or before]
            self.register_buffer(f"{name}_weight", weight.T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.before:
            raise ValueError(f"LinearResize: x is [..., {self.before}]; got {list(x.shape)}")
        return Gather.apply(x, self.forward_index, self.forward_weight, self.backward_index, self.backward_weight)


class Gather(torch.autograd.Function):
    """y[..., k] = Σ_t weight[t, k] · x[..., index[t, k]], and its gradient by the map that turns this one round."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, back_index: Tensor, back_weight: Tensor) -> Tensor:
        ctx.save_for_backward(back_index, back_weight)
        return gathered(x, index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        return gathered(grad_y, *ctx.saved_tensors), None, None, None, None


def gathered(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # [..., before], [T, after], [T, after]
    first, *others = x.index_select(-1, index.flatten()).unflatten(-1, index.shape).unbind(-2)  # [..., after] each
    y = first * weight[0]
    for part, w in zip(others, weight[1:], strict=True):
        y = y.addcmul(part, w)
    return y.to(x.dtype)
