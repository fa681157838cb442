"""An average of a training's weights, which leaves out the noise of its last steps.

A training that goes on as long as there is time has no end for its learning rate to fall towards.
The average of the weights along the way, weighted by a power of the step, does what the fall would
do, at any moment: with a power of 9 it is over the last tenth or so of the training, however long.
"""

import copy

import torch
from torch import nn

POWER = 9


class Average:
    """Follows a model; `model` has the averaged weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after step `step`, counted from 0."""
        share = (POWER + 1) / (step + POWER + 1)
        for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, share)
