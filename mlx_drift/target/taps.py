"""Layers that report what passes through them.

Notable:
- A tapped layer *instance* is given a subclass of its own class (``module.__class__ = Tapped``).
  mlx-lm's files stay as they are, the arithmetic is untouched, so the logits keep every bit, and
  `remove_taps` puts the classes back.
- What is captured goes to a context variable that is set only during one forward pass: threads,
  conversations and models in one process do not see each other's taps, and a layer that nobody is
  listening to pays one context look-up.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

import mlx.nn as nn

from mlx_drift.target.recurrent import Consumed
from mlx_drift.target.tree import VERIFIES_TREES, tree_of_pass

CONSUMES = -1
"""In place of a tap: the class notes what its layer consumes."""

Call = Callable[..., Any]
"""A layer's `__call__`, with the layer first."""


@dataclass
class Captured:
    """What is noted during one forward pass.

    Attributes:
        taps: The captured states by tap.
        twice: Taps that were captured more than once: layers that run in a loop.
        consumed: What recurrent layers were given.
    """

    taps: dict[int, Any] = field(default_factory=dict)
    twice: set[int] = field(default_factory=set)
    consumed: list[Consumed] = field(default_factory=list)


_installing = Lock()
_captured: ContextVar[Captured | None] = ContextVar("captured", default=None)


@contextmanager
def capture() -> Iterator[Captured]:
    """Hears what tapped layers report, in this thread."""
    captured = Captured()
    token = _captured.set(captured)
    try:
        yield captured
    finally:
        _captured.reset(token)


def report(module: nn.Module, tap: int, state: Literal["first argument", "output"]) -> None:
    """Has a module report what it is given first or what it returns, as a tap."""
    with _installing:
        _swap(module, tap, _call_that_reports(tap, state == "output"))


def note_consumed(layers: Iterable[nn.Module]) -> None:
    """Has recurrent layers note what they consume."""
    with _installing:
        for layer in layers:
            _swap(layer, CONSUMES, _call_that_notes)


def remove_taps(model: nn.Module) -> None:
    """Gives every tapped module of `model` its own class back."""
    vars(model).pop(VERIFIES_TREES, None)
    for module in model.modules():
        while hasattr(type(module), "tapped_as"):
            module.__class__ = type(module).__base__


def _swap(module: nn.Module, tapped_as: int, wrap: Callable[[Call], Call]) -> None:
    """Gives one module instance a subclass of its class that calls through `wrap`, once."""
    if any(cls.__dict__.get("tapped_as") == tapped_as for cls in type(module).__mro__):
        return
    cls = type(module)
    members = {"__call__": wrap(cls.__call__), "tapped_as": tapped_as}
    module.__class__ = type(cls.__name__, (cls,), members)


def _call_that_reports(tap: int, is_output: bool) -> Callable[[Call], Call]:
    def wrap(inner: Call) -> Call:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = inner(self, *args, **kwargs)
            captured = _captured.get()
            if captured is not None:
                if tap in captured.taps:
                    captured.twice.add(tap)
                # A layer may return its hidden state alone or before what else it returns.
                returned = output[0] if isinstance(output, tuple) else output
                captured.taps[tap] = returned if is_output else (*args, *kwargs.values())[0]
            return output

        return call

    return wrap


def _call_that_notes(inner: Call) -> Call:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        captured = _captured.get()
        if captured is not None:
            note = Consumed.of(inner, (self, *args), kwargs)
            if note is not None:
                captured.consumed.append(note)
                if (tree := tree_of_pass()) is not None:
                    return note.branch(tree)
        return inner(self, *args, **kwargs)

    return call
