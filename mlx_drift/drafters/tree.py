"""Growing a tree of drafts: EAGLE-2's, of the paths that the drafter finds likeliest.

Li et al. 2024, arXiv 2406.16858; SafeAILab/EAGLE `cnets.py`. Level by level the likeliest nodes are
followed; of all that came up the likeliest are drafted. A path is no likelier than what it begins
with, so whatever is drafted comes with all before it. Nothing here waits for the host.
"""

from collections.abc import Callable

import mlx.core as mx

WIDTH = 4
"""How many nodes of a level are followed, and into how many each: five rows are one cheap pass."""

DEPTH = 7
"""Levels at most, as in SafeAILab/EAGLE."""

LEAST = 1e-5
"""By how much in log-probability a path is less likely than what it begins with, however sure."""

Follow = Callable[[mx.array, mx.array], mx.array]
"""Maps the draft token ids of a level's beam `[B]`, and which of the beam before it each follows
`[B]`, to logits `[B, D]` of what comes after. The first beam follows the text, which is 0."""


def grow(
    first: mx.array, follow: Follow, count: int, levels: int = DEPTH
) -> tuple[mx.array, mx.array]:
    """Grows a tree.

    Args:
        first: Draft logits of what follows the text, `[1, D]`.
        follow: Drafts on.
        count: Nodes, at least one; fewer come of a tiny vocabulary, or of few levels.
        levels: Levels at most.

    Returns:
        Draft token ids `[N]` int32, and which of them each follows, one before it: `[N]` int32, −1
        for the text. Those that follow the same differ, the likeliest first; but for the last,
        where fewer may come, which are the likeliest once more.
    """
    ids, scores = _likeliest(first, min(WIDTH, count))
    ids, scores = ids[0], scores[0]
    follows = mx.zeros(ids.shape, mx.int32)
    pool = [(ids, scores, follows - 1)]
    start = 0  # of the last level, in the pool
    for depth in range(1, min(count, levels)):
        # One further down would come with all before it, and with those likelier than those.
        width = min(WIDTH, count - depth)
        beam = mx.argsort(-scores)[:width].astype(mx.int32)
        logits = follow(ids[beam], follows[beam])
        next_ids, given = _likeliest(logits, width)
        parents = mx.broadcast_to(beam[:, None] + start, next_ids.shape)
        start += ids.size
        follows = mx.broadcast_to(mx.arange(beam.size)[:, None], next_ids.shape).flatten()
        ids, scores = next_ids.flatten(), (scores[beam][:, None] + given).flatten()
        pool.append((ids, scores, parents.flatten()))
    ids, scores, parents = (mx.concatenate(list(parts)) for parts in zip(*pool, strict=True))
    kept = mx.sort(mx.argsort(-scores)[:count])
    place = mx.zeros(ids.shape, mx.int32)
    place[kept] = mx.arange(kept.size)
    parents = mx.where(parents[kept] < 0, -1, place[parents[kept]])
    # Whatever scores are that are not finite, each follows one before it.
    return ids[kept], mx.minimum(parents, mx.arange(kept.size) - 1)


def _likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Returns the likeliest ids `[B, count]` int32, in order, and their log-probabilities.

    One by one: a GPU would sort a vocabulary to find them at once.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    total = mx.maximum(total, mx.finfo(mx.float32).min)  # where no token may come
    ids, values = [], []
    for _ in range(min(count, logits.shape[-1])):
        best = mx.argmax(logits, axis=-1, keepdims=True)
        ids.append(best)
        values.append(mx.take_along_axis(logits, best, axis=-1))
        logits = mx.put_along_axis(logits, best, mx.array(-mx.inf), axis=-1)
    scores = mx.minimum(mx.concatenate(values, axis=-1) - total, -LEAST)
    found = mx.concatenate(ids, axis=-1)
    # What may not come is not drafted: no processor has to know such a text.
    found = mx.where(scores > -mx.inf, found, found[:, :1])
    return found.astype(mx.int32), scores
