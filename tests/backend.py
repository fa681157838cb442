"""What "the same" means here: bit for bit where rows do not see each other's rounding.

On the plain CPU backend a block of rows is what single rows are, so tokens and caches are compared
with `==`. A GPU picks other kernels for other numbers of rows: there caches agree within a bound,
and the first token that differs must be a near-tie of the target's.
"""

from itertools import zip_longest

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

ON_GPU = mx.default_device() == mx.Device(mx.gpu)
ROUNDING = 1e-4  # of float32 states and logits on a GPU


def assert_same(a: mx.array, b: mx.array) -> None:
    if ON_GPU:
        assert mx.abs(a - b).max().item() < ROUNDING
    else:
        assert mx.array_equal(a, b)


def assert_same_rows(ours, theirs) -> None:
    """Compares two caches, layer by layer."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.offset == b.offset
        for x, y in zip(a.keys_and_values(), b.keys_and_values(), strict=True):
            assert_same(x, y)


def assert_same_tokens(model, prompt, got, expected, near_tie: float = 0.05) -> None:
    """Compares generated tokens; `near_tie` bounds the gap of two logits that may change places."""
    if got == expected:
        return
    assert ON_GPU, f"{got} is not {expected}"
    where = next(i for i, (a, b) in enumerate(zip_longest(got, expected)) if a != b)
    logits = model(mx.array([prompt + expected[:where]]), cache=make_prompt_cache(model))[0, -1]
    assert abs(logits[got[where]] - logits[expected[where]]).item() < near_tie
