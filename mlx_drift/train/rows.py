"""What a head learns from: a text as the target sees it."""

import mlx.core as mx

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.target.model import Target
from mlx_drift.train.objective import Row

CHUNK = 512
"""Tokens the target reads at a time: of its logits only the draft vocabulary's are kept."""


def see(target: Target, drafter: ChainDrafter, tokens: mx.array, learned: mx.array) -> Row:
    """Runs the target over a text, once, and keeps what the drafter learns from.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter, for its vocabulary.
        tokens: Token ids `[L + 1]`.
        learned: Which of the tokens are the assistant's, `[L + 1]` bool: it is what the target
            says *before* each of these that counts.

    Returns:
        The row, evaluated; taps in float32, logits in the target's dtype.
    """
    cache = target.make_cache()
    taps, over_draft, inside = [], [], []
    for start in range(0, tokens.size, CHUNK):
        logits, states = target(tokens[start : start + CHUNK], cache)
        taps.append(states.astype(mx.float32))
        over_draft.append(drafter.of_draft_vocabulary(logits))
        inside.append(drafter.drafts(mx.argmax(logits, axis=-1)))
        mx.eval(taps[-1], over_draft[-1], inside[-1], cache.state)
    before = mx.concatenate([learned[1:], mx.array([False])])
    row = Row(
        tokens=tokens,
        taps=mx.concatenate(taps)[:-1],
        logits=mx.concatenate(over_draft),
        counted=mx.concatenate(inside) & before,
    )
    mx.eval(row.taps, row.logits, row.counted)
    return row
