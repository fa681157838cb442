"""P-EAGLE drafters: an EAGLE-3 network that drafts in one pass (arXiv 2602.01469).

Notable:
- Where a chain's next step would embed the token just drafted and read the state just recycled,
  every row after the first embeds a mask token and reads a learned vector in place of taps. So all
  rows of a round are known beforehand and run as one causal block.
- The first draft comes, as in a chain, from the pass that ingests the committed rows.
- Causal, hence fewer drafts are a prefix of more. None depends on what another became, so each is
  the likeliest token, with certainty.
"""

from collections.abc import Iterator

import mlx.core as mx

from mlx_drift.drafters.chain import ChainDrafter, ChainState
from mlx_drift.drafters.eagle3 import Eagle3Network
from mlx_drift.drafters.head import SlotsDrafter
from mlx_drift.drafters.slots_config import PEagleConfig
from mlx_drift.target.model import Target


class PEagleNetwork(Eagle3Network):
    """The drafter's own weights, under the names of the canonical checkpoint.

    Attributes:
        mask_hidden: What stands in the taps' place, `[1, 1, A·T]`, as trainers write it.
    """

    def __init__(self, config: PEagleConfig):
        super().__init__(config)
        self.taps_shape = 1, len(config.taps), config.target.hidden_size
        self.mask_hidden = mx.zeros((1, 1, len(config.taps) * config.target.hidden_size))

    def fuse_mask(self) -> mx.array:
        """Fuses what stands in the taps' place, `[1, H]`."""
        return self.fuse(self.mask_hidden.reshape(self.taps_shape))


class PEagleDrafter(SlotsDrafter, ChainDrafter):
    """Drafts all tokens of a round at once."""

    recycles = False
    config: PEagleConfig
    network: PEagleNetwork

    def __init__(
        self,
        config: PEagleConfig,
        network: PEagleNetwork,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        self.max_drafts = config.max_drafts

    def fill(self, k: int, cache: ChainState) -> mx.array:
        """Runs the rows of the first k drafts: their draft logits `[k, D]`.

        The first one's are there.
        """
        assert cache.draft_logits is not None
        if k == 1:
            return cache.draft_logits
        normed, _ = self.network(*self._masked(k - 1), cache.layers)
        for layer in cache.layers:
            layer.trim(k - 1)
        return mx.concatenate([cache.draft_logits, self._head(normed)])

    def train_time_test_states(
        self, tokens: mx.array, taps: mx.array, steps: int, *, recompute: bool = False
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Runs the rows of every position at once, step by step, as P-EAGLE trains them.

        Arguments and results as in `ChainDrafter.train_time_test_states`; of the tokens only those
        of the first step are read, and the states are nobody's input.
        """
        rows = taps.shape[0]
        caches = self._train_time_test_caches(recompute)
        embedding, hidden = self._embed(tokens[1 : rows + 1]), self.network.fuse(taps)
        for _ in range(steps):
            normed, state = self.network(embedding, hidden, caches)
            yield normed, state
            embedding, hidden = self._masked(rows)

    def chains(self, tokens: mx.array, taps: mx.array, steps: int) -> Iterator[mx.array]:
        """Drafts from every position at once; as `ChainDrafter.chains`, `max_drafts` at most."""
        steps = min(steps, self.max_drafts or steps)
        for normed, _ in self.train_time_test_states(tokens, taps, steps):
            yield self.choose(self._head(normed))

    def _masked(self, rows: int) -> tuple[mx.array, mx.array]:
        """Returns what rows after the first read: embedding and hidden state, both `[rows, H]`."""
        embedding = self._embed(mx.array([self.config.mask_token_id]))
        hidden = self.network.fuse_mask()
        return mx.repeat(embedding, rows, axis=0), mx.repeat(hidden, rows, axis=0)
