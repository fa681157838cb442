"""An mlx-lm model seen as tokens in, logits and taps out, with exact rollback.

Notable:
- Taps are captured by giving each tapped layer *instance* a subclass of its own class
  (``module.__class__ = Tapped``). mlx-lm's files stay as they are, the arithmetic is untouched, so
  the logits keep every bit, and `remove_taps` puts the classes back.
- What is captured goes to a context variable that is set only during one forward pass: threads,
  conversations and models in one process do not see each other's taps, and a layer that nobody is
  listening to pays one context look-up.
- A cache is accepted only if a rejected draft can be taken back exactly (`mlx_drift.caches`); the
  rest is refused by name before anything runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_drift.caches import NOT_EXACT, Consumed, TargetCache, exact, parts, recurrent
from mlx_drift.errors import DriftError

EMBEDDINGS = (
    "embed_tokens wte word_embeddings embeddings embedding tok_embeddings token_embeddings "
    "embed_in embed"
).split()
LAYERS = "layers h blocks".split()
NORMS = (
    "norm ln_f norm_f final_norm final_layernorm final_layer_norm embedding_norm output_norm"
).split()
HEADS = "lm_head embed_out output".split()
"""What mlx-lm's model files call the parts of a decoder."""


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """What a drafter must know of a target to fit it (None where a checkpoint does not say)."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None = None


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
        self._backbone, self._parents = _backbone(model)
        self._embedding = _part(self._backbone, EMBEDDINGS)
        self._layers = _layers(self._backbone)
        row = self.embed(mx.array([0]))
        self.dtype: mx.Dtype = row.dtype  # of the activations, hence of the taps
        self.shape = TargetShape(
            hidden_size=row.shape[-1],
            vocab_size=self._embedding.weight.shape[0],
            num_layers=len(self._layers),
        )
        self._install()
        # RoPE tables too, which mlx-lm leaves lazy: another thread may be the first to use them.
        mx.eval(model)

    def make_cache(self) -> TargetCache:
        """Makes an empty cache for one conversation.

        Raises:
            DriftError: If a layer's cache cannot take back rejected drafts exactly.
        """
        if (why := NOT_EXACT.get(self.model.model_type)) is not None:
            raise DriftError(
                f"the target ({self.model.model_type}) cannot be verified exactly: {why}. Use "
                "another target, or generate without a drafter (--no-draft)"
            )
        caches = make_prompt_cache(self.model)
        replaced = [exact(cache) for cache in caches]
        refused = sorted(
            {
                type(part).__name__
                for cache, by in zip(caches, replaced, strict=True)
                if by is None
                for part in parts(cache)
            }
        )
        if refused:
            raise DriftError(
                f"the target ({self.model.model_type}) keeps its state in {', '.join(refused)}, "
                "from which rejected drafts cannot be taken back exactly. Use another target, or "
                "generate without a drafter (--no-draft)"
            )
        return TargetCache(replaced)

    def __call__(self, tokens: mx.array, cache: TargetCache) -> tuple[mx.array, mx.array]:
        """Feeds M tokens to one conversation.

        Args:
            tokens: Token ids `[M]`.
            cache: The conversation's cache; it grows by M rows.

        Returns:
            Logits `[M, vocabulary]` and the captured states `[M, len(taps), hidden_size]`,
            both lazy and in the model's own dtype.
        """
        cache.rows, cache.consumed = 0, []
        with _capture() as captured:
            logits = self.model(tokens[None], cache=cache)
        return logits[0], self._taps(captured, tokens.size)

    def verify(self, tokens: mx.array, cache: TargetCache) -> tuple[mx.array, mx.array]:
        """Feeds M tokens, the last of which `rollback` may take back; as `__call__` else.

        Raises:
            DriftError: If the model keeps a state that cannot be put back.
        """
        with _capture() as captured:
            logits = self.model(tokens[None], cache=cache)
        cache.rows, cache.consumed = tokens.size, captured.consumed
        noted = {id(state) for note in captured.consumed for state, _ in note.states}
        if any(id(state) not in noted for one in cache for state in recurrent(one)):
            raise DriftError(
                f"the target ({self.model.model_type}) keeps a recurrent state outside its layers, "
                "from which rejected drafts cannot be taken back exactly. Use another target, or "
                "generate without a drafter (--no-draft)"
            )
        return logits[0], self._taps(captured, tokens.size)

    def rollback(self, cache: TargetCache, rows: int) -> None:
        """Takes back the last `rows` of those verified last, as if they had never been fed."""
        cache.rollback(rows)

    def embed(self, tokens: mx.array) -> mx.array:
        """Looks up the embedding rows of token ids `[M]`: `[M, hidden_size]`, unscaled."""
        return self._embedding(tokens)

    def head(self, states: mx.array) -> mx.array:
        """Maps normed states `[M, hidden_size]` to logits `[M, vocabulary]`.

        Without a scale or cap the model may put on them, neither of which changes their order.
        """
        for parent in self._parents:
            for name in HEADS:
                if isinstance(parent.get(name), nn.Module):
                    return parent[name](states)
        return self._embedding.as_linear(states)

    def _taps(self, captured: Captured, rows: int) -> mx.array:
        """Stacks the captured states `[M, A, hidden_size]`, if they are what is to be captured."""
        expected = (1, rows, self.shape.hidden_size)
        states = []
        for tap in self.taps:
            state = captured.taps.get(tap)
            if not isinstance(state, mx.array) or state.shape != expected or tap in captured.twice:
                raise DriftError(
                    f"the target's model type {self.model.model_type!r} does not hand a plain "
                    f"hidden state from layer to layer, so tap {tap} cannot be captured. Use "
                    "another target, or generate without a drafter (--no-draft)"
                )
            states.append(state[0])
        return mx.stack(states, axis=1)

    def _install(self) -> None:
        """Makes the tapped layers report, and those of a recurrent model what they consume."""
        layers = self._layers
        is_recurrent = any(recurrent(cache) for cache in make_prompt_cache(self.model))
        with _installing:
            for layer in layers if is_recurrent else ():
                _swap(layer, CONSUMES, _call_that_notes)
            for tap in self.taps:
                if tap == 0:
                    _swap(layers[0], tap, _call_that_reports(tap, _first_argument))
                elif tap <= len(layers):
                    _swap(layers[tap - 1], tap, _call_that_reports(tap, _output))
                else:
                    norm = _part(self._backbone, NORMS)
                    if norm is None:
                        raise DriftError(
                            f"the target's model type {self.model.model_type!r} has no final norm "
                            f"that tap {tap} could read. Use another target, or generate without a "
                            "drafter (--no-draft)"
                        )
                    _swap(norm, tap, _call_that_reports(tap, _output))


def remove_taps(model: nn.Module) -> None:
    """Gives every tapped module of `model` its own class back."""
    for module in model.modules():
        while hasattr(type(module), "tapped_as"):
            module.__class__ = type(module).__base__


CONSUMES = -1  # in place of a tap: the class notes what its layer consumes

Call = Callable[..., Any]
"""A layer's `__call__`, with the layer first."""


