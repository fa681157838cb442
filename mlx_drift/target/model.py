"""An mlx-lm model seen as tokens in, logits and taps out, with exact rollback.

Notable:
- Taps are captured by the layers themselves (`mlx_drift.target.taps`).
- A cache is accepted only if a rejected draft can be taken back exactly
  (`mlx_drift.target.caches`); the rest is refused by name before anything runs.
- Of a pipeline a rank has some layers; taps of the others are handed round. That collective waits
  for the logits, so that it comes after the model's own on every rank.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_drift.errors import DriftError, DriftWarning, brief
from mlx_drift.ranks.cut import stage_of
from mlx_drift.ranks.world import ranks_of
from mlx_drift.target.caches import NOT_EXACT, KVQuantization, TargetCache, exact
from mlx_drift.target.parts import (
    EMBEDDINGS,
    HEADS,
    NORMS,
    find_backbone,
    find_layers,
    find_part,
)
from mlx_drift.target.recurrent import INSTEAD, recurrent
from mlx_drift.target.rewind import parts
from mlx_drift.target.sliding import SlidingKVCache
from mlx_drift.target.taps import Captured, capture, note_consumed, report
from mlx_drift.target.tree import Tree, on_tree

SCALES = {"logit_scale": 1, "output_multiplier": 1, "logits_scaling": -1}
"""What configs call the factor of all logits (Cohere, Muse Glimmer, Granite), and its power."""

CAP = "final_logit_softcapping"
"""What configs call the cap of all logits (Gemma)."""

TINY = 1e-3
"""No final norm's gains are all below."""

