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


@pytest.mark.gpu
def test_the_first_replay_waits_for_what_the_capture_left_on_its_stream(monkeypatch):
    """The capture sets the generator's counter to 0 there; late, it would undo what the replay has set."""
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(graph, *args, **kwargs):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second, before the counter is set
        begin(graph, *args, **kwargs)

    generator, expected = (torch.Generator("cuda").manual_seed(7) for _ in range(2))
    for each in (generator, expected):
        torch.rand(1000, device="cuda", generator=each)  # a counter that is not 0
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    x = torch.zeros(1000, device="cuda")
    graph = CudaGraph(
        lambda x: x + torch.rand(1000, device="cuda", generator=generator), x, warm_ups=0, generators=[generator]
    )
    assert torch.equal(graph(x), torch.rand(1000, device="cuda", generator=expected))
