"""The SSL losses of a batch that is spread over processes: exact, each process with its own rows of the N x N matrices.

Process r holds n_r rows [n_r, D] of each view, N = Σ n_r; the numbers may differ, and some may be 0. All statistics are
those of the N rows. By the Gram route no process makes or sends a D x D matrix: each gathers the normalised rows
[N, D], computes its own [n_r, N] block of the Gram matrices, and sends scalars and D-vectors. Every process returns the
loss of the whole batch.

Gradients: with L the loss of the whole batch, a process's own rows z_r get

    gradient="true"      W ∂L/∂z_r, W processes: the mean over processes that DistributedDataParallel takes of parameter
                         gradients is then the gradient that one process would compute from all N rows.
    gradient="official"  ∂L/∂z_r, after that mean 1/W of the true one: what facebookresearch/barlowtwins, whose
                         all_reduce of C autograd does not see, trains with. (facebookresearch/vicreg: "true".)

Every process of the group makes the same calls in the same order, backward pass included, and passes the same
gradient on to its loss: with empty shards too, and with views that require gradients on all processes or on none.
The numbers of rows are read on the host: one synchronisation a call.

How the gradients come about: `ops.collectives`, and everything between belongs to one process's rows.
"""

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.collectives import Spread, Total, gather
from ncfast.ops.gram import VAR_REDUCTIONS, check_views, resolve_route