SINKS = 4
"""The first rows that mlx-lm keeps under `max_kv_size`."""


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """What a drafter must know of a target to fit it (None where a checkpoint does not say)."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None = None


class Target:
    """An mlx-lm model that also yields its taps and can take rows back.

    A tap is an index into ``[embedding, out_0 … out_{n−1}, final norm]``: 0 is the embedding's
    output, n the last layer's output before the final norm, n+1 the final norm's output.

    Args:
        model: A model as `mlx_lm.load` returns it.
        taps: Which hidden states to capture, in ascending order.
        lazy: Do not compute the model's arrays: for questions that their shapes answer.

    Raises:
        DriftError: If the model's layers are not where every plain mlx-lm text model has them.
    """

    def __init__(self, model: nn.Module, taps: Sequence[int] = (), *, lazy: bool = False):
        self.model = model
        self.taps = tuple(taps)
        self.ranks = ranks_of(model)
        self._stage = stage_of(model)
        self._backbone, self._parents = find_backbone(model)
        self._embedding = find_part(self._backbone, EMBEDDINGS)
        self._layers = find_layers(self._backbone)
        row = self.embed(mx.array([0]))
        self.dtype: mx.Dtype = row.dtype  # of the activations, hence of the taps
        self.shape = TargetShape(
            hidden_size=row.shape[-1],
            vocab_size=self._embedding.weight.shape[0],
            num_layers=self._stage.layers if self._stage else len(self._layers),
        )
        self._install()
        # RoPE tables too, which mlx-lm leaves lazy: another thread may be the first to use them.
        if not lazy:
            mx.eval(model)

    def make_cache(
        self, *, max_kv_size: int | None = None, quantization: KVQuantization | None = None
    ) -> TargetCache:
        """Makes an empty cache for one conversation.

        Args:
            max_kv_size: Rows to keep at most, the first four and the last ones, where the model
                does not make caches of its own (as in mlx-lm).
            quantization: Whether and how to quantize keys and values.

        Raises:
            DriftError: If a layer's cache cannot take back rejected drafts exactly, or mlx-lm
                cannot quantize it.

        Warns:
            DriftWarning: If the model makes its own caches, so that `max_kv_size` changes nothing.
        """
        if (why := NOT_EXACT.get(self.model.model_type)) is not None:
            raise DriftError(
                f"the target ({self.model.model_type}) cannot be verified exactly: {why}. {INSTEAD}"
            )
        if max_kv_size is not None and max_kv_size <= SINKS:
            raise DriftError(f"max_kv_size is {max_kv_size}; expected more than {SINKS}")
        if max_kv_size is not None and hasattr(self.model, "make_cache"):
            warnings.warn(
                f"max_kv_size changes nothing: the target ({self.model.model_type}) makes its own "
                "caches",
                DriftWarning,
                stacklevel=2,
            )
        caches = make_prompt_cache(self.model, max_kv_size)
        replaced = [exact(cache) for cache in caches]
        refused = [cache for cache, by in zip(caches, replaced, strict=True) if by is None]
        if refused:
            raise DriftError(
                f"the target ({self.model.model_type}) keeps its state in {_kinds(refused)}, from "
                f"which rejected drafts cannot be taken back exactly. {INSTEAD}"
            )
        if quantization is not None:
            self._check_quantization(quantization, replaced)
        return TargetCache(replaced, quantization)

    def _check_quantization(self, quantization: KVQuantization, caches: list[Any]) -> None:
        """Checks that the model runs on quantized keys and values, without computing anything."""
        model_type = self.model.model_type
        sliding = [c for c in caches if any(isinstance(p, SlidingKVCache) for p in parts(c))]
        if sliding:
            raise DriftError(
                f"kv_bits: the target ({model_type}) keeps a sliding window of keys and values "
                "(RotatingKVCache), which mlx-lm cannot quantize. Leave kv_bits out"
            )
        if not any(hasattr(cache, "to_quantized") for cache in caches):
            raise DriftError(
                f"kv_bits: the target ({model_type}) keeps its state in {_kinds(caches)}, which "
                "mlx-lm does not quantize. Leave kv_bits out"
            )
        if quantization.start < 0 or not 1 <= quantization.group_size <= 1024:
            raise DriftError(
                f"quantized_kv_start is {quantization.start} and kv_group_size "
                f"{quantization.group_size}; expected at least 0, and a group size that mlx has"
            )
        trial = TargetCache(
            [exact(c) for c in make_prompt_cache(self.model)], replace(quantization, start=0)
        )
        try:
            for rows in (1, 2):  # lazy: shapes and types are checked, nothing is computed
                self.model(mx.zeros((1, rows), mx.int32), cache=trial)
                trial.quantize()
        except Exception as error:  # whatever a model file raises that was not written for it
            raise DriftError(
                f"kv_bits = {quantization.bits} with kv_group_size = {quantization.group_size}: "
                f"mlx-lm cannot run the target ({model_type}) on such keys and values "
                f"({brief(str(error))}). Give others, or leave kv_bits out"
            ) from error

    def __call__(self, tokens: mx.array, cache: TargetCache) -> tuple[mx.array, mx.array]:
        """Feeds M tokens to one conversation.

        Args:
            tokens: Token ids `[M]`.
            cache: The conversation's cache; it grows by M rows.

        Returns:
            Logits `[M, vocabulary]` and the captured states `[M, len(taps), hidden_size]`,
            both lazy and in the model's own dtype.
        """
        cache.rows, cache.branched, cache.consumed = 0, False, []
        cache.let_sinks_fade(True)
        with capture() as captured:
            logits = self.model(tokens[None], cache=cache)
        cache.quantize()
        return logits[0], self._taps(captured, tokens.size, logits)

    def verify(
        self, tokens: mx.array, cache: TargetCache, tree: Tree | None = None
    ) -> tuple[mx.array, mx.array]:
        """Feeds M tokens as if one by one; `keep` or `rollback` then says which of them stay.

        Args:
            tokens: Token ids `[M]`, at most `cache.room`.
            cache: The conversation's cache; it grows by M rows.
            tree: How they branch, after `check_trees`; None if they follow one another.

        Returns:
            As `__call__`.

        Raises:
            DriftError: If the model keeps a state that cannot be put back.
        """
        cache.let_sinks_fade(False)
        with capture() as captured, on_tree(cache.parts(), tree):
            logits = self.model(tokens[None], cache=cache)
        cache.rows, cache.branched = tokens.size, tree is not None
        cache.consumed = captured.consumed
        noted = {id(state) for note in captured.consumed for state, _ in note.states}
        states = (state for one in cache for state in recurrent(one)) if self._recurrent else ()
        if any(id(state) not in noted for state in states):
            raise DriftError(
                f"the target ({self.model.model_type}) keeps a recurrent state outside its layers, "
                f"from which rejected drafts cannot be taken back exactly. {INSTEAD}"
            )
        return logits[0], self._taps(captured, tokens.size, logits)

    def rollback(self, cache: TargetCache, rows: int) -> None:
        """Takes back the last `rows` of those verified last, as if they had never been fed."""
        cache.rollback(rows)
        cache.quantize()

    def keep(self, cache: TargetCache, path: Sequence[int]) -> None:
        """Keeps of the rows verified last those of a path, as if no others had been fed."""
        cache.keep(path)
        cache.quantize()

    def embed(self, tokens: mx.array) -> mx.array:
        """Looks up the embedding rows of token ids `[M]`: `[M, hidden_size]`, unscaled."""
        return self._embedding(tokens)

    @property
    def head_quantization(self) -> tuple[int, int, str] | None:
        """Group size, bits and mode of the head; None if it is not quantized."""
        head = self._embedding if self._own_head is None else self._own_head
        return (head.group_size, head.bits, head.mode) if "scales" in head else None

    @cached_property
    def _own_head(self) -> Any:
        """The head; None if it is the embedding."""
        found = (parent.get(name) for parent in self._parents for name in HEADS)
        return next((part for part in found if isinstance(part, nn.Module)), None)

    def head(self, states: mx.array) -> mx.array:
        """Maps normed states `[M, hidden_size]` to logits `[M, vocabulary]`.

        Without a scale or cap the model may put on them, neither of which changes their order.
        """
        head = self._own_head
        logits = self._embedding.as_linear(states) if head is None else head(states)
        is_part = self.ranks.size > 1 and logits.shape[-1] < self.shape.vocab_size
        return self.ranks.join_columns(logits) if is_part else logits

    def logits(self, states: mx.array) -> mx.array:
        """Maps as `head` does, with the scale and the cap that the model puts on its logits.

        For what adds to them: neither changes their order, but both change what is added to.
        """
        logits = self.head(states)
        for name, power in SCALES.items():
            if (scale := self._setting(name)) is not None:
                logits = logits * scale**power
        cap = self._setting(CAP)
        return mx.tanh(logits / cap) * cap if cap else logits

    def _setting(self, name: str) -> float | None:
        """Returns a number of the model's config; None if there is none of that name."""
        parts = (*self._parents, self._backbone)
        holders = (getattr(part, kind, None) for part in parts for kind in ("args", "config"))
        found = (getattr(holder, name, None) for holder in holders)
        return next((value for value in found if isinstance(value, int | float)), None)

    def final_gain(self) -> mx.array:
        """Returns what the final norm makes of ones, `[hidden_size]`: its gain, however it is kept.

        Ones where it makes nothing of them, as a norm does that takes the mean away.
        """
        ones = mx.ones((1, self.shape.hidden_size), self.dtype)
        norm = find_part(self._backbone, NORMS)
        gain = ones[0] if norm is None else norm(ones)[0]
        return gain if mx.any(mx.abs(gain) > TINY).item() else ones[0]

    def _taps(self, captured: Captured, rows: int, logits: mx.array) -> mx.array:
        """Stacks the captured states, `[M, A, hidden_size]`, and checks that none is missing."""
        expected = (1, rows, self.shape.hidden_size)
        if not self.taps:
            return mx.zeros((rows, 0, self.shape.hidden_size), self.dtype)
        states = []
        for tap in self.taps:
            if self._is_elsewhere(tap):
                states.append(mx.zeros(expected[1:], self.dtype))
                continue
            state = captured.taps.get(tap)
            if not isinstance(state, mx.array) or state.shape != expected or tap in captured.twice:
                raise DriftError(
                    f"the target's model type {self.model.model_type!r} does not hand a plain "
                    f"hidden state from layer to layer, so tap {tap} cannot be captured. {INSTEAD}"
                )
            states.append(state[0])
        stacked = mx.stack(states, axis=1)
        return stacked if self._stage is None else self.ranks.sum(mx.depends(stacked, logits))

    def _is_elsewhere(self, tap: int) -> bool:
        """Tells whether another rank of a pipeline has to bring a tap."""
        if self._stage is None:
            return False
        if tap > self._stage.layers:
            return self.ranks.rank != 0  # all have the final norm, and one of them is enough
        return not self._stage.start <= max(tap - 1, 0) < self._stage.end

    def _install(self) -> None:
        """Makes the tapped layers report, and those of a recurrent model what they consume."""
        layers = self._layers
        self._recurrent = any(recurrent(cache) for cache in make_prompt_cache(self.model))
        if self._recurrent:
            note_consumed(filter(None, layers))
        for tap in self.taps:
            if self._is_elsewhere(tap):
                continue
            if tap == 0:
                report(layers[0], tap, "first argument")
            elif tap <= len(layers):
                report(layers[tap - 1], tap, "output")
            else:
                norm = find_part(self._backbone, NORMS)
                if norm is None:
                    raise DriftError(
                        f"the target's model type {self.model.model_type!r} has no final norm "
                        f"that tap {tap} could read. {INSTEAD}"
                    )
                report(norm, tap, "output")


def _kinds(caches: list[Any]) -> str:
    """Names the kinds of some caches."""
    return ", ".join(sorted({type(part).__name__ for cache in caches for part in parts(cache)}))
