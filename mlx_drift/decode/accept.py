"""Acceptance rules: pure functions of arrays, decided on the device."""

import mlx.core as mx


def accept_greedy(draft: mx.array, log_probabilities: mx.array) -> mx.array:
    """Accepts drafts as far as they are the target's own greedy choice.

    Args:
        draft: Drafted token ids `[k]` int32.
        log_probabilities: The target's, after the last committed token and each draft,
            `[k+1, V]`. Not the logits: in 16 bits the subtraction rounds, and mlx-lm chooses after.

    Returns:
        `[k+2]` int32: how many drafts are accepted (n), then the target's choice after each row.
        The committed tokens are the n+1 first of those: an accepted draft *is* the choice before
        it, and the next one is the target's correction or bonus.
    """
    choices = mx.argmax(log_probabilities, axis=-1).astype(mx.int32)
    matches = (draft == choices[:-1]).astype(mx.int32)
    return mx.concatenate([mx.cumprod(matches).sum(keepdims=True).astype(mx.int32), choices])