def _swap(module: nn.Module, tapped_as: int, wrap: Callable[[Call], Call]) -> None:
    """Gives one module instance a subclass of its class that calls through `wrap`, once."""
    if any(cls.__dict__.get("tapped_as") == tapped_as for cls in type(module).__mro__):
        return
    cls = type(module)
    members = {"__call__": wrap(cls.__call__), "tapped_as": tapped_as}
    module.__class__ = type(cls.__name__, (cls,), members)


def _call_that_reports(tap: int, choose: Callable[..., Any]) -> Callable[[Call], Call]:
    def wrap(inner: Call) -> Call:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = inner(self, *args, **kwargs)
            captured = _captured.get()
            if captured is not None:
                if tap in captured.taps:
                    captured.twice.add(tap)
                captured.taps[tap] = choose(output, *args, *kwargs.values())
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
        return inner(self, *args, **kwargs)

    return call


def _first_argument(output: Any, first: Any, *rest: Any) -> Any:
    return first


def _output(output: Any, *given: Any) -> Any:
    """The hidden state that a layer returns, alone or before what else it returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _capture() -> Iterator[Captured]:
    captured = Captured()
    token = _captured.set(captured)
    try:
        yield captured
    finally:
        _captured.reset(token)


def _part(module: nn.Module, names: Sequence[str]) -> Any:
    """Returns the part of a module under the first of some names that it has."""
    return next((module[name] for name in names if name in module), None)


def _layers(backbone: nn.Module) -> list[nn.Module]:
    """Returns the layers, which some model files keep in a module of their own."""
    layers = _part(backbone, LAYERS)
    return _layers(layers) if isinstance(layers, nn.Module) else layers


def _backbone(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Finds the module that holds embedding, layers and final norm, and what it is in.

    Returns:
        It, and itself with the modules around it, the outermost first.
    """
    around = [[model]]
    while around:
        path = around.pop(0)
        module = path[-1]
        if all(_part(module, names) is not None for names in (EMBEDDINGS, LAYERS)):
            return module, path
        around += [[*path, part] for part in module.values() if isinstance(part, nn.Module)]
    raise DriftError(
        f"the target's model type {getattr(model, 'model_type', '?')!r} has no embedding and "
        "layers side by side, so its hidden states cannot be tapped. Use another target, or "
        "generate without a drafter (--no-draft)"
    )
