"""The head with all that a model does to its logits: what is added must be of their size."""

import mlx.core as mx
import numpy as np
import pytest

from families import build
from mlx_drift.target.model import Target

SCALED = ["cohere", "cohere2", "granite", "muse_glimmer"]
CAPPED = ["gemma2", "gemma4_text", "muse_glimmer"]
PLAIN = ["llama", "gemma3_text"]


@pytest.mark.parametrize("family", sorted({*SCALED, *CAPPED, *PLAIN}))
def test_they_are_what_the_model_says(family):
    model = build(family)
    layers = len(model.layers)
    target = Target(model, [layers + 1])
    logits, taps = target(mx.array([5, 9, 2, 44]), target.make_cache())
    ours = target.logits(taps[:, 0])
    np.testing.assert_allclose(ours, logits.reshape(ours.shape), rtol=1e-4, atol=1e-4)
    bare = np.array(target.head(taps[:, 0]))
    assert (np.abs(bare - np.array(ours)).max() < 1e-6) == (family in PLAIN)
