"""Logits processors as drafts meet them: each with the drafts before it on its own path.

Whatever is drafted with is a fork of the caller's (`mlx_drift.decode.fork`), one for every node
that is followed. A chain is a tree of which one node a level is followed.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import mlx.core as mx

from mlx_drift.decode.fork import LogitsProcessor, fork


class Ahead:
    """Processes the logits of one round's drafts, level by level.

    Args:
        processors: The caller's.
        have_state: Whether one of them must see position after position, in order.
        history: All committed tokens `[n]`.
        stop_tokens: Token ids after which nothing is wanted.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        have_state: bool,
        history: mx.array,
        stop_tokens: AbstractSet[int],
    ):
        self._processors = processors
        self._have_state = have_state
        self._history = history
        self._stop_tokens = stop_tokens
        self._following: list[Sequence[LogitsProcessor]] = [processors]  # a node of the last level
        self._levels = 0  # that they were asked about
        self._logits = mx.array([])  # those of the last, processed

    def __call__(
        self, logits: mx.array, drafted: Sequence[mx.array], parents: mx.array | None = None
    ) -> mx.array:
        """Processes the logits of one level, as far as processors can follow the drafts before it.

        One host synchronisation, if one of them keeps a state.

        Args:
            logits: What may follow each node, over the target's vocabulary, `[B, V]`.
            drafted: The drafts on the path to each, the first one's level first, `[B]` each.
            parents: Which node of the level before each one follows, `[B]`; None for the first.
        """
        if self._have_state:
            self._fork(drafted, parents)
        else:
            self._following = [self._processors] * logits.shape[0]
        rows = []
        for row, processors in enumerate(self._following):
            before = [tokens[row : row + 1] for tokens in drafted]
            text = mx.concatenate([self._history, *before])
            rows.append(process(processors, logits[row : row + 1], text))
        self._logits = rows[0] if len(rows) == 1 else mx.concatenate(rows)
        return self._logits

    def _fork(self, drafted: Sequence[mx.array], parents: mx.array | None) -> None:
        """Forks the processors for each node of a level, and lets go of them where they cannot go.

        After a stop token, or one that they forbid, no draft is accepted, and they need not know
        such a text. Nor can they follow if they were not asked about every draft before.
        """
        levels, self._levels = self._levels, len(drafted) + 1
        if not drafted:
            self._following = [fork(self._processors) or ()]
        elif len(drafted) != levels or not any(self._following):
            self._following = [()] * drafted[-1].size
        else:
            tokens = drafted[-1]
            parents = mx.zeros(tokens.shape, mx.int32) if parents is None else parents
            tokens = mx.where(mx.isfinite(self._logits[parents, tokens]), tokens, -1)
            read: Any = mx.stack([tokens, parents.astype(tokens.dtype)]).tolist()
            before = [
                () if token < 0 or token in self._stop_tokens else self._following[parent]
                for token, parent in zip(*read, strict=True)
            ]
            self._following = before if len(before) == 1 else [fork(one) or () for one in before]


def process(processors: Sequence[LogitsProcessor], logits: mx.array, text: mx.array) -> mx.array:
    """Processes one row of logits `[1, V]`, which come after some text `[n]`."""
    for processor in processors:
        logits = processor(text, mx.array(logits))  # which processors may write into
    return logits
