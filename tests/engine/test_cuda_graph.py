import pytest
import torch

from ncfast.engine.cuda_graph import CudaGraph


@pytest.mark.gpu
def test_replays_with_other_inputs():
    def function(x, y):
        return x @ y, x.sum()

    x, y = torch.randn(5, 4, device="cuda"), torch.randn(4, 3, device="cuda")
    graph = CudaGraph(function, x, y)
    for _ in range(3):
        x, y = torch.randn_like(x), torch.randn_like(y)
        product, total = graph(x, y)
        assert torch.equal(product, x @ y) and torch.equal(total, x.sum())


@pytest.mark.gpu
def test_what_waits_for_the_device_cannot_be_captured():
    with pytest.raises(RuntimeError):
        CudaGraph(lambda x: x * float(x.sum()), torch.ones(3, device="cuda"))
    torch.cuda.synchronize()
    assert float(torch.ones(2, device="cuda").sum()) == 2  # the device goes on
