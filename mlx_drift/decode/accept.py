"""Acceptance rules: pure functions of arrays, decided on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.decode.tree_shape import Levels
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target.tree import Tree


@dataclass(frozen=True)
class Verdict:
    """What was decided on the device, read.

    Attributes:
        accepted: How many drafts are, one after another.
        tested: How many were tested: one more, where another would have followed.
        tokens: What the target chooses after each row; the first accepted + 1 are committed.
        path: The rows that it chooses those after.
        levels: Of a tree, which of the drafts that followed the path were accepted.
    """

    accepted: int
    tested: int
    tokens: list[int]
    path: Sequence[int]
    levels: Levels = ()


def read_verdict(values: list[int], draft: Draft) -> Verdict:
    """Reads what `accept_on_tree` decided of a tree, or the other rules of a chain."""
    accepted, *tokens = values
    kept = accepted + 1
    if draft.tree is None:
        return Verdict(accepted, min(kept, draft.tokens.size), tokens[:kept], range(kept))
    tested, *tokens = tokens
    drafts = draft.tokens.size
    tokens, parents = tokens[:-drafts], tokens[-drafts:]
    tokens, path = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    levels = []
    for row, following in zip(path[:tested], [*path[1:kept], None], strict=False):
        beside = [i + 1 for i, parent in enumerate(parents) if parent == row - 1]
        levels.append((len(beside), 0 if following is None else beside.index(following) + 1))
    return Verdict(accepted, tested, tokens[:kept], path[:kept], levels)


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
    return mx.concatenate([_leading(draft == choices[:-1]), choices])


def accept_sampled(
    draft: mx.array, log_q: mx.array | None, log_p: mx.array, key: mx.array
) -> mx.array:
    """Accepts drafts so that what is committed has exactly the target's distribution.

    Rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
    2302.01318): draft d is accepted with probability min(1, p(d) / q(d)); after the first rejection
    a token is drawn from max(0, p − q), normalised; after none, one more from p. The row to draw
    from is picked on the device, so nothing waits for the host, and no other row is exponentiated.

    Args:
        draft: Drafted token ids `[…, k]` int32.
        log_q: The log-probabilities they were drawn with, `[…, k, V]`; None if with certainty.
        log_p: The target's, after the last committed token and each draft, `[…, k+1, V]`.
        key: The randomness.

    Returns:
        `[…, k+2]` int32: how many drafts are accepted (n), then k+1 tokens, of which the n+1 first
        are committed.
    """
    k, chosen = draft.shape[-1], draft.astype(mx.int32)
    accept_key, draw_key = mx.random.split(key)
    p_draft = mx.exp(_at(log_p[..., :-1, :], chosen))
    q_draft = 1.0 if log_q is None else mx.exp(_at(log_q, chosen))
    accepted = mx.random.uniform(shape=draft.shape, key=accept_key) * q_draft < p_draft
    count = _leading(accepted)

    row = count[..., None]  # the first rejected draft's, or the one after all
    p = mx.exp(mx.take_along_axis(log_p, row, axis=-2))
    # Behind the drafts none is refused: no token has that number.
    padded = mx.concatenate([chosen, mx.full_like(count, -1)], axis=-1)
    if log_q is None or k == 0:
        refused = mx.take_along_axis(padded, count, axis=-1)[..., None]
        residual = mx.where(mx.arange(p.shape[-1]) == refused, 0, p)
    else:
        q = mx.exp(mx.take_along_axis(log_q, mx.minimum(row, k - 1), axis=-2))
        residual = mx.maximum(p - mx.where(row < k, q, 0), 0)
    # p and q alike but for rounding: then there is no rejection to draw for.
    residual = mx.where(residual.sum(axis=-1, keepdims=True) > 0, residual, p)
    drawn = mx.random.categorical(mx.log(residual), key=draw_key).astype(mx.int32)
    return mx.concatenate([count, mx.where(mx.arange(k + 1) < count, padded, drawn)], axis=-1)


def accept_on_tree(draft: mx.array, parents: mx.array, tree: Tree, choices: mx.array) -> mx.array:
    """Accepts drafts along the path of a tree that the target's own choices take.

    Exact for any tree, however it was drafted: what is committed is what the target chooses, drawn
    from its own distribution or likeliest, and drafts only spare asking for it. (Sample and walk;
    EAGLE-2's rule, Li et al. 2024, arXiv 2406.16858, comes to the same.) To test drafts with
    min(1, p / q) instead, they must be drawn from q one by one, which a tree's are not.

    Args:
        draft: Drafted token ids `[N]` int32.
        parents: Which draft each follows, `[N]`; −1 for the last committed token.
        tree: The same for the rows.
        choices: The tokens that the target chooses after the last committed token and each draft,
            each by chances of its own, `[N+1]`.

    Returns:
        `[2(N+1) + 2 + N]` int32: how many drafts are accepted, how many were tested, then the
        choices and the rows they follow, those of the path first, and the parents.
    """
    choices, rows = choices.astype(mx.int32), mx.arange(draft.size + 1)
    is_chosen = draft == choices[parents + 1]
    is_twin = (parents[:, None] == parents) & (draft[:, None] == draft)
    is_first = ~(is_twin & (rows[:-1, None] > rows[:-1])).any(axis=1)
    leaves_path = mx.concatenate([mx.zeros((1,), mx.bool_), ~(is_chosen & is_first)])
    on_path = ~(tree.sees & leaves_path).any(axis=1)
    order = mx.argsort(mx.where(on_path, rows, rows + rows.size)).astype(mx.int32)
    accepted = on_path.astype(mx.int32).sum(axis=-1, keepdims=True) - 1
    tested = accepted + (parents == order[accepted] - 1).any(axis=-1, keepdims=True)
    return mx.concatenate([accepted, tested, choices[order], order, parents.astype(mx.int32)])


def _at(rows: mx.array, columns: mx.array) -> mx.array:
    """Takes one column `[…, k]` of each row `[…, k, V]`."""
    return mx.take_along_axis(rows, columns[..., None], axis=-1)[..., 0]


def _leading(accepted: mx.array) -> mx.array:
    """Counts how many are accepted one after another, of `[…, k]`: `[…, 1]` int32."""
    return mx.cumprod(accepted.astype(mx.int32), axis=-1).sum(axis=-1, keepdims=True)
