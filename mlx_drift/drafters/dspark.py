"""DSpark drafters: a DFlash block whose drafts are chosen one after another (arXiv 2607.05147).

Notable:
- To the logits of each slot a bias is added that depends on the token chosen for the slot before,
  the last committed one at first: low-rank, from an embedding of *target* ids to *draft* ids. So a
  draft's distribution is conditional on the drafts before it, and rejection sampling is exact with
  what was really drawn from.
- `gated` scales the embedding by what the slot's state says of it; `rnn` keeps a state that runs
  along the block. What runs along is started anew each round: nothing is fed back over rounds.
- The confidence head tells how likely a slot's draft is to be accepted. It is asked only where
  drafting is to stop by it (`DSparkDrafter.confident`).
- Equations: vllm-project/speculators `models/dspark/model_definitions.py`.
"""

import copy
from dataclasses import replace
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.dflash import DFlashDrafter, DFlashNetwork
from mlx_drift.drafters.head_state import HeadState
from mlx_drift.drafters.protocol import Choose, Draft, are_finite
from mlx_drift.drafters.slots_config import DSparkConfig
from mlx_drift.drafters.tree import DEPTH
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target


class Markov(nn.Module):
    """The bias of a slot by the token before it."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        size, rank = config.hidden_size, config.markov_rank
        self.w1 = nn.Embedding(config.target.vocab_size, rank)
        self.w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if config.markov == "gated":
            self.gate = nn.Linear(size + rank, rank)
        if config.markov == "rnn":
            self.joint = nn.Linear(size + 2 * rank, 3 * rank)

    def __call__(
        self, token: mx.array, hidden: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Returns a slot's bias, and the state to go on with.

        Args:
            token: The token before the slot, `[1]`.
            hidden: The slot's state, `[1, H]`.
            state: What runs along the block, `[1, R]`; None at its start, and where nothing does.

        Returns:
            The bias `[1, D]` and the state `[1, R]`.
        """
        embedding = self.w1(token)
        if "gate" in self:
            gate = mx.sigmoid(self.gate(mx.concatenate([hidden, embedding], axis=-1)))
            return self.w2(gate * embedding), None
        if "joint" in self:
            state = mx.zeros_like(embedding) if state is None else state
            joined = self.joint(mx.concatenate([state, embedding, hidden], axis=-1))
            gate, candidate, output = mx.split(joined, 3, axis=-1)
            gate = mx.sigmoid(gate)
            state = gate * state + (1 - gate) * mx.tanh(candidate)
            return self.w2(mx.tanh(output)), state
        return self.w2(embedding), None


class DSparkNetwork(DFlashNetwork):
    """The drafter's own weights, under the names of the canonical checkpoint.

    Attributes:
        unquantized: The last names of linear layers that stay as they are when it is quantized.
    """

    unquantized = ("confidence",)

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        size = config.hidden_size
        if config.markov is not None:
            self.markov = Markov(config)
        if config.confidence is not None:
            markov = config.markov_rank if config.confidence == "state and token" else 0
            self.confidence = nn.Linear(size + markov, 1)


class DSparkDrafter(DFlashDrafter):
    """Fills a block in one pass, and chooses its tokens one after another."""

    config: DSparkConfig
    network: DSparkNetwork

    least: float | None = None
    """How likely a slot must be to be accepted for drafting to go on; None for no matter."""

    def __init__(
        self,
        config: DSparkConfig,
        network: DSparkNetwork,
        target: Target,
        d2t: mx.array | None = None,
    ):
        super().__init__(config, network, target, d2t)
        if not config.own_head:  # what is added to the target's logits is added to what they are
            self._head = target.logits

    def confident(self, least: float) -> Self:
        """Returns this drafter, its weights shared, stopping before the first doubtful slot.

        How many tokens there are to verify is then known only once they are drafted: a second
        synchronisation a round. What decides on a slot is what came before it, so nothing is lost
        in sampling.

        Args:
            least: How likely a slot must be to be accepted, by the head's own account, 0 to 1.

        Raises:
            DriftError: If the number is none, or the head gives no account.
        """
        if self.config.confidence is None:
            raise DriftError("this drafter has no confidence head to stop by")
        if not 0 <= least <= 1:
            raise DriftError(f"the least confidence is {least}; expected 0 to 1")
        other = copy.copy(self)
        other.least = least
        return other

    def propose(self, k: int, cache: HeadState, chooser: Choose | None = None) -> Draft:
        """Drafts k tokens, or as many as a block has; none before anything was ingested."""
        k = min(k, self.max_drafts or k)
        if k == 0 or cache.seed is None:
            return self._nothing()
        hidden = self._fill(k, cache)
        draft = self._choose(hidden, cache.seed, chooser)
        if self.least is None:
            return draft
        return self._sure(draft, hidden, cache.seed, self.least)

    def _choose(self, hidden: mx.array, last: mx.array, chooser: Choose | None) -> Draft:
        """Chooses tokens by the states of slots `[k, H]`, behind the last committed token `[1]`."""
        logits = self._head(hidden)
        if self.config.markov is None:
            return self._certain(logits, chooser)
        state: mx.array | None = None

        def logits_after(token: mx.array | None, slot: int) -> mx.array:
            nonlocal state
            row = slice(slot, slot + 1)
            before = last if token is None else token
            bias, state = self.network.markov(before, hidden[row], state)
            return logits[row] + bias

        tokens, log_q, rows = self._in_turn(hidden.shape[0], chooser, logits_after)
        return Draft(tokens, log_q, are_finite(mx.concatenate(rows)))

    def _sure(self, draft: Draft, hidden: mx.array, last: mx.array, least: float) -> Draft:
        """Leaves the drafts before the first slot that is less likely than asked."""
        read = [hidden]
        if self.config.confidence == "state and token":
            read.append(self.network.markov.w1(mx.concatenate([last, draft.tokens[:-1]])))
        likely = mx.sigmoid(self.network.confidence(mx.concatenate(read, axis=-1)))[:, 0]
        sure = mx.cumprod((likely >= least).astype(mx.int32)).sum().item()
        log_q = draft.log_probabilities
        log_q = None if log_q is None else log_q[:sure]
        return replace(draft, tokens=draft.tokens[:sure], log_probabilities=log_q)

    def propose_tree(self, k: int, cache: HeadState, chooser: Choose | None = None) -> Draft:
        """Drafts a tree of k tokens, each level knowing the tokens before it."""
        if self.least is not None:  # which is about chains
            return self.propose(k, cache, chooser)
        if self.config.markov is None or k < 2 or cache.seed is None:
            return super().propose_tree(k, cache, chooser)
        slots = min(k, DEPTH, self.max_drafts or k)
        hidden = self._fill(slots, cache)
        logits = self._head(hidden)
        rows: list[mx.array] = []
        states: mx.array | None = None

        def after(tokens: mx.array, parents: mx.array) -> mx.array:
            nonlocal states
            slot = len(rows)
            own = mx.broadcast_to(hidden[slot], (tokens.size, hidden.shape[1]))
            before = None if states is None else states[parents]
            bias, states = self.network.markov(tokens, own, before)
            rows.append(logits[slot] + bias)
            return rows[-1]

        draft = self._grown(k, chooser, after(cache.seed, mx.array([0])), after, levels=slots)
        return replace(draft, finite=are_finite(mx.concatenate(rows)))
