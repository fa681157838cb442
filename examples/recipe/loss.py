"""EAGLE-3's train-time test: chains of drafts from every row at once, compared with the target.

Row i of step s reads token i+1+s and is compared with what the target says next: soft
cross-entropy, renormalised over the draft vocabulary. It counts where the target said the predicted
token and its own choice of it is in the draft vocabulary. A chain does not see its neighbours, so
it is followed only if some step of it counts. A block's slots and Medusa's heads are compared the
same way, though none of their drafts follows from another.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.dflash import DFlash
from recipe.drafter import Eagle3
from recipe.medusa import Medusa
from recipe.mtp import MTP
from recipe.rows import Row
from recipe.target import Llama

Drafter = Eagle3 | MTP | DFlash | Medusa


class Chained(NamedTuple):
    """Of each step, the sum of its losses and how many rows it is of, `[depth]`."""

    losses: Tensor
    rows: Tensor


def chain_losses(
    drafter: Drafter, target: Llama, row: Row, depth: int, most: int | None = None
) -> Chained:
    """The losses of one row's chains, or of `most` of them; differentiable in the drafter."""
    length = len(row.ids)
    counted = row.said.clone()
    counted[0] = False
    counted[1:] &= drafter.can_say(row.choice[:-1])
    read = torch.arange(length)[:, None] + 1 + torch.arange(depth)  # [row, step]: what is read
    counts = (read < length - 1) & counted[(read + 1).clamp(max=length - 1)]
    rows = counts.any(1).nonzero()[:, 0]
    if most is not None and len(rows) > most:
        rows = rows[torch.randperm(len(rows))[:most].sort().values]
    read, counts = read[rows], counts[rows]
    with torch.no_grad():
        wanted = F.linear(row.final, drafter.output(target)).float().softmax(-1)

    def true_tokens(step: int, normed: Tensor | None) -> Tensor:
        ids = row.ids.roll(-1 - step)  # the rows that wrap around never count
        return target.model.embed_tokens(ids if step == 0 else ids[rows])[None]

    losses = []
    for step, (normed, _) in enumerate(
        drafter.unroll(drafter.start(row), true_tokens, depth, rows)
    ):
        here = counts[:, step]
        predicted = drafter.predict(target, normed[0, here], step).float()
        losses.append(F.cross_entropy(predicted, wanted[read[here, step]], reduction="sum"))
    return Chained(torch.stack(losses), counts.sum(0))
