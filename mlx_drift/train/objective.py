"""What a head is trained on: its own chain from every position at once, weighed step by step.

The train-time test (paper §2, §5.1; SafeAILab/EAGLE `traineagle3/cnets.py`) is the drafter's own
`train_time_test_steps`. Row i of step j has drafted j tokens beyond what it was given and predicts
``tokens[i + 2 + j]``, so it is held against what the target says at position i + 1 + j.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_drift.drafters.cache import recomputed
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.train.losses import LOSSES, Loss

Judge = Callable[[mx.array, mx.array], mx.array]
"""Of states that the head reads and the target's logits, the losses."""


@dataclass(frozen=True)
class Row:
    """One text as the target sees it.

    Attributes:
        tokens: Its token ids `[L + 1]`.
        taps: The target's states, `taps[i]` captured at `tokens[i]`, `[L, A, T]`.
        logits: What the target says after each token, over the draft vocabulary, `[L + 1, D]`;
            `logits[i]` of the token after `tokens[i]`.
        counted: Of which of them the drafter is to learn, `[L + 1]` bool: those whose token is the
            assistant's, and whose likeliest token the draft vocabulary has.
    """

    tokens: mx.array
    taps: mx.array
    logits: mx.array
    counted: mx.array

    @property
    def length(self) -> int:
        """L: how many rows the drafter runs."""
        return int(self.taps.shape[0])


@dataclass(frozen=True)
class Objective:
    """How a chain is judged.

    Attributes:
        steps: How many steps it is unrolled.
        loss: A name of `LOSSES`.
        decay: What each step weighs beside the one before: 0.8 in SafeAILab/EAGLE and SpecForge.
        recompute: Compute logits, losses and attention once more for the gradients instead of
            keeping them: those of all steps are most of what a long row takes.
    """

    steps: int = 4
    loss: str = "soft-ce"
    decay: float = 0.8
    recompute: bool = False

    def __call__(self, drafter: ChainDrafter, row: Row) -> mx.array:
        """Returns the sum over the steps of weight times mean loss, a float32 scalar."""
        loss: Loss = LOSSES[self.loss]

        def judge(normed: mx.array, target: mx.array) -> mx.array:
            return loss(drafter.head(normed), target)

        judged = _recomputed(judge, drafter) if self.recompute else judge
        total = mx.array(0.0)
        chain = drafter.train_time_test_states(
            row.tokens, row.taps, self.steps, recompute=self.recompute
        )
        counted = np.array(row.counted)
        for step, (normed, _) in enumerate(chain):
            rows = row.length - step  # those after have no token to embed
            learned = np.flatnonzero(counted[1 + step : 1 + step + max(rows, 0)])
            if not learned.size:
                break
            at = mx.array(learned)
            target = mx.stop_gradient(row.logits[1 + step + at])
            total = total + self.decay**step * judged(normed[at], target).mean()
        return total


def _recomputed(judge: Judge, drafter: ChainDrafter) -> Judge:
    """Computes losses once more for the gradients: the head's weights are arguments then."""
    head: nn.Module | None = drafter.network.get("lm_head", None)
    if head is None:
        return recomputed(judge)
    names = [name for name, _ in tree_flatten(head.trainable_parameters())]

    def judged(normed: mx.array, target: mx.array, *weights: mx.array) -> mx.array:
        kept = head.trainable_parameters()
        head.update(tree_unflatten(list(zip(names, weights, strict=True))))
        try:
            return judge(normed, target)
        finally:
            head.update(kept)

    def with_weights(normed: mx.array, target: mx.array) -> mx.array:
        weights = [weight for _, weight in tree_flatten(head.trainable_parameters())]
        return recomputed(judged)(normed, target, *weights)

    return with_weights
