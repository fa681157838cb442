"""Forks of what keeps a state beside the arrays, so that drafting can look ahead with it.

Plain decoding calls a logits processor once a position, in order. So does a round, if the processor
keeps a state (a counter, a grammar's place): the caller's own object is called for a position only
when every token before it is committed. Drafts, which may be dropped, are chosen with forks of it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_drift.decode.stateless import is_stateless, names_taken

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""Maps tokens `[n]` and logits `[1, V]` to logits, as mlx-lm's do."""

ATOMS = (str, bytes, int, float, complex, type(None), type, mx.array, np.ndarray)
"""What holds nothing that needs a look before it is copied."""


def fork(processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor] | None:
    """Copies processors, so that the copies' calls leave the originals as they are.

    By their own `fork()`, else by `copy.deepcopy`; whatever they hold that has a `fork()` or
    `deep_copy()` (the matchers of xgrammar and llguidance) is copied by that, and models,
    tokenizers and modules are shared. What processors share stays shared between their copies.

    Returns:
        The copies; None if one cannot be copied, or a deep copy would share what may change:
        functions with a state of their own, and mutable attributes of a class.
    """
    memo: dict[int, Any] = {}
    try:
        for processor in processors:
            if is_stateless(processor):
                memo[id(processor)] = processor
                continue
            kind: Any = type(_owner(processor))
            if not _copies_itself(processor) and _may_keep_state(kind):
                return None
            for part in _parts(processor):
                if _is_shared(part) and part is not processor:
                    memo[id(part)] = part
                elif own := _copies_itself(part):
                    memo[id(part)] = own()
                elif isinstance(part, FunctionType) and not is_stateless(part):
                    return None
        return copy.deepcopy(list(processors), memo)
    except Exception:  # whatever an object has against being copied
        return None


def unforkable(processors: Sequence[LogitsProcessor]) -> str | None:
    """Names the first processor that cannot be forked; None if all can be."""
    for processor in processors:
        if fork([processor]) is None:
            return str(getattr(processor, "__qualname__", type(processor).__qualname__))
    return None


def _is_shared(part: Any) -> bool:
    """Tells whether a fork has it in common with the original: large, and no processor's state."""
    return isinstance(part, nn.Module | ModuleType) or "Tokenizer" in type(part).__name__


def _copies_itself(part: Any) -> Callable[[], Any] | None:
    for name in ("fork", "deep_copy"):
        if callable(own := getattr(part, name, None)):
            return own
    return None


def _parts(processor: Any) -> Iterator[Any]:
    """Yields a processor and all that a deep copy of it would come to."""
    left, seen = [processor], set()
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, ATOMS):
            continue
        seen.add(id(part))
        yield part
        is_whole = isinstance(part, FunctionType) or _copies_itself(part)
        if not is_whole and (part is processor or not _is_shared(part)):
            left += _held(part)


def _held(part: Any) -> list[Any]:
    if isinstance(part, list | tuple | set | frozenset):
        return list(part)
    if isinstance(part, MethodType):
        return [part.__self__]
    held = list(getattr(part, "__dict__", {}).values())
    if isinstance(part, dict):
        held += part.values()
    if isinstance(part, partial):
        held += [part.func, *part.args, *part.keywords.values()]
    for kind in type(part).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        held += [getattr(part, name) for name in names if hasattr(part, name)]
    return held


@lru_cache(maxsize=256)
def _may_keep_state(kind: type) -> bool:
    """Tells whether a class has mutable attributes, or methods that set globals."""
    for name, value in (item for base in kind.__mro__ for item in vars(base).items()):
        if isinstance(value, FunctionType) and "STORE_GLOBAL" in names_taken(value.__code__):
            return True
        if isinstance(value, list | dict | set | bytearray) and not name.startswith("__"):
            return True
    return False


def _owner(processor: Any) -> Any:
    return processor.__self__ if isinstance(processor, MethodType) else processor
