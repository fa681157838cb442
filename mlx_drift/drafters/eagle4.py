"""EAGLE-4 drafters: EAGLE-3.1 with a cheap head that chooses candidates for the exact one.

Notable:
- A layer over the vocabulary is most of what a draft reads. Here a product of two thin matrices
  scores all tokens, and only the best few get their exact logit, from their own rows of the head;
  all others cannot be drafted.
- So what is drawn from is over the candidates, and rejection sampling is exact with it.
- Source: eagle-harness 0.1.3, `efficient_lm_head_config`; its kernels were not run beside this.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import Eagle4Config
from mlx_drift.drafters.eagle3 import Eagle3Network
from mlx_drift.target.model import Target


class Eagle4Network(Eagle3Network):
    """The drafter's own weights, under the names of the canonical checkpoint."""

    def __init__(self, config: Eagle4Config):
        super().__init__(config)
        self.candidate_down = nn.Linear(config.hidden_size, config.candidate_rank, bias=False)
        self.candidate_up = nn.Linear(config.candidate_rank, config.draft_vocab_size, bias=False)

    def score(self, normed: mx.array) -> mx.array:
        """Scores all tokens for rows `[M, H]`: `[M, D]`."""
        return self.candidate_up(self.candidate_down(normed))


class Eagle4Drafter(ChainDrafter):
    """Chains its network, and drafts what its cheap head proposes and its exact one prefers."""

    config: Eagle4Config
    network: Eagle4Network

    def __init__(
        self,
        config: Eagle4Config,
        network: Eagle4Network,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        self._head = self._of_candidates

    def _of_candidates(self, normed: mx.array) -> mx.array:
        """Maps rows `[M, H]` to draft logits `[M, D]`: −inf but for the candidates."""
        head, most = self.network.lm_head, self.config.num_candidates
        scores = self.network.score(normed)
        ids = mx.argpartition(scores, -most, axis=-1)[:, -most:]
        if normed.shape[0] == 1:  # a draft: the head's other rows are not read
            exact = _logits(head, ids[0], normed)
        else:
            exact = mx.take_along_axis(head(normed), ids, axis=-1)
        blank = mx.full(scores.shape, -mx.inf, exact.dtype)
        return mx.put_along_axis(blank, ids, exact, axis=-1)


def _logits(head: nn.Module, ids: mx.array, normed: mx.array) -> mx.array:
    """Maps a row `[1, H]` to its logits of some ids `[N]`: `[1, N]`, of a head quantized or not."""
    weight = head.weight[ids]
    if "scales" not in head:
        return normed @ weight.T
    biases = head.biases[ids] if "biases" in head else None
    return mx.quantized_matmul(
        normed,
        weight,
        scales=head.scales[ids],
        biases=biases,
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
    )
