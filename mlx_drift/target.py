"""An mlx-lm model seen as tokens in, logits and taps out, with exact rollback.

Notable:
- Taps are captured by giving each tapped layer *instance* a subclass of its own class
  (``module.__class__ = Tapped``). mlx-lm's files stay as they are, the arithmetic is untouched, so
  the logits keep every bit, and `remove_taps` puts the classes back.
- What is captured goes to a context variable that is set only during one forward pass: threads,
  conversations and models in one process do not see each other's taps, and a layer that nobody is
  listening to pays one context look-up.
- A cache is accepted only if a rejected draft can be taken back exactly; the rest is refused by
  name before anything runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_drift.errors import DriftError

Cache = list[Any]
"""One mlx-lm cache object a layer."""


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """What a drafter must know of a target to fit it (None where a checkpoint does not say)."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None = None


_installing = Lock()
_captured: ContextVar[dict[int, mx.array] | None] = ContextVar("captured_taps", default=None)


class Target:
    """An mlx-lm model that also yields its taps and can take rows back.

    A tap is an index into ``[embedding, out_0 … out_{n−1}, final norm]``: 0 is the embedding's
    output, n the last layer's output before the final norm, n+1 the final norm's output.

    Args:
        model: A model as `mlx_lm.load` returns it.
        taps: Which hidden states to capture, in ascending order.

    Raises:
        DriftError: If the model's layers are not where every plain mlx-lm text model has them.
    """

    def __init__(self, model: nn.Module, taps: Sequence[int] = ()):
        self.model = model
        self.taps = tuple(taps)
        self._backbone = _backbone(model)
        row = self.embed(mx.array([0]))
        self.dtype: mx.Dtype = row.dtype  # of the activations, hence of the taps
        self.shape = TargetShape(
            hidden_size=row.shape[-1],
            vocab_size=self._backbone.embed_tokens.weight.shape[0],
            num_layers=len(self._backbone.layers),
        )
        self._install_taps()
        # RoPE tables too, which mlx-lm leaves lazy: another thread may be the first to use them.
        mx.eval(model)

    def make_cache(self) -> Cache:
        """Makes an empty cache for one conversation.

        Raises:
            DriftError: If a layer's cache cannot take back rejected drafts exactly.
        """
        cache = make_prompt_cache(self.model)
        refused = sorted({type(c).__name__ for c in cache if type(c) is not KVCache})
        if refused:
            raise DriftError(
                f"the target ({self.model.model_type}) keeps its state in {', '.join(refused)}; "
                "rejected drafts can be taken back exactly only from KVCache so far. "
                "Use a full-attention target, or generate without a drafter (--no-draft)"
            )
        return cache

    def __call__(self, tokens: mx.array, cache: Cache) -> tuple[mx.array, mx.array]:
        """Feeds M tokens to one conversation.

        Args:
            tokens: Token ids `[M]`.
            cache: The conversation's cache; it grows by M rows.

        Returns:
            Logits `[M, vocabulary]` and the captured states `[M, len(taps), hidden_size]`,
            both lazy and in the model's own dtype.
        """
        with _capture() as captured:
            logits = self.model(tokens[None], cache=cache)
        taps = [self._checked(captured.get(tap), tap, tokens.size) for tap in self.taps]
        return logits[0], mx.stack(taps, axis=1)

    def rollback(self, cache: Cache, rows: int) -> None:
        """Takes back the last `rows` rows, as if they had never been fed."""
        for layer_cache in cache:
            layer_cache.trim(rows)

    def embed(self, tokens: mx.array) -> mx.array:
        """Looks up the embedding rows of token ids `[M]`: `[M, hidden_size]`, unscaled."""
        return self._backbone.embed_tokens(tokens)

    def head(self, states: mx.array) -> mx.array:
        """Maps normed states `[M, hidden_size]` to logits `[M, vocabulary]`."""
        lm_head = self.model.get("lm_head")
        return (
            lm_head(states)
            if lm_head is not None
            else self._backbone.embed_tokens.as_linear(states)
        )

    def _checked(self, state: Any, tap: int, rows: int) -> mx.array:
        """Returns one captured state `[M, hidden_size]`, if that is what the layer gave."""
        expected = (1, rows, self.shape.hidden_size)
        if not isinstance(state, mx.array) or state.shape != expected:
            raise DriftError(
                f"the target's model type {self.model.model_type!r} does not hand a plain hidden "
                f"state from layer to layer, so tap {tap} cannot be captured. Use another target, "
                "or generate without a drafter (--no-draft)"
            )
        return state[0]

    def _install_taps(self) -> None:
        layers = self._backbone.layers
        with _installing:
            for tap in self.taps:
                if tap == 0:
                    _listen(layers[0], lambda inputs, output: inputs, tap)
                elif tap <= len(layers):
                    _listen(layers[tap - 1], lambda inputs, output: output, tap)
                else:
                    _listen(self._backbone.norm, lambda inputs, output: output, tap)


def remove_taps(model: nn.Module) -> None:
    """Gives every tapped module of `model` its own class back."""
    for module in model.modules():
        while hasattr(type(module), "tapped_as"):
            module.__class__ = type(module).__base__


def _listen(module: nn.Module, choose: Callable[[Any, Any], mx.array], tap: int) -> None:
    """Makes one module instance report its input or output as `tap`, once."""
    if any(cls.__dict__.get("tapped_as") == tap for cls in type(module).__mro__):
        return
    cls = type(module)

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, x, *args, **kwargs)
        captured = _captured.get()
        if captured is not None:
            captured[tap] = choose(x, output)
        return output

    module.__class__ = type(cls.__name__, (cls,), {"__call__": call, "tapped_as": tap})


@contextmanager
def _capture() -> Iterator[dict[int, mx.array]]:
    captured: dict[int, mx.array] = {}
    token = _captured.set(captured)
    try:
        yield captured
    finally:
        _captured.reset(token)


def _backbone(model: nn.Module) -> nn.Module:
    """Finds the module that holds `embed_tokens`, `layers` and the final `norm`."""
    backbone = model.get("model")
    if backbone is None or not {"embed_tokens", "layers", "norm"} <= backbone.keys():
        raise DriftError(
            f"the target's model type {getattr(model, 'model_type', '?')!r} is not laid out as "
            "model.embed_tokens, model.layers, model.norm, so its hidden states cannot be tapped "
            "yet. Use a Llama-like target, or generate without a drafter (--no-draft)"
        )
    return backbone
