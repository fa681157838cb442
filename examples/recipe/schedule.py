"""Training on a wall-clock budget: the learning rate follows the share of the time that is gone.

A recipe for "an hour on whatever machine you have" cannot count steps; the rate still reaches
zero exactly when the time is up. The price: a slower machine takes fewer steps, so two runs
agree in their data order but not bit for bit.
"""

import time
from collections.abc import Iterable, Iterator

import torch

WARMUP, DECAY_FROM = 0.02, 0.3  # shares of the budget: linear rise, constant, linear fall


def lr_factor(progress: float) -> float:
    return min(progress / WARMUP, 1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def paced(
    minutes: float, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> Iterator[tuple[int, float]]:
    """Yields (step, elapsed seconds) until the budget is spent, setting the rate before each."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(elapsed / (60 * minutes))
        yield step, elapsed
        step += 1
