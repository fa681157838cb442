"""What a head learns from: a text as the target sees it."""

import mlx.core as mx

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.target.model import Target
from mlx_drift.train.objective import Row


def see(target: Target, drafter: ChainDrafter, tokens: mx.array, learned: mx.array) -> Row:
    """Runs the target over a text, once, and keeps what the drafter learns from.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter, for its vocabulary.
        tokens: Token ids `[L + 1]`.
        learned: Which of the tokens are the assistant's, `[L + 1]` bool: it is what the target
            says *before* each of these that counts.

    Returns:
        The row, evaluated, in float32.
    """
    logits, taps = target(tokens, target.make_cache())
    over_draft = drafter.of_draft_vocabulary(logits)
    inside = drafter.drafts(mx.argmax(logits, axis=-1))
    before = mx.concatenate([learned[1:], mx.array([False])])
    row = Row(
        tokens=tokens,
        taps=taps[:-1].astype(mx.float32),
        logits=over_draft.astype(mx.float32),
        counted=inside & before,
    )
    mx.eval(row.taps, row.logits, row.counted)
    return row
