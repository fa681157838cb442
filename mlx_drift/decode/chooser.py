"""How the tokens of one round are chosen: the drafter's, and which of them the target takes.

Logits processors see every position with the history that it would have: the committed tokens and
the drafts before it. Those without a state see all positions of a round at once; where one keeps a
state, rows are gone through in order, as far as they are committed.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_drift.decode.accept import accept_matching, accept_on_tree, accept_sampled
from mlx_drift.decode.ahead import Ahead, process
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.sources import Foresees
from mlx_drift.drafters.protocol import Draft


class Chooser:
    """Chooses the tokens of one round.

    Args:
        sampling: What tokens are drawn from.
        k: Drafts in the round, at most.
        key: The round's randomness; None at temperature 0.
        history: All committed tokens `[n]`; None if no logits processor looks at them.
        stop_tokens: Token ids after which nothing is wanted.
    """

    def __init__(
        self,
        sampling: Sampling,
        k: int,
        key: mx.array | None = None,
        history: mx.array | None = None,
        stop_tokens: AbstractSet[int] = frozenset(),
    ):
        self.sampling = sampling
        self._history = mx.zeros((0,), mx.int32) if history is None else history
        self._stop_tokens = stop_tokens
        self._on_paths: list[mx.array] = []  # to each node of a tree's last level, by depth
        if sampling.is_random:
            assert key is not None, "drawing needs a key"
            self._accept_key, coin_key, *self._draft_keys = mx.random.split(key, k + 2)
            self._coins = mx.random.uniform(shape=(k + 1,), key=coin_key)

    @property
    def drafts_greedily(self) -> bool:
        """Whether a draft is simply the likeliest token."""
        return not (self.sampling.is_random or self.processes)

    @property
    def processes(self) -> bool:
        """Whether logits are processed before tokens are chosen."""
        return bool(self.sampling.logits_processors)

    @property
    def tells_tokens_apart(self) -> bool:
        """Whether it matters which tokens logits are of: to processors, and to XTC's exceptions."""
        return self.processes or self.sampling.xtc_probability > 0

    def likeliest(self, logits: mx.array, drafted: Sequence[mx.array]) -> mx.array:
        """Chooses the likeliest token `[1]` int32, for certain; arguments as in `draft`."""
        log_q = _log_softmax(self._foresee(logits, drafted))
        return mx.argmax(log_q, axis=-1).astype(mx.int32)

    def draft(
        self, logits: mx.array, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        """Chooses one draft.

        Args:
            logits: The drafter's, over the target's vocabulary, `[1, V]`; over a part of it where
                tokens are not told apart.
            drafted: The drafts before it, `[1]` each.

        Returns:
            Its column `[1]` int32, and the log-probabilities it was drawn with, `[1, V]`; None for
            certainty.
        """
        if not self.sampling.is_random:
            return self.likeliest(logits, drafted), None
        step = len(drafted)
        logits = self._foresee(logits, drafted)
        if self.sampling.is_filtered:
            logits = _log_softmax(logits)
        log_q = self.sampling.log_distribution(logits, self._coins[step : step + 1])
        return mx.random.categorical(log_q, key=self._draft_keys[step]).astype(mx.int32), log_q

    def on_paths(
        self, logits: mx.array, tokens: mx.array | None = None, parents: mx.array | None = None
    ) -> mx.array:
        """Processes the logits of one level of a tree, each row by the drafts before it.

        Args:
            logits: The drafter's, over the target's vocabulary, `[B, V]`.
            tokens: The drafts that they come after, `[B]`; None for the last committed token.
            parents: Which of those of the level before each of them follows, `[B]`.
        """
        if tokens is None:
            self._on_paths = []
        else:
            self._on_paths = [*(earlier[parents] for earlier in self._on_paths), tokens]
        return self._ahead(logits, self._on_paths, parents)

    def verify(self, draft: Draft, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Accepts drafts, and draws the token that follows them.

        Args:
            draft: The drafts.
            logits: The target's, after the last committed token and each draft, `[k+1, V]`.

        Returns:
            What `accept` does, and the target's log-probabilities `[k+1, V]`; where a processor or
            sampler keeps a state, only the rows of committed tokens matter, or are there.
        """
        if self.sampling.has_state:
            in_order = self._verify_in_order if draft.tree is None else self._walk_in_order
            return in_order(draft, logits)
        log_probabilities = self.log_probabilities(logits, draft)
        return self.accept(draft, log_probabilities), log_probabilities

    def log_probabilities(self, logits: mx.array, draft: Draft) -> mx.array:
        """Returns the target's log-probabilities `[k+1, V]`, after the logits processors.

        One host synchronisation, if there are some and the drafts are a tree, or one of them reads
        the tokens.

        Args:
            logits: The target's, after the last committed token and each draft, `[k+1, V]`.
            draft: The drafts.
        """
        if processors := self.sampling.logits_processors:
            rows = enumerate(self._texts(draft, logits))
            logits = mx.concatenate(
                [process(processors, logits[i : i + 1], text) for i, text in rows]
            )
        return _log_softmax(logits)

    def accept(self, draft: Draft, log_probabilities: mx.array) -> mx.array:
        """Accepts drafts, and draws the token that follows them.

        Args:
            draft: The drafts.
            log_probabilities: The target's, from `log_probabilities`.

        Returns:
            `[k+2]` int32: how many drafts are accepted (n), then k+1 tokens, of which the n+1
            first are committed; of a tree what `accept_on_tree` does.
        """
        if draft.parents is not None and draft.tree is not None:
            choices = self._drawn(log_probabilities)
            return accept_on_tree(draft.tokens, draft.parents, draft.tree, choices)
        if self.sampling.is_random:
            coins = self._coins[: log_probabilities.shape[0]]
            log_p = self.sampling.log_distribution(log_probabilities, coins)
            return accept_sampled(draft.tokens, draft.log_probabilities, log_p, self._accept_key)
        return accept_matching(draft.tokens, self._choices(log_probabilities))

    def _verify_in_order(self, draft: Draft, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Verifies draft after draft, to the first that is rejected or after which none is wanted.

        So what keeps a state is called for committed positions alone, for each once and in order.
        One host synchronisation a row.
        """
        drafted = [draft.tokens[i : i + 1] for i in range(draft.tokens.size)]
        processors = self.sampling.logits_processors
        tokens: list[int] = []
        rows: list[mx.array] = []
        for row in range(logits.shape[0]):
            rows.append(
                _log_softmax(process(processors, logits[row : row + 1], self._text(drafted[:row])))
            )
            verdict: Any = self._accept_one(draft, row, rows[-1]).tolist()
            accepted, token, *_ = verdict
            tokens.append(token)
            if not accepted or token in self._stop_tokens:
                break
        return mx.array([len(tokens) - 1 + accepted, *tokens]), mx.concatenate(rows)

    def _walk_in_order(self, draft: Draft, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Verifies a tree of drafts along the path that is taken, as `_verify_in_order` does."""
        processors = self.sampling.logits_processors
        parents: Any = draft.parents.tolist() if draft.parents is not None else []
        drafted: Any = draft.tokens.tolist()
        before, rows = self._texts(draft, logits), mx.array(logits)
        tokens: list[int] = []
        path, row = [], 0
        while True:
            log_p = _log_softmax(process(processors, logits[row : row + 1], before[row]))
            rows[row] = log_p[0]
            token: Any = self._drawn(log_p, row).item()
            tokens.append(token)
            path.append(row)
            following = [i for i, parent in enumerate(parents) if parent == row - 1]
            row = next((i + 1 for i in following if drafted[i] == token), 0)
            if not row or token in self._stop_tokens:
                break
        accepted = len(path) - (not row)
        tested = accepted + (not row and bool(following))
        return mx.array([accepted, tested, *tokens, *path, *parents]), rows

    def _accept_one(self, draft: Draft, row: int, log_probabilities: mx.array) -> mx.array:
        """Accepts one draft, or draws the token in its place, as `accept` does for a round of one.

        The token to follow it is drawn from the same row, for want of the next, and of no use.

        Args:
            draft: The round's drafts.
            row: Which of them; or none, after the last.
            log_probabilities: The target's, in its place, `[1, V]`.
        """
        token = draft.tokens[row : row + 1]
        if not self.sampling.is_random:
            choices = self._choices(log_probabilities)
            return accept_matching(token, mx.repeat(choices, token.size + 1, axis=0))
        log_p = self.sampling.log_distribution(log_probabilities, self._coins[row : row + 1])
        log_q = draft.log_probabilities
        return accept_sampled(
            token,
            None if log_q is None else log_q[row : row + 1],
            mx.repeat(log_p, token.size + 1, axis=0),
            self._key_of(row),
        )

    def _key_of(self, row: int) -> mx.array:
        """Returns the randomness of one row, where rows are gone through in order."""
        return mx.random.split(self._accept_key, row + 1)[row]

    def _drawn(self, log_probabilities: mx.array, row: int | None = None) -> mx.array:
        """Chooses the target's own tokens `[M]`, each by chances of its own.

        Args:
            log_probabilities: The target's, `[M, V]`.
            row: Which of the round's rows it is, where they are gone through in order.
        """
        if not self.sampling.is_random:
            return self._choices(log_probabilities)
        key = self._accept_key if row is None else self._key_of(row)
        coins = self._coins[row or 0 :][: log_probabilities.shape[0]]
        log_p = self.sampling.log_distribution(log_probabilities, coins)
        return mx.random.categorical(log_p, key=key)

    def _choices(self, log_probabilities: mx.array) -> mx.array:
        """Returns the target's own tokens `[M]`: a sampler's, or the likeliest."""
        if (sampler := self.sampling.sampler) is None:
            return mx.argmax(log_probabilities, axis=-1)
        rows = range(log_probabilities.shape[0])
        return mx.concatenate([sampler(log_probabilities[i : i + 1]) for i in rows])

    @cached_property
    def _ahead(self) -> Ahead:
        """What processes the logits of drafts."""
        processors = self.sampling.logits_processors
        have_state = self.sampling.processors_have_state
        return Ahead(processors, have_state, self._history, self._stop_tokens)

    def _foresee(self, logits: mx.array, drafted: Sequence[mx.array]) -> mx.array:
        """Processes the logits of a draft, as far as processors can follow the drafts before it."""
        return self._ahead(logits, drafted) if self.processes else logits

    def _text(self, drafted: Sequence[mx.array]) -> mx.array:
        """Returns all tokens up to a draft, `[n]`."""
        return mx.concatenate([self._history, *drafted])

    def _texts(self, draft: Draft, logits: mx.array) -> list[mx.array]:
        """Returns for each row all tokens before it, `[n]` each; reads a tree's shape.

        For processors that read the tokens, too, they are read once and laid out on the host, while
        the device verifies them.
        """
        paths = _paths(draft)
        if not any(isinstance(one, Foresees) for one in self.sampling.logits_processors):
            drafted = [draft.tokens[i : i + 1] for i in range(draft.tokens.size)]
            return [self._text([drafted[i] for i in path]) for path in paths]
        history, tokens = np.array(self._history), np.array(draft.tokens)
        mx.async_eval(logits)
        return [mx.array(np.concatenate([history, *(tokens[i : i + 1] for i in p)])) for p in paths]


def _paths(draft: Draft) -> list[list[int]]:
    """Returns for each row which drafts come before it; reads a tree's shape."""
    parents: Any = range(-1, draft.tokens.size - 1)
    if draft.parents is not None and draft.tree is not None:
        parents = draft.parents.tolist()
    paths: list[list[int]] = [[]]
    for i, parent in enumerate(parents):
        paths.append([*paths[parent + 1], i])
    return paths


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
