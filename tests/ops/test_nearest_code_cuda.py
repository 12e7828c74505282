"""nearest_code on a GPU at the sizes that its tensor-core kernels divide among themselves, against float64."""

import pytest
import torch

from ncfast.ops import nearest_code
from ncfast.ops.nearest_code import why_not

pytestmark = pytest.mark.gpu

# M, K, D: codebooks in shared memory (D = 128 in a block of fewer warps), streamed ones of short and long codes, one
# with few rows that several blocks share, unaligned ones, one that the tensor cores do not take; codebooks that end
# within a tile.
SHAPES = [
    *((3000, 1024, 64), (3000, 512, 128), (65, 32, 64), (3000, 8192, 8), (3000, 4096, 256), (1000, 2048, 512)),
    *((3, 16384, 256), (777, 1031, 100), (777, 333, 37), (777, 3333, 17), (300, 200, 600)),
    *((777, 1000, 48), (3000, 2100, 16)),
]


@pytest.fixture(params=["", "mma"], ids=["wgmma", "mma"], autouse=True)
def cuda_isa(request, monkeypatch):
    """Before Hopper both are mma.sync."""
    reason = why_not(torch.device("cuda"), torch.float32)["cuda"]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("NCFAST_CUDA_ISA", request.param)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def data(name, M, K, D):
    z, codebook = randn(M, D), randn(K, D, seed=1)
    some = torch.arange(M, device="cuda") % K
    if name == "trained":
        z = codebook[some] + 0.5 * z
    elif name.startswith("offset"):
        z, codebook = z + float(name[6:]), codebook + float(name[6:])
    elif name == "sphere":
        z, codebook = (torch.nn.functional.normalize(x, dim=-1) for x in (z, codebook))
    elif name == "vqgan_init":
        codebook = (2 * torch.rand(K, D, generator=torch.Generator("cuda").manual_seed(2), device="cuda") - 1) / K
    elif name == "duplicates":
        codebook = codebook[torch.arange(K, device="cuda") * 7 % max(1, K // 3)]
    elif name == "one_ulp":
        codebook = codebook[torch.arange(K, device="cuda") % max(1, K // 4)]
        codebook[K // 2 :, D // 2] = torch.nextafter(codebook[K // 2 :, D // 2], codebook.new_tensor(torch.inf))
        z = codebook[some] + 1e-2 * z
    elif name == "integers":
        z, codebook = z.round().clamp(-1, 1), codebook.round().clamp(-1, 1)
    elif name == "far_rows":
        z = z * 1e6
    elif name == "near_rows":
        z = z * 1e-6
    elif name == "one_far_code":  # further than the sample of codes lets expect
        codebook[K // 2 + 1] *= 1e4
    elif name == "one_code_not_so_far":
        codebook[K // 2 + 1] *= 20
    elif name == "sample_alike":  # it tells nothing of the size of the others
        codebook *= 1e-6
        codebook[:: max(1, K // 128)] = 0
        z *= 1e-6
    elif name in ("1e30", "1e-30"):
        z, codebook = z * float(name), codebook * float(name)
    else:
        assert name == "gauss"
    return z, codebook


def check(z, codebook, indices):
    """Every index is that of a smallest float64 distance; of equal codes the first."""
    codebook, z = codebook.double(), z.double()
    centre = codebook.mean(0)
    codebook, z = codebook - centre, z - centre
    scores = torch.addmm(-0.5 * codebook.square().sum(-1), z, codebook.T)  # [M, K]
    best, nearest = scores.max(-1)
    size = z.norm(dim=-1) + codebook.norm(dim=-1).max()
    lowest = best - (z.shape[1] + 2) * 2.0**-52 * size.square()
    clear = (scores >= lowest[:, None]).sum(-1) == 1
    assert torch.equal(indices[clear], nearest[clear])
    assert (scores.gather(1, indices[:, None])[:, 0] >= lowest).all()
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    first = torch.full_like(group, len(group)).scatter_reduce_(
        0, group, torch.arange(len(group), device="cuda"), "amin"
    )
    assert torch.equal(first[group[indices]], indices)


NAMES = [
    *("gauss", "trained", "offset4", "offset1000", "sphere", "vqgan_init", "duplicates", "one_ulp", "integers"),
    *("far_rows", "near_rows", "one_far_code", "one_code_not_so_far", "sample_alike", "1e30", "1e-30"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64(name, shape):
    z, codebook = data(name, *shape)
    indices = nearest_code(z, codebook, impl="cuda")
    check(z, codebook, indices)
    assert torch.equal(nearest_code(z, codebook, impl="cuda"), indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(777, 512, 64), (777, 4096, 256), (777, 333, 37)])
def test_half_precision_rows(shape, dtype):
    z, codebook = data("gauss", *shape)
    z = z.to(dtype)
    check(z, codebook, nearest_code(z, codebook, impl="cuda"))


@pytest.mark.parametrize("every", [13, 4])  # 4: also all that are sampled of 512 codes
@pytest.mark.parametrize("shape", [(777, 512, 64), (777, 4096, 256)])
def test_rows_and_codes_that_are_not_finite(shape, every):
    z, codebook = data("gauss", *shape)
    spoilt = torch.zeros(shape[1], dtype=torch.bool, device="cuda")
    spoilt[::every] = True
    kept = torch.arange(shape[1], device="cuda")[~spoilt]
    expected = kept[nearest_code(z, codebook[~spoilt], impl="cuda")]
    codebook[spoilt, 3] = torch.nan
    z[::7, 2], z[::11, 5] = torch.nan, -torch.inf
    expected[::7] = expected[::11] = 0
    assert torch.equal(nearest_code(z, codebook, impl="cuda"), expected)


@pytest.mark.parametrize("shape", [(777, 512, 64), (777, 4096, 256)])
def test_fast_is_nearly_right(shape):
    z, codebook = data("gauss", *shape)
    exact, fast = (nearest_code(z, codebook, precision=precision, impl="cuda") for precision in ("exact", "fast"))
    assert (exact != fast).double().mean() < 0.01
    nearest, chosen = ((z.double() - codebook[indices].double()).square().sum(-1) for indices in (exact, fast))
    assert (chosen <= nearest * (1 + 1e-3)).all()


@pytest.mark.parametrize("K", [512, 4096])
def test_batched_codebooks(K):
    z, codebook = randn(3, 500, 128), randn(3, K, 128, seed=1)
    indices = nearest_code(z, codebook, impl="cuda")
    for head in range(3):
        assert torch.equal(indices[head], nearest_code(z[head], codebook[head], impl="cuda"))


@pytest.mark.parametrize("K", [512, 4096])
def test_cuda_graph(K):
    z, codebook = randn(500, 128), randn(K, 128, seed=1)
    nearest_code(z, codebook, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = nearest_code(z, codebook, impl="cuda")
    z.copy_(randn(500, 128, seed=2))
    graph.replay()
    assert torch.equal(indices, nearest_code(z, codebook, impl="cuda"))
