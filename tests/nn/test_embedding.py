import pytest
import torch
from torch.nn import functional as F

from ncfast.nn.embedding import TakeRows, embedding


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 0)])
def test_values_and_gradient_equal_pytorchs(shape):
    ids = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    table, other = (torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    ours, theirs = TakeRows.apply(ids, table), F.embedding(ids, other)
    assert torch.equal(ours, theirs)
    gradient = torch.randn_like(ours)
    ours.backward(gradient)
    theirs.backward(gradient)
    torch.testing.assert_close(table.grad, other.grad)


@pytest.mark.gpu
def test_the_gradient_is_the_same_bits_every_time():
    ids = torch.randint(0, 33, (256, 75), device="cuda")
    table = torch.randn(33, 64, device="cuda", requires_grad=True)
    gradient = torch.randn(256, 75, 64, device="cuda")
    first, *others = (torch.autograd.grad(embedding(ids, table), table, gradient)[0] for _ in range(5))
    exact = torch.zeros(33, 64, dtype=torch.float64, device="cuda").index_add_(
        0, ids.flatten(), gradient.flatten(0, 1).double()
    )
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(first, other) for other in others)
