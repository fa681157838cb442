"""The logits processor that holds an answer to a grammar, and foresees what it forces.

Notable:
- What it answers depends on the text alone, so it counts as stateless: a round may ask about all
  its drafts at once. The matcher is a cache of the way there: where a text parts from the one that
  was asked about before, it is rolled back.
- A draft that the grammar forbids is refused in its own place; what is said of the places after it
  does not matter, and is nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_drift.errors import DriftError
from mlx_drift.grammar.vocabulary import Thought

FURTHEST = 128
"""Tokens at its end in which a text may differ from the one before: more than drafts are many."""


@dataclass(frozen=True)
class Place:
    """Where a text stands.

    Attributes:
        phase: `opening`: at the beginning, or within the tokens that open the reasoning;
            `thinking`: within the reasoning; `following`: within what the grammar describes;
            `over`: after all that, and a token that ends a text; `off`: after a token that may not
            come.
        done: Tokens of this phase so far; `thinking` does not count them.
    """

    phase: Literal["opening", "thinking", "following", "over", "off"]
    done: int = 0


THINKING, OVER, OFF = Place("thinking"), Place("over"), Place("off")


class GrammarProcessor:
    """Lets only those tokens come that a grammar allows, in one answer.

    Args:
        matcher: llguidance's, at the grammar's beginning.
        prompt: Token ids of what is answered.
        thought: How reasoning is marked, which comes before; None if there is none.
        stops: Token ids that end a text; none comes before the grammar allows it.
        size: Tokens of the tokenizer; a model may have more, which stand for nothing.
    """

    stateless = True

    def __init__(
        self,
        matcher: Any,
        prompt: Sequence[int],
        *,
        thought: Thought | None,
        stops: frozenset[int],
        size: int,
    ):
        self._matcher = matcher
        self._thought = thought
        self._stops = stops
        self._size = size
        self._begin = len(prompt)
        self._answer: list[int] = []
        # Before each token of the answer, and after the last.
        self._places = [_first(prompt, thought)]

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Sets the logits of what may not come to minus infinity.

        Args:
            tokens: All tokens so far, the prompt's included, `[n]`.
            logits: `[1, V]`.

        Raises:
            DriftError: If llguidance gives up.
        """
        place = self._go_to(tokens)
        if place in (OVER, OFF):
            return logits
        allowed = self._allowed(place, logits.shape[-1])
        return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))

    def forced(self, tokens: mx.array) -> list[int]:
        """Returns what must come next, as the tokenizer would write it: none if there is a choice.

        The grammar may allow the same text in other tokens.

        Args:
            tokens: All tokens so far, `[n]`.
        """
        place = self._go_to(tokens)
        if place.phase == "opening" and place.done:
            assert self._thought is not None
            return [*self._thought.start[place.done :]]
        if place in (THINKING, OVER, OFF):
            return []
        return [*self._matcher.compute_ff_tokens()]

    def count_possible(self, tokens: mx.array, drafts: Sequence[int]) -> int:
        """Returns how many of the drafts may come, up to the first that may not.

        Args:
            tokens: All tokens so far, `[n]`.
            drafts: The token ids to follow them.
        """
        self._go_to(tokens)
        for count, draft in enumerate(drafts):
            self._append(draft)
            if self._places[-1] == OFF:
                return count
        return len(drafts)

    def _go_to(self, tokens: mx.array) -> Place:
        """Follows a text to its end, and returns where it stands."""
        end = tokens.size - self._begin
        first = max(0, min(len(self._answer), end) - FURTHEST)
        # Read as they lie: to cut them on the device would take another turn there.
        fresh: Any = np.array(tokens, copy=False)[self._begin + first :].tolist()
        pairs = zip(self._answer[first:], fresh, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._go_back(first + common)
        for token in fresh[common:]:
            self._append(token)
        return self._places[-1]

    def _append(self, token: int) -> None:
        place = self._after(self._places[-1], token)
        self._answer.append(token)
        self._places.append(place)

    def _after(self, place: Place, token: int) -> Place:
        """Returns where a token leads; the matcher follows it there."""
        if place in (OVER, OFF) or token >= self._size:
            return OFF
        if place == THINKING:
            assert self._thought is not None
            end = self._thought.end
            if token in self._stops:
                return OFF
            is_over = _ends_with([*self._answer[-len(end) :], token], end)
            return Place("following") if is_over else THINKING
        if place.phase == "opening":
            assert self._thought is not None
            start = self._thought.start
            if token == start[place.done]:
                done = place.done + 1
                return THINKING if done == len(start) else Place("opening", done)
            if place.done:
                return OFF
        if self._matcher.try_consume_tokens([token]):
            return Place("following", place.done + 1)
        is_over = token in self._stops and self._matcher.is_stopped()
        return OVER if is_over else OFF

    def _go_back(self, length: int) -> None:
        """Goes back to when the answer had so many tokens."""
        if length == len(self._answer):
            return
        gone = self._places[length + 1 :]
        if taken := sum(place.phase == "following" and place.done > 0 for place in gone):
            self._matcher.rollback(taken)
        del self._answer[length:], self._places[length + 1 :]

    def _allowed(self, place: Place, size: int) -> mx.array:
        """Returns which of the model's tokens may come, `[V]` bool."""
        if place == THINKING:
            return _without(self._stops, size)
        if place.phase == "opening" and place.done:
            assert self._thought is not None
            return mx.arange(size) == self._thought.start[place.done]
        allowed = _bits(self._matcher.compute_bitmask(), size)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise DriftError(f"the grammar cannot be followed any further: {reason}")
        if place.phase == "opening":
            assert self._thought is not None
            allowed = allowed | (mx.arange(size) == self._thought.start[0])
        return allowed


def _first(prompt: Sequence[int], thought: Thought | None) -> Place:
    """Returns where a prompt leaves off: a chat template may open the reasoning, or close it.

    What comes before the last token that stands for no text is of another turn, whatever a user
    wrote there.
    """
    if thought is None:
        return Place("following")
    longest = max(len(thought.start), len(thought.end))
    for end in range(len(prompt), 0, -1):
        last = prompt[max(0, end - longest) : end]
        if _ends_with(last, thought.end):
            return Place("following")
        if _ends_with(last, thought.start):
            return THINKING
        if last[-1] in thought.added:
            break
    return Place("opening")


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return tuple(tokens[-len(end) :]) == tuple(end)


@lru_cache(maxsize=16)
def _without(tokens: frozenset[int], size: int) -> mx.array:
    allowed = np.ones(size, np.bool_)
    allowed[[token for token in tokens if token < size]] = False
    return mx.array(allowed)


def _bits(mask: bytes, size: int) -> mx.array:
    """Unpacks a mask of one bit a token, the lowest first, to `[size]` bool."""
    words = mx.array(np.frombuffer(mask, np.uint8))
    bits = ((words[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1).astype(mx.bool_).reshape(-1)
    return bits[:size] if bits.size >= size else mx.pad(bits, (0, size - bits.size))
