"""The draft vocabulary: `d2t`, checked against `t2d`, and turned into offsets if it is not.

All trainers write offsets, `target id = draft id + d2t[draft id]`; `t2d` marks the target ids that
the draft vocabulary has, and only checks the former.
"""

import mlx.core as mx
import numpy as np

from mlx_drift.convert.layers import Tensors
from mlx_drift.drafters.config import MAX_SIZE
from mlx_drift.errors import DriftError

INTEGERS = (mx.int32, mx.int64, mx.uint32, mx.uint64, mx.int16, mx.uint16)
MARKS = (mx.bool_, mx.int8, mx.uint8, *INTEGERS)


def read_d2t(tensors: Tensors, where: str) -> mx.array | None:
    """Reads `d2t` as int64 offsets `[D]`; None if there is none.

    A file with absolute ids is put right, for `t2d` proves what they are.

    Args:
        tensors: The tensors under canonical names.
        where: The file they came from, for messages.

    Raises:
        DriftError: If the two disagree, or `d2t` does not rise as offsets do.
    """
    if "d2t" not in tensors:
        return None
    for name, dtypes in (("d2t", INTEGERS), ("t2d", MARKS)):
        stored = tensors.get(name)
        if stored is not None and (
            stored.ndim != 1 or stored.size > MAX_SIZE or stored.dtype not in dtypes
        ):
            raise DriftError(
                f"{where}: {name} has shape {stored.shape} and dtype {stored.dtype}; expected a "
                f"row of at most {MAX_SIZE} whole numbers"
            )
    d2t = tensors["d2t"].whole().astype(mx.int64)
    size = d2t.size
    ids = d2t + mx.arange(size)
    if "t2d" in tensors:
        member = mx.array(np.flatnonzero(np.array(tensors["t2d"].whole())), dtype=mx.int64)
        if member.size == size and mx.array_equal(ids, member).item():
            return d2t
        if member.size == size and mx.array_equal(d2t, member).item():
            return d2t - mx.arange(size)
        raise DriftError(
            f"{where}: d2t and t2d disagree on the draft vocabulary ({size} and {member.size} "
            "tokens); the file is damaged, or its d2t is not one of offsets"
        )
    rises = size > 1 and not mx.all(ids[1:] > ids[:-1]).item()
    if rises or (size > 2 and mx.all(d2t[1:] > d2t[:-1]).item()):
        raise DriftError(
            f"{where}: d2t does not rise as offsets do, and there is no t2d to tell what it holds"
        )
    return d2t
