"""What "the same" means here: bit for bit where rows do not see each other's rounding.

On the plain CPU backend a block of rows is what single rows are in most models, and
`rows_are_alike` tells which: there tokens and caches are compared with `==`. Elsewhere (a GPU picks
other kernels for other numbers of rows) caches agree within a bound, and a token that is not the
target's choice must be a near-tie of it.
"""

from itertools import accumulate

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


def assert_same_tokens(
    model, prompt, got, expected, near_tie: float = 0.05, alike: bool = not ON_GPU
) -> None:
    """Compares generated tokens, which may differ only where rows are not alike.

    There each token must be the target's choice after those before it, or nearly: `near_tie` bounds
    how far its logit is behind.
    """
    if got == expected:
        return
    assert not alike, f"{got} is not {expected}"
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)  # in a block, as mlx-lm feeds it
    fed = mx.array([prompt[-1:] + got[:-1]])
    rows = [model(token, cache=cache)[0] for token in mx.split(fed, fed.size, axis=1)]
    logits = mx.concatenate(rows)
    chosen = mx.take_along_axis(logits, mx.array(got)[:, None], axis=1)
    behind = mx.max(logits, axis=1, keepdims=True) - chosen
    assert behind.max().item() < near_tie


PROMPT_ROWS, BLOCKS = 8, [2, 5, 3, 4] * 5


def rows_are_alike(target, together, alone) -> bool:
    """Tells whether rows in blocks have the very logits that they have one by one.

    Far past every window, on random tokens after the same prompt.

    Args:
        target: The target.
        together: An empty cache of it for the blocks.
        alone: An empty cache of it for single rows.
    """
    size, rows = target.shape.vocab_size, sum(BLOCKS)
    tokens = mx.random.randint(0, size, (PROMPT_ROWS + rows,), key=mx.random.key(0))
    for cache in (together, alone):
        target(tokens[:PROMPT_ROWS], cache)
    tokens = tokens[PROMPT_ROWS:]
    blocks = mx.split(tokens, list(accumulate(BLOCKS))[:-1])
    ours = mx.concatenate([target.verify(block, together)[0] for block in blocks])
    theirs = mx.concatenate([target.verify(row, alone)[0] for row in mx.split(tokens, rows)])
    return mx.array_equal(ours, theirs).item()
