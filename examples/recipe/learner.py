"""One drafter in training: its weights, its optimizers, and what it takes to go on exactly."""

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
    """

    def __init__(self, drafter: Drafter, lr: float) -> None:
        self.drafter, self.lr = drafter, lr
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
        weights = STEP_DECAY ** torch.arange(depth)
        losses, counts = torch.zeros(depth), torch.zeros(depth)
        for row in rows:  # one by one: rows have lengths of their own, and chains need memory
            with products(self.drafter):
                of_row = chain_losses(self.drafter, target, row, depth, most)
            (of_row.losses * weights).sum().backward()
            losses += of_row.losses.detach()
            counts += of_row.rows
        counts.clamp_(min=1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
                for parameter in group["params"]:
                    parameter.grad /= counts[0]
            with products(self.drafter):
                optimizer.step()
            optimizer.zero_grad()
        return losses / counts

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


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint; a reader sees the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
