"""The draft vocabulary: `d2t` as offsets, whatever the file has of it.

Trainers write offsets, `target id = draft id + d2t[draft id]`, of ids in ascending order
(SafeAILab, SpecForge, speculators) or by falling frequency (NVIDIA ModelOpt). `t2d` marks the
target ids that the draft vocabulary has. EAGLE's own code registers both filled with zeros, and
where the vocabularies are equal it deletes them, whatever they hold (SafeAILab/EAGLE `cnets.py`).
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.convert.resolved import CONVERTED, Resolved
from mlx_drift.drafters.schema import MAX_SIZE
from mlx_drift.errors import DriftError
from mlx_drift.target.model import TargetShape

Ids = npt.NDArray[np.int64]

INTEGERS = (mx.int32, mx.int64, mx.uint32, mx.uint64, mx.int16, mx.uint16)
MARKS = (mx.bool_, mx.int8, mx.uint8, *INTEGERS)

UNFILLED = "save the head again with the map it was trained with"


def read_d2t(resolved: Resolved, where: str) -> mx.array | None:
    """Reads `d2t` as int64 offsets `[D]`; None if every draft id is the target's.

    What a file has is taken for offsets or for the ids themselves, whichever makes a vocabulary:
    distinct ids of the target, those that `t2d` marks if it marks any.

    Args:
        resolved: The checkpoint; its `notes` get what the user should know.
        where: The file the tensors came from, for messages.

    Raises:
        DriftError: If they make no vocabulary, or might make two.
    """
    vocab = resolved.fields["target"]["vocab_size"]
    rows = resolved.fields.get("draft_vocab_size", vocab)
    d2t = _row(resolved.tensors, "d2t", INTEGERS, where)
    marked = marked_ids(resolved.tensors, where)
    if resolved.dialect == CONVERTED:  # settled, and perhaps by a t2d that is gone
        return None if d2t is None else mx.array(d2t)
    if d2t is None:
        if marked is None or rows == vocab:
            return None
        resolved.notes.append("there is no d2t: it is made of t2d, its tokens in ascending order")
        if marked.size != rows:
            raise DriftError(
                f"{where} lacks d2t, and t2d marks {marked.size} tokens for a draft vocabulary of "
                f"{rows}; {UNFILLED}"
            )
        return mx.array(marked - np.arange(rows))
    if d2t.size != rows:
        raise DriftError(f"{where}: d2t has {d2t.size} ids for a draft vocabulary of {rows}")
    places = np.arange(rows)
    if rows == vocab and (not d2t.any() or np.array_equal(d2t, places)):
        return None
    if not any(name.endswith("lm_head.weight") for name in resolved.tensors):
        raise DriftError(
            f"{where} has a d2t that maps other ids than the target's, but no lm_head.weight; "
            f"{UNFILLED}, and with its head"
        )
    ids = _decide(d2t, d2t + places, marked, vocab, where)
    if ids is d2t and marked is None:
        resolved.notes.append("d2t holds token ids and no offsets, as its numbers tell")
    return mx.array(ids - places)


def note_padding(resolved: Resolved, target: TargetShape) -> None:
    """Notes that a target has more ids than its drafter was made for, if it has."""
    ours, theirs = resolved.fields["target"]["vocab_size"], target.vocab_size
    if ours < theirs:
        resolved.notes.append(
            f"the drafter was made for {ours} of the target's {theirs} ids; the others are taken "
            "for padding and never drafted"
        )


def _decide(ids: Ids, offset: Ids, marked: Ids | None, vocab: int, where: str) -> Ids:
    """Chooses between `d2t` as ids and as offsets, of which `offset` are the ids."""
    readings = [reading for reading in (offset, ids) if _is_vocabulary(reading, vocab)]
    if marked is not None:
        # Sums tell the two apart: both cannot be the marked tokens.
        for reading in readings:
            if np.array_equal(np.sort(reading), marked):
                return reading
        raise DriftError(
            f"{where}: d2t and t2d disagree on the draft vocabulary ({ids.size} and {marked.size} "
            "tokens); the file is damaged, or its d2t is not one of offsets"
        )
    if not ids.any():
        raise DriftError(
            f"{where}: d2t is all zeros for a draft vocabulary of {ids.size} of {vocab} tokens, as "
            f"trainers initialise it, and no t2d says that it is meant so; {UNFILLED}"
        )
    if len(readings) == 1:
        return readings[0]
    if readings:
        raise DriftError(
            f"{where}: d2t may hold offsets or token ids, and there is no t2d to tell which; save "
            "the head with its t2d"
        )
    outside = offset.min() < 0 or offset.max() >= vocab
    what = f"outside the target's vocabulary of {vocab}" if outside else "two ids to one token"
    raise DriftError(f"{where}: d2t maps {what}; the file is damaged, or for another target")


def _row(
    tensors: dict[str, StoredTensor], name: str, dtypes: tuple[mx.Dtype, ...], where: str
) -> Ids | None:
    """Reads a row of whole numbers; None if there is none."""
    stored = tensors.get(name)
    if stored is None:
        return None
    if stored.ndim != 1 or stored.size > MAX_SIZE or stored.dtype not in dtypes:
        raise DriftError(
            f"{where}: {name} has shape {stored.shape} and dtype {stored.dtype}; expected a row of "
            f"at most {MAX_SIZE} whole numbers"
        )
    return np.array(stored.whole()).astype(np.int64)


def marked_ids(tensors: dict[str, StoredTensor], where: str) -> Ids | None:
    """Returns the ids that `t2d` marks, ascending; None if it marks none: it was never filled."""
    t2d = _row(tensors, "t2d", MARKS, where)
    return np.flatnonzero(t2d) if t2d is not None and t2d.any() else None


def _is_vocabulary(ids: Ids, vocab: int) -> bool:
    inside = ids.size > 0 and ids.min() >= 0 and ids.max() < vocab
    return bool(inside) and np.unique(ids).size == ids.size
