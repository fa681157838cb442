"""The classic drafter: a small language model with the target's tokenizer (Leviathan et al. 2023).

It needs no taps: it reads the same tokens as the target. Any mlx-lm model will do whose caches can
take rows back; the rows of a chain are taken back as a conversation is, by
`mlx_drift.target.rewind`.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Choose, Draft, are_finite
from mlx_drift.errors import DriftError
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.rewind import Snapshot


class DraftModelState(TargetCache):
    """One conversation: the draft model's caches, with a row for every token.

    Attributes:
        fed: How many rows they hold.
        logits: Those of the last row, `[1, V]`: the next draft.
    """

    def __init__(self, caches: list[object]):
        super().__init__(caches)
        self.fed = 0
        self.logits: mx.array | None = None

    @property
    def state(self) -> list[object]:
        """All arrays, for `mx.eval`."""
        return [super().state, self.logits]

    @property
    def seed(self) -> mx.array | None:
        """What the next chain starts from; None before anything was ingested."""
        return self.logits

    @seed.setter
    def seed(self, seed: mx.array | None) -> None:
        self.logits = seed

    def can_rewind(self, rows: int) -> bool:
        """Tells whether it can go back to when the target had been fed `rows` rows."""
        return super().can_rewind(rows + 1)

    def rewind(self, rows: int) -> bool:
        """Goes back to when the target had been fed `rows` rows: one less than are held here."""
        return self._at(rows, super().rewind(rows + 1))

    def restore(self, snapshot: Snapshot, rows: int) -> bool:
        """Goes back to a snapshot; the next draft comes with the next row."""
        return self._at(rows, super().restore(snapshot, rows + 1))

    def from_arrays(self, arrays: dict[str, mx.array], rows: int) -> None:
        """Takes what `to_arrays` gave; the next draft comes with the next row."""
        super().from_arrays(arrays, rows + 1)
        self._at(rows, True)

    def _at(self, rows: int, done: bool) -> bool:
        self.fed, self.logits = rows + 1, None
        return done


class DraftModelDrafter:
    """Drafts with a small model. Holds no conversation: share it between them.

    Args:
        draft_model: A model as `mlx_lm.load` returns it.
        model: The target.
        shared: The token ids that mean the same to both, where some do not
            (`mlx_drift.drafters.shared_tokens`): only these are drafted. None for all.

    Raises:
        DriftError: If the draft model's caches cannot take rows back.
    """

    taps = ()

    def __init__(
        self, draft_model: nn.Module, model: nn.Module, shared: Sequence[int] | None = None
    ):
        self.model = model
        self.network = draft_model
        self._draft = Target(draft_model)
        self._vocab_size = Target(model).shape.vocab_size
        self._last_id: int | None = self._draft.shape.vocab_size - 1
        if self._last_id >= self._vocab_size - 1:
            self._last_id = None  # it knows all that the target may say
        self._shared: mx.array | None = None
        if shared is not None:
            known = np.isin(np.arange(self._vocab_size), np.array(shared))
            self._shared = mx.array(known)
            mx.eval(self._shared)
        self.make_cache()

    def make_cache(self) -> DraftModelState:
        """Makes the empty state of one conversation."""
        try:
            return DraftModelState(self._draft.make_cache())
        except DriftError as error:
            raise DriftError(f"the draft model: {error}") from None

    def start(self, token: mx.array, cache: DraftModelState) -> None:
        """Takes the first token of a conversation, `[1]`."""
        self._feed(token, cache)

    def ingest(self, tokens: mx.array, taps: mx.array, cache: DraftModelState) -> None:
        """Appends committed tokens `[M]`; there are no taps."""
        self._feed(tokens, cache)

    def propose(self, k: int, cache: DraftModelState, chooser: Choose | None = None) -> Draft:
        """Chains k drafts; none before anything was ingested."""
        if k == 0 or cache.logits is None:
            return Draft(mx.zeros((0,), mx.int32))
        fed, logits, before = cache.fed, cache.logits, cache.snapshot()
        tokens: list[mx.array] = []
        drawn_with: list[mx.array] = []
        while True:
            token, log_probabilities = self._choose(cache.logits, chooser, tokens)
            tokens.append(token)
            if log_probabilities is not None:
                drawn_with.append(log_probabilities)
            if len(tokens) == k:
                break
            self._feed(token, cache)
        assert cache.logits is not None
        finite = are_finite(cache.logits)  # what is not stays so: its rows are seen by all after it
        cache.restore(before, fed - 1)
        cache.logits = logits
        log_q = mx.concatenate(drawn_with) if drawn_with else None
        return Draft(mx.concatenate(tokens), log_q, finite)

    def _feed(self, tokens: mx.array, cache: DraftModelState) -> None:
        cache.fed += tokens.size
        if self._last_id is not None:  # no row of its embedding is another's
            tokens = mx.minimum(tokens, self._last_id)
        if tokens.size > MAX_DRAFT_TOKENS + 1:  # a prompt: of its logits only the last are wanted
            self._draft(tokens[:-1], cache)
            tokens = tokens[-1:]
        logits, _ = self._draft(tokens, cache)
        logits = self._of_the_targets_width(logits[-1:])
        cache.logits = logits if self._shared is None else mx.where(self._shared, logits, -mx.inf)

    def _choose(
        self, logits: mx.array | None, chooser: Choose | None, drafted: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        assert logits is not None
        if chooser is None or chooser.drafts_greedily:
            return mx.argmax(logits, axis=-1).astype(mx.int32), None
        return chooser.draft(logits, drafted)

    def _of_the_targets_width(self, logits: mx.array) -> mx.array:
        """Cuts or fills up rows that a model family pads differently in its sizes."""
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
        return logits[:, : self._vocab_size]
