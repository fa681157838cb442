"""Which precision matrices are multiplied in: bfloat16 where the machine is faster so, or float32.

Weights, residual streams and everything that is not a product stay float32.
"""

import time
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import nn

PROBED = (512, 1024, 1024)
TRIALS = 5


def products(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which the products of a model are made in the faster precision."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_fast(device))


@cache
def bfloat16_is_fast(device: str) -> bool:
    """Tries it: on a CPU without the instructions bfloat16 is about a hundred times slower."""
    return _seconds(torch.bfloat16, device) < _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: str) -> float:
    rows, inner, columns = PROBED
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    w = torch.ones(inner, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        (x @ w).sum().item()
        best = min(best, time.perf_counter() - started)
    return best
