"""Muon in fp32, one batched Newton-Schulz per matrix shape.

`torch.optim.Muon` orthogonalises in bfloat16, which a CPU without AMX runs about 100 times slower
than fp32, and one matrix at a time. The iteration and its coefficients are Keller Jordan's; the
update is scaled to AdamW's usual RMS (Moonlight, arXiv 2502.16982), so one learning rate serves
both optimizers.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
ADAMW_RMS = 0.2


def orthogonalize(x: Tensor) -> Tensor:
    """Singular values to about 1, for a stack [n, rows, columns]."""
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        by_shape = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        groups = [{"params": matrices} for matrices in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(average, momentum))  # Nesterov
            scale = group["lr"] * ADAMW_RMS * max(update.shape[1:]) ** 0.5
            for matrix, change in zip(matrices, update, strict=True):
                matrix.sub_(change, alpha=scale)
