"""Telling models apart without hashing gigabytes."""

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def fingerprint(module: nn.Module) -> str:
    """Tells models apart: a hash of names, shapes, dtypes, and the first bytes of every array."""
    arrays = sorted(tree_flatten(module.parameters()))
    shapes = [f"{name} {array.dtype} {array.shape}" for name, array in arrays]
    heads = [a[(0,) * (a.ndim - 1)][:8] if a.ndim else a[None] for _, a in arrays]
    values = mx.concatenate([mx.zeros(1, mx.uint8), *(mx.view(head, mx.uint8) for head in heads)])
    return hashlib.sha256("\n".join(shapes).encode() + np.array(values).tobytes()).hexdigest()
