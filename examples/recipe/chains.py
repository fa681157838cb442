"""The attention of a draft chain from every row at once: EAGLE's train-time test.

At step s, row i attends to the step-0 keys of rows <= i, and of steps 1..s to its own keys only:
exactly what a cached chain that left the prompt at row i would see. So chains do not see each
other, and those that nobody needs can be left out from step 1 on.
"""

import torch
from torch import Tensor

from recipe.target import Attention, LlamaConfig, rope_table


class Chains:
    """The keys and values of the steps so far; one object serves one unrolling."""

    def __init__(
        self, attention: Attention, config: LlamaConfig, length: int, rows: Tensor | None = None
    ) -> None:
        """`rows` are those whose chains go on past the keys of step 0; default: all `length`."""
        self.attention, self.config = attention, config
        self.positions = torch.arange(length)  # of the rows that are read next
        self.rows = self.positions if rows is None else rows
        self.hidden = self.positions > self.rows[:, None]
        self.keys: list[Tensor] = []  # of step 0, then each step's own
        self.values: list[Tensor] = []

    def heads(self, u: Tensor) -> Tensor:
        """What the heads of the chains' rows say at the next step.

        `u`, which queries, keys and values read, is of all rows at step 0 and of `rows` after it.
        """
        attention, step = self.attention, len(self.keys)
        groups = attention.heads // attention.kv_heads
        k, v = attention.keys_values(u, rope_table(self.config, self.positions + step))
        self.keys.append(k.repeat_interleave(groups, dim=1))
        self.values.append(v.repeat_interleave(groups, dim=1))
        if step == 0:
            u, self.positions = u[:, self.rows], self.rows
        q = attention.queries(u, rope_table(self.config, self.positions + step))
        q = q * self.config.head_dim**-0.5
        (first_k, *own_k), (first_v, *own_v) = self.keys, self.values
        scores = (q @ first_k.mT).masked_fill(self.hidden, -torch.inf)
        diagonal = [(q * k).sum(-1, keepdim=True) for k in own_k]
        weights = torch.cat([scores, *diagonal], dim=-1).softmax(-1)
        length = first_k.shape[2]
        heads = weights[..., :length] @ first_v
        for index, v in enumerate(own_v):
            heads = heads + weights[..., length + index, None] * v
        return heads
