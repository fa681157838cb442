"""One drafter in training: its weights, its optimizers, and what it takes to go on exactly."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipe.loss import Drafter, chain_losses
from recipe.muon import Muon
from recipe.precision import products
from recipe.rows import Row
from recipe.target import Llama

STEP_DECAY = 0.8
"""EAGLE-3's weight of step s is 0.8^s."""


class Learner:
    """A drafter and its optimizers: Muon for the matrices, AdamW for gains and head.

    Args:
        drafter: What is trained, in place.
        lr: The peak learning rate of both optimizers.
        threads: That share a step's rows. The rows are short, so two threads with rows of their
            own are faster than two in each product; but they share autocast's casts of the
            weights, so the last bits of a step are another time's no more.
    """

    def __init__(self, drafter: Drafter, lr: float, threads: int = 1) -> None:
        self.drafter, self.lr, self.threads = drafter, lr, threads
        named = list(drafter.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and "lm_head" not in name]
        others = [p for name, p in named if p.dim() == 1 or "lm_head" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr, momentum=0.95),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def learn(
        self, target: Llama, rows: list[Row], depth: int, rate: float, most: int | None = None
    ) -> Tensor:
        """Takes one step.

        Args:
            target: Whose embeddings, and for an MTP head output layer, are read.
            rows: The batch.
            depth: Steps of the train-time test.
            rate: The learning rate as a share of its peak.
            most: Chains of a row that are followed, drawn anew each time; all if None.

        Returns:
            The mean loss of each step, `[depth]`.
        """
        of_rows = partial(self._of_rows, target, depth, most)
        if self.threads == 1:
            found = [of_rows(rows)]
        else:
            products_in = max(1, torch.get_num_threads() // self.threads)
            settle = partial(torch.set_num_threads, products_in)
            with ThreadPoolExecutor(self.threads, initializer=settle) as pool:
                found = list(pool.map(of_rows, dealt(rows, self.threads)))
        (losses, counts, *gradients), *others = found
        for other in others:
            for total, more in zip((losses, counts, *gradients), other, strict=True):
                total += more
        counts.clamp_(min=1)
        for parameter, gradient in zip(self.drafter.parameters(), gradients, strict=True):
            parameter.grad = gradient / counts[0]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            with products(self.drafter):
                optimizer.step()
            optimizer.zero_grad()
        return losses / counts

    def _of_rows(
        self, target: Llama, depth: int, most: int | None, rows: list[Row]
    ) -> list[Tensor]:
        """What some rows say: sums of the losses, how many, sums of each parameter's gradient."""
        weights = STEP_DECAY ** torch.arange(depth)
        parameters = list(self.drafter.parameters())
        sums = [torch.zeros(depth), torch.zeros(depth), *map(torch.zeros_like, parameters)]
        for row in rows:  # one by one: rows have lengths of their own, and chains need memory
            with products(self.drafter):
                losses, counts = chain_losses(self.drafter, target, row, depth, most)
            loss = (losses * weights).sum()
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for total, more in zip(sums, (losses.detach(), counts, *gradients), strict=True):
                total += more
        return sums

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "drafter": self.drafter.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.drafter.load_state_dict(state["drafter"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def dealt(rows: Sequence[Row], shares: int) -> list[list[Row]]:
    """Deals rows out, the longest first, each to the share that has the fewest tokens so far."""
    hands: list[list[Row]] = [[] for _ in range(shares)]
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        min(hands, key=lambda hand: sum(len(row.ids) for row in hand)).append(row)
    return hands


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint; a reader sees the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
