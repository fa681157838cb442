"""Acceptance rules: pure functions of arrays, decided on the device."""

import mlx.core as mx


def accept_matching(draft: mx.array, choices: mx.array) -> mx.array:
    """Accepts drafts as far as they are the target's own choice.

    Args:
        draft: Drafted token ids `[k]` int32.
        choices: The tokens that the target chooses after the last committed token and each draft,
            `[k+1]`. Its likeliest ones are the argmax of log-probabilities, not of logits: in 16
            bits the subtraction rounds, and mlx-lm chooses after.

    Returns:
        `[k+2]` int32: how many drafts are accepted (n), then the choices. The committed tokens are
        the n+1 first of those: an accepted draft *is* the choice before it, and the next one is
        the target's correction or bonus.
    """
    choices = choices.astype(mx.int32)
    return _verdict(draft == choices[:-1], choices)


def accept_sampled(
    draft: mx.array, log_q: mx.array | None, log_p: mx.array, key: mx.array
) -> mx.array:
    """Accepts drafts so that what is committed has exactly the target's distribution.

    Rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
    2302.01318): draft d is accepted with probability min(1, p(d) / q(d)); after the first rejection
    a token is drawn from max(0, p − q), normalised; after none, one more from p. The token after
    every possible rejection is drawn at once, so nothing waits for the host.

    Args:
        draft: Drafted token ids `[…, k]` int32.
        log_q: The log-probabilities they were drawn with, `[…, k, V]`; None if with certainty.
        log_p: The target's, after the last committed token and each draft, `[…, k+1, V]`.
        key: The randomness.

    Returns:
        `[…, k+2]` int32: how many drafts are accepted (n), then k+1 tokens, of which the n+1 first
        are committed.
    """
    vocabulary = mx.arange(log_p.shape[-1])
    if log_q is None:
        log_q = mx.where(vocabulary == draft[..., None], 0.0, -mx.inf)
    accept_key, draw_key = mx.random.split(key)
    p, q = mx.exp(log_p[..., :-1, :]), mx.exp(log_q)
    chosen = draft[..., None].astype(mx.int32)
    p_draft, q_draft = (mx.take_along_axis(x, chosen, axis=-1)[..., 0] for x in (p, q))
    accepted = mx.random.uniform(shape=draft.shape, key=accept_key) * q_draft < p_draft

    residual = mx.maximum(p - q, 0)
    # p and q alike but for rounding: then there is no rejection to draw for.
    residual = mx.where(residual.sum(axis=-1, keepdims=True) > 0, residual, p)
    log_next = mx.concatenate([mx.log(residual), log_p[..., -1:, :]], axis=-2)
    drawn = mx.random.categorical(log_next, key=draw_key).astype(mx.int32)
    padded = mx.concatenate([draft.astype(mx.int32), drawn[..., -1:]], axis=-1)
    before_rejection = mx.cumprod(accepted.astype(mx.int32), axis=-1)
    kept = mx.concatenate([before_rejection, mx.zeros_like(drawn[..., -1:])], axis=-1)
    return _verdict(accepted, mx.where(kept == 1, padded, drawn))


def _verdict(accepted: mx.array, tokens: mx.array) -> mx.array:
    count = mx.cumprod(accepted.astype(mx.int32), axis=-1).sum(axis=-1, keepdims=True)
    return mx.concatenate([count.astype(mx.int32), tokens], axis=-1)
