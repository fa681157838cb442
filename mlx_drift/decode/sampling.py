"""How tokens are chosen: mlx-lm's samplers as distributions, for the target and its drafter alike.

Rejection sampling needs to know the probabilities that tokens are drawn with, not only the tokens.
So what mlx-lm's `make_sampler` draws from is written here as log-probabilities: its own filters in
its own order (top-p, min-p, XTC, top-k), then the temperature.

Notable:
- XTC tosses a coin a position. The target and the drafter see the same coin: given the coin,
  acceptance is exact for what the target would draw under it, hence also without knowing it.
- Greedy decoding is temperature 0 of all this: the likeliest token, with certainty.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    make_sampler,
)

from mlx_drift.decode.fork import LogitsProcessor
from mlx_drift.decode.stateless import is_stateless
from mlx_drift.errors import DriftError

Sampler = Callable[[mx.array], mx.array]
"""Maps log-probabilities `[1, V]` to a token `[1]`, as mlx-lm's do."""


LIMITS = (
    ("temp", 0, 100_000),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("min_tokens_to_keep", 1, 1 << 31),
    ("top_k", 0, 1 << 31),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 0.5),
)
COLDEST = 1e-4
"""The lowest temperature above 0: lower ones divide log-probabilities out of float32."""


@dataclass(frozen=True)
class Sampling:
    """What tokens are drawn from; the keywords of mlx-lm's `make_sampler`.

    Attributes:
        temp: Temperature; 0 for the likeliest token.
        top_p: Keep the likeliest tokens that make up this mass; 0 or 1 for all.
        min_p: Keep tokens at least this likely, in parts of the likeliest.
        min_tokens_to_keep: Tokens that `min_p` cannot remove.
        top_k: Keep so many of the likeliest tokens; 0 for all.
        xtc_probability: How often XTC removes the likeliest tokens but one.
        xtc_threshold: What a token must reach for XTC to see it.
        xtc_special_tokens: Tokens that XTC never removes.
        logits_processors: What is done to logits first.
        sampler: Draws the target's tokens instead of all this. Nothing is known of its
            probabilities, so a draft is accepted if it is what the target drew: the same
            distribution, lower acceptance.

    Raises:
        DriftError: If a value is out of range.
    """

    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        """Refuses what mlx-lm would refuse in the middle of a generation, or not at all."""
        for name, least, most in LIMITS:
            value = getattr(self, name)
            kinds = (int,) if name in ("top_k", "min_tokens_to_keep") else (int, float)
            if not isinstance(value, kinds) or not least <= value <= most:
                what = "a whole number " if kinds == (int,) else ""
                raise DriftError(f"{name} is {value}; expected {what}from {least} to {most}")
        if 0 < self.temp < COLDEST:
            raise DriftError(f"temp is {self.temp}; expected 0, or at least {COLDEST:g}")
        if self.sampler is not None:
            names = ("temp", "top_p", "min_p", "top_k", "xtc_probability")
            given = {name: getattr(self, name) for name in names}
            if both := [n for n, value in given.items() if value and (n, value) != ("top_p", 1)]:
                raise DriftError(f"both {both[0]} and sampler are given; give one of them")

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens cannot be drawn, which depends on how likely they are."""
        return bool(0 < self.top_p < 1 or self.min_p or self.xtc_probability or self.top_k)

    @property
    def is_random(self) -> bool:
        """Whether tokens are drawn from a known distribution."""
        return self.temp > 0

    @cached_property
    def processors_have_state(self) -> bool:
        """Whether a processor must see position after position, in order."""
        return not all(map(is_stateless, self.logits_processors))

    @cached_property
    def has_state(self) -> bool:
        """Whether a processor or the sampler must."""
        sampler_has = self.sampler is not None and not is_stateless(self.sampler)
        return self.processors_have_state or sampler_has

    def as_sampler(self) -> Sampler:
        """Returns the sampler of mlx-lm that draws from the same."""
        if self.sampler is not None:
            return self.sampler

        def draw(log_probabilities: mx.array) -> mx.array:
            fitted = self._fitted(log_probabilities.shape[-1])
            return make_sampler(
                fitted.temp,
                fitted.top_p,
                fitted.min_p,
                fitted.min_tokens_to_keep,
                fitted.top_k,
                fitted.xtc_probability,
                fitted.xtc_threshold,
                list(fitted.xtc_special_tokens),
            )(log_probabilities)

        return draw

    def log_distribution(self, log_probabilities: mx.array, coins: mx.array) -> mx.array:
        """Returns what tokens are drawn from, at a temperature above 0.

        Args:
            log_probabilities: `[M, V]`, after the logits processors; logits will do where nothing
                is filtered.
            coins: Uniform in [0, 1), one a row, `[M]`: XTC's.

        Returns:
            Log-probabilities `[M, V]` float32; minus infinity where a token cannot be drawn.
        """
        x, fitted = log_probabilities, self._fitted(log_probabilities.shape[-1])
        if 0 < self.top_p < 1:
            x = apply_top_p(x, self.top_p)
        if self.min_p:
            x = apply_min_p(x, self.min_p, fitted.min_tokens_to_keep)
        if self.xtc_probability:
            special = list(fitted.xtc_special_tokens)
            without_top = apply_xtc(x, 1.0, self.xtc_threshold, special)
            x = mx.where(coins[:, None] > self.xtc_probability, x, without_top)
        if fitted.top_k:
            x = apply_top_k(x, fitted.top_k)
        x = x.astype(mx.float32) * (1 / self.temp)
        return x - mx.logsumexp(x, axis=-1, keepdims=True)

    def _fitted(self, vocabulary: int) -> "Sampling":
        """Returns what means the same in a vocabulary of this size.

        mlx-lm raises there, in a compiled function that leaves mlx's random state broken; or MLX
        writes where no token is.
        """
        special = all(0 <= token < vocabulary for token in self.xtc_special_tokens)
        if self.top_k < vocabulary and self.min_tokens_to_keep <= vocabulary and special:
            return self
        return replace(
            self,
            top_k=self.top_k if self.top_k < vocabulary else 0,
            min_tokens_to_keep=min(self.min_tokens_to_keep, vocabulary),
            xtc_special_tokens=tuple(t for t in self.xtc_special_tokens if 0 <= t < vocabulary),
        )


GREEDY = Sampling()
