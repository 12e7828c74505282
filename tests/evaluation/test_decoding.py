import numpy as np
import pytest

import ncfast
from ncfast.evaluation.decoding import trace_decoding
from ncfast.sampling.maskgit import mask_schedule

SMALL = {"dim": 8, "residual_blocks": 1, "codebook_size": 8, "prior_dim": 32, "prior_layers": 1, "prior_head_dim": 16}


@pytest.mark.parametrize(
    "guidance, steps, conditions", [(1.0, 6, None), (2.0, 6, None), (1.0, 40, None), (2.0, 6, {"age": np.arange(20)})]
)
def test_the_trace_ends_with_the_series_that_is_sampled(guidance, steps, conditions):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 1, 30)).cumsum(-1).astype(np.float32), np.arange(20) % 2
    options = {"stage1_epochs": 2, "stage2_epochs": 2, "guidance_scale": guidance, "decoding_steps": steps}
    model = ncfast.fit(x, y, conditions=conditions, ssl="none", quiet=True, **SMALL, **options)
    K, n = 8, model.vqvae.num_tokens
    for labels in ("none", "train"):
        trace = trace_decoding(model, labels, seed=3)
        masked = (trace.tokens == K).sum(1).tolist()
        counts = [n, *mask_schedule(n, steps)]
        assert masked == [count for i, count in enumerate(counts) if i == 0 or count < counts[i - 1]]
        for before, after in zip(trace.tokens[:-1], trace.tokens[1:], strict=True):
            assert (after == before)[before < K].all()  # what is known stays
        batch = next(model.sample_batches(1, labels, 3))
        np.testing.assert_array_equal(trace.tokens[-1], batch.tokens[0])
        np.testing.assert_allclose(model.data.denormalise(trace.series[-1:]), batch.x, rtol=1e-4, atol=1e-4)
