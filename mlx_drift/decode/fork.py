"""Forks of what keeps a state beside the arrays, so that drafting can look ahead with it.

Plain decoding calls a logits processor once a position, in order. So does a round, if the processor
keeps a state (a counter, a grammar's place): the caller's own object is called for a position only
when every token before it is committed. Drafts, which may be dropped, are chosen with forks of it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import PreTrainedTokenizerBase, TokenizerWrapper

from mlx_drift.decode.stateless import is_stateless, names_taken

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""Maps tokens `[n]` and logits `[1, V]` to logits, as mlx-lm's do."""

SHARED = (nn.Module, TokenizerWrapper, PreTrainedTokenizerBase)
"""What a fork has in common with what it was forked from: large, and no processor's own state."""


def fork(processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor] | None:
    """Copies processors, so that the copies' calls leave the originals as they are.

    By their own `fork()`, else by `copy.deepcopy`; what an object holds that has a `deep_copy()`
    (llguidance's matcher) is copied by that, and models and tokenizers are shared. Objects that are
    shared between processors stay shared between their copies.

    Returns:
        The copies; None if one cannot be copied, or a deep copy would share what may change:
        functions with a state of their own, and mutable attributes of a class.
    """
    memo: dict[int, Any] = {}
    try:
        for processor in processors:
            if is_stateless(processor):
                memo[id(processor)] = processor
            elif callable(own := getattr(processor, "fork", None)):
                memo[id(processor)] = own()
            else:
                if _shares_state(processor):
                    return None
                for part in (processor, *_held(processor)):
                    if callable(own := getattr(part, "deep_copy", None)):
                        memo[id(part)] = own()
                    elif part is not processor and isinstance(part, SHARED):
                        memo[id(part)] = part
        return copy.deepcopy(list(processors), memo)
    except Exception:  # whatever an object has against being copied
        return None


def unforkable(processors: Sequence[LogitsProcessor]) -> str | None:
    """Names the first processor that cannot be forked; None if all can be."""
    for processor in processors:
        if fork([processor]) is None:
            return str(getattr(processor, "__qualname__", type(processor).__qualname__))
    return None


def _held(processor: Any) -> Iterator[Any]:
    """Yields what a processor refers to at first hand; of a bound method, what its object does."""
    if isinstance(processor, partial):
        yield from (processor.func, *processor.args, *processor.keywords.values())
    owner = _owner(processor)
    yield from getattr(owner, "__dict__", {}).values()
    for kind in type(owner).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(owner, name):
                yield getattr(owner, name)


def _shares_state(processor: Any) -> bool:
    """Tells whether its deep copy may share what changes: a function's state, or the class's."""
    functions = [p for p in (processor, *_held(processor)) if isinstance(p, FunctionType)]
    kind: Any = type(_owner(processor))
    return not all(map(is_stateless, functions)) or _may_keep_state(kind)


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