@torch.compiler.disable
def barlow_twins_loss_distributed(
    za: Tensor,
    zb: Tensor,
    *,
    group: distributed.ProcessGroup,
    gradient: str = "true",
    route: str = "auto",
    lambd: float = 0.005,
    ddof: int = 1,
    eps: float = 0.0,
    eps_std: float = 1e-8,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`barlow_twins_loss` of the rows of all processes of a group.

    Args:
        za, zb: this process's rows of the two views [n_r, D], n_r >= 0; any float dtype.
        group: the processes; NCCL for CUDA tensors, gloo for CPU tensors.
        gradient: "true" or "official", see above.
        route: "gram", "direct" (one D x D all_reduce), or "auto": Gram when N <= 0.75 D, N that of all processes.
        lambd, ddof, eps, eps_std, scale: as of `barlow_twins_loss`.
        impl: "auto" or "reference".

    Returns:
        Scalar, the same on every process; float32 (float64 for float64 input), differentiable once in both views.

    Raises:
        ValueError: views that are not alike and [n_r, D]; D or precision that differ between processes, or N < 2 (on
            every process); an unknown gradient, route or impl.
    """
    with torch.autocast(za.device.type, enabled=False):
        shards = Shards("barlow_twins_loss", za, zb, group, gradient, route, impl)
        N, D = shards.N, shards.D
        za, zb = shards.centre()  # [n_r, D]
        variance = shards.total(za.square().sum(0), zb.square().sum(0))  # 2 x [D]
        variance = [each / (N - ddof) for each in shards.spread(*variance)]
        za, zb = (z / (root(v + eps) + eps_std) for z, v in zip((za, zb), variance, strict=True))
        (energy,), diagonal = shards.product_energies([(za, zb)], (za * zb).sum(0))
        energy, diagonal = energy / N**2, diagonal / N
        on_diagonal = (1 - diagonal).square().sum()
        loss = (1 / D if scale is None else scale) * (on_diagonal + lambd * (energy - diagonal.square().sum()))
        return shards.finish(loss)


@torch.compiler.disable
def vicreg_loss_distributed(
    za: Tensor,
    zb: Tensor,
    *,
    group: distributed.ProcessGroup,
    gradient: str = "true",
    route: str = "auto",
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
    var_reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    """`vicreg_loss` of the rows of all processes of a group.

    Arguments sim to var_reduction as of `vicreg_loss`; the others, what it returns and raises as of
    `barlow_twins_loss_distributed`. Its backward pass sends nothing.
    """
    var = var * VAR_REDUCTIONS[var_reduction]
    with torch.autocast(za.device.type, enabled=False):
        shards = Shards("vicreg_loss", za, zb, group, gradient, route, impl)
        N, D = shards.N, shards.D
        distance = (shards.za - shards.zb).square().sum()
        za, zb = shards.centre()  # [n_r, D]
        energies, variance_a, variance_b, distance = shards.product_energies(
            [(za, za), (zb, zb)], za.square().sum(0), zb.square().sum(0), distance
        )
        loss = sim * distance / (N * D)
        for energy, variance in zip(energies, (variance_a / (N - 1), variance_b / (N - 1)), strict=True):
            covariance = (energy / (N - 1) ** 2 - variance.square().sum()) / D
            loss = loss + var * hinge(variance, eps) + cov * covariance
        return shards.finish(loss)


@torch.compiler.disable
def vibcreg_loss_distributed(
    za: Tensor,
    zb: Tensor,
    *,
    group: distributed.ProcessGroup,
    gradient: str = "true",
    route: str = "auto",
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 100.0,
    eps: float = 1e-4,
    var_reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    """`vibcreg_loss` of the rows of all processes of a group.

    Arguments sim to var_reduction as of `vibcreg_loss`; the others, what it returns and raises as of
    `barlow_twins_loss_distributed`.
    """
    var = var * VAR_REDUCTIONS[var_reduction]
    with torch.autocast(za.device.type, enabled=False):
        shards = Shards("vibcreg_loss", za, zb, group, gradient, route, impl)
        N, D = shards.N, shards.D
        distance = (shards.za - shards.zb).square().sum()
        za, zb = shards.centre()  # [n_r, D]
        squares = shards.total(za.square().sum(0), zb.square().sum(0))  # 2 x [D]
        # As F.normalize has it, max(‖z‖, 1e-12), but without the root's slope at 0.
        norms = [each.clamp_min(1e-24).sqrt() for each in shards.spread(*squares)]
        za, zb = za / norms[0], zb / norms[1]  # unit columns over all N rows
        energies, *diagonals, distance = shards.product_energies(
            [(za, za), (zb, zb)], za.square().sum(0), zb.square().sum(0), distance
        )
        loss = sim * distance / (N * D)
        for energy, diagonal, square in zip(energies, diagonals, squares, strict=True):
            correlation = (energy - diagonal.square().sum()) / D**2
            loss = loss + var * hinge(square / (N - 1), eps) + cov * correlation
        return shards.finish(loss)


def root(x: Tensor) -> Tensor:
    """The square root; its gradient at 0, a constant column's, is 0 as torch.std has it."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def hinge(variance: Tensor, eps: float) -> Tensor:
    """mean_i relu(1 - sqrt(variance_i + eps)).  variance [D]"""
    return F.relu(1 - (variance + eps).sqrt()).mean()


class Shards:
    """This process's views za, zb [n_r, D] in float32 (float64 stays), and what it exchanges with the others."""

    def __init__(
        self,
        operation: str,
        za: Tensor,
        zb: Tensor,
        group: distributed.ProcessGroup,
        gradient: str,
        route: str,
        impl: str,
    ) -> None:
        if gradient not in ("true", "official"):
            raise ValueError(f"{operation}: gradient is 'true' or 'official'; got {gradient!r}")
        dispatch.choose(f"{operation} over a process group", impl, {"reference": None})
        resolve_route(route, 1, 1)  # a wrong word must not wait for an exchange that the others never join
        za, zb = check_views(operation, za, zb, least=0)
        rank, world = distributed.get_rank(group), distributed.get_world_size(group)
        if rank < 0:
            raise ValueError(f"{operation}: this process is not in group; call it on the members of group alone")
        self.group, self.world = group, world
        # What would otherwise hang or mix up rows is exchanged first, so that every process raises the same error.
        shapes = torch.zeros(world, 3, dtype=torch.int64, device=za.device)
        shapes[rank] = torch.tensor([*za.shape, za.itemsize])
        distributed.all_reduce(shapes, group=group)
        self.counts, dims, itemsizes = shapes.T.tolist()
        self.N, self.D = sum(self.counts), dims[0]
        if len(set(dims)) > 1:
            raise ValueError(f"{operation}: za and zb have the same D on every process; got D = {dims}")
        if len(set(itemsizes)) > 1:
            raise ValueError(f"{operation}: za and zb are float64 on every process or on none; got both")
        if self.N < 2:
            raise ValueError(f"{operation}: statistics over the batch need N >= 2 samples; all processes have {self.N}")
        self.route = resolve_route(route, self.N, self.D)
        self.factor = world if gradient == "true" else 1
        self.za, self.zb = za, zb

    def total(self, *parts: Tensor) -> list[Tensor]:
        """The sums over all processes, as one message. For what every process goes on to compute alike."""
        packed = Total.apply(torch.cat([part.flatten() for part in parts]), self.group)
        sums = packed.split([part.numel() for part in parts])
        return [each.view(part.shape) for each, part in zip(sums, parts, strict=True)]

    def spread(self, *values: Tensor) -> list[Tensor]:
        """The values, for use on this process's rows: their gradients are summed over all processes, as one message."""
        packed = Spread.apply(torch.cat([value.flatten() for value in values]), self.group)
        parts = packed.split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def centre(self) -> tuple[Tensor, Tensor]:
        """The rows less the mean of all N."""
        # The losses depend on the centred rows, and the gradients of those sum to 0 over the batch in every column, so
        # that the means' share of the gradient vanishes: no message for it in the backward pass.
        with torch.no_grad():
            sums = self.total(self.za.sum(0), self.zb.sum(0))
        return self.za - sums[0] / self.N, self.zb - sums[1] / self.N

    def product_energies(self, pairs: list[tuple[Tensor, Tensor]], *sums: Tensor) -> list:
        """[‖aᵀ b‖_F² of all N rows, for each pair], then the totals of `sums`: one message of sums."""
        if self.route == "direct":
            parts = [a.T @ b for a, b in pairs]  # [D, D]
        else:
            parts = [RowBlockEnergy.apply(a, None if b is a else b, self.counts, self.group) for a, b in pairs]
        reduced = self.total(*parts, *sums)
        energies, sums = reduced[: len(pairs)], reduced[len(pairs) :]
        return [[each.square().sum() for each in energies] if self.route == "direct" else energies, *sums]

    def finish(self, loss: Tensor) -> Tensor:
        return Scale.apply(loss, self.factor)


class Scale(torch.autograd.Function):
    """Identity, with the gradient multiplied."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


class RowBlockEnergy(torch.autograd.Function):
    """This process's share of ‖AᵀB‖_F² = <A Aᵀ, B Bᵀ>: its rows of both matrices, a scalar.  a, b [n_r, D]; b None: a.

    Its gradient is that of the sum over all processes: in each entry of the symmetric matrices that a row of a takes
    part in, the row of a has the same share on both sides of the diagonal, so its own row block holds half of it.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor | None, counts: list[int], group: distributed.ProcessGroup) -> Tensor:
        all_a = gather_rows(a, counts, group)  # [N, D]
        gram_a = a @ all_a.T  # [n_r, N]
        if b is None:
            ctx.save_for_backward(gram_a, all_a)
            return gram_a.square().sum()
        all_b = gather_rows(b, counts, group)
        gram_b = b @ all_b.T
        ctx.save_for_backward(gram_b, all_a, gram_a, all_b)
        return (gram_a * gram_b).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gram_b, all_a, *other = ctx.saved_tensors
        if not other:
            return (4 * grad) * (gram_b @ all_a), None, None, None
        gram_a, all_b = other
        grad_a = (2 * grad) * (gram_b @ all_a) if ctx.needs_input_grad[0] else None
        grad_b = (2 * grad) * (gram_a @ all_b) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None


def gather_rows(x: Tensor, counts: list[int], group: distributed.ProcessGroup) -> Tensor:
    """The rows of all processes in order of rank.  x [n_r, D] -> [N, D]."""
    longest = max(counts)
    x = F.pad(x, (0, 0, 0, longest - x.shape[0])).contiguous()  # collectives want equal sizes
    rows = gather(x, group)
    if min(counts) == longest:
        return rows
    return torch.cat([part[:count] for part, count in zip(rows.split(longest), counts, strict=True)])
