"""Logits processors that make an answer say something: the end of reasoning, the start of a call.

Both keep nothing from call to call (`mlx_drift.decode.stateless`): what they force is reckoned from
the tokens so far, on the device, so that a round asks about all its drafts without waiting.
"""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.fork import LogitsProcessor
from mlx_drift.serve.calls import format_of
from mlx_drift.serve.said import Speech


class ThinkingBudget:
    """Ends reasoning that has taken so many tokens of the answer.

    Args:
        prompt: Tokens of the prompt.
        budget: Tokens of the answer within which reasoning must have ended by itself.
        start: The tokens that begin reasoning; none if the prompt ends within it.
        end: The tokens that end it.
    """

    stateless = True

    def __init__(self, prompt: int, budget: int, start: Sequence[int], end: Sequence[int]):
        self.prompt = prompt
        self.budget = budget + len(start)
        self.start = tuple(start)
        self.end = tuple(end)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Maps tokens `[n]` and logits `[1, V]` to logits."""
        said = tokens[self.prompt :]
        at = said.size - self.budget  # how many of the end's tokens were forced
        if not 0 <= at < len(self.end):
            return logits
        is_open = mx.logical_not(mx.any(matches(said, self.end)))
        if self.start:
            is_open = mx.logical_and(is_open, mx.any(matches(said, self.start)))
        return mx.where(is_open, only(self.end[at], logits), logits)


class Opening:
    """Makes an answer begin with some tokens, after its reasoning if the prompt ends within that.

    Args:
        prompt: Tokens of the prompt.
        tokens: What the answer must begin with.
        after: The tokens that end reasoning; none if there is none under way.
    """

    stateless = True

    def __init__(self, prompt: int, tokens: Sequence[int], after: Sequence[int] = ()):
        self.prompt = prompt
        self.tokens = mx.array(list(tokens))
        self.after = tuple(after)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Maps tokens `[n]` and logits `[1, V]` to logits."""
        said = tokens[self.prompt :]
        if not self.after:
            if said.size >= self.tokens.size:
                return logits
            return only(self.tokens[said.size], logits)
        ends = matches(said, self.after)
        if not ends.size:
            return logits
        at = said.size - (mx.argmax(ends) + len(self.after))  # tokens since reasoning ended
        is_within = mx.logical_and(mx.any(ends), at < self.tokens.size)
        forced = self.tokens[mx.clip(at, 0, self.tokens.size - 1)]
        return mx.where(is_within, only(forced, logits), logits)


def matches(tokens: mx.array, sequence: Sequence[int]) -> mx.array:
    """Tells where a sequence begins among tokens `[n]`: booleans `[n - len(sequence) + 1]`."""
    count = tokens.size - len(sequence) + 1
    if count <= 0:
        return mx.zeros((0,), mx.bool_)
    found = mx.ones((count,), mx.bool_)
    for i, token in enumerate(sequence):
        found = mx.logical_and(found, tokens[i : i + count] == token)
    return found


def only(token: int | mx.array, logits: mx.array) -> mx.array:
    """Forbids every token but one."""
    ids = mx.arange(logits.shape[-1])
    return mx.where(ids == token, 0.0, -mx.inf).astype(logits.dtype)[None]


def steering(
    tokenizer: TokenizerWrapper, speech: Speech | None, prompt: int
) -> list[LogitsProcessor]:
    """Returns the processors that an answer's speech asks for.

    Args:
        tokenizer: The target's.
        speech: How the answer is told apart.
        prompt: Tokens of the prompt.
    """
    processors: list[LogitsProcessor] = []
    if speech is None:
        return processors
    end = tokenizer.think_end_tokens or ()
    if speech.thinking_budget is not None and end:
        start = () if speech.begins_in_reasoning else tokenizer.think_start_tokens
        processors.append(ThinkingBudget(prompt, speech.thinking_budget, start, end))
    if speech.must_call is not None:
        opening = tokenizer.tool_call_start
        if speech.must_call:
            opening += format_of(tokenizer).opening.replace("{name}", speech.must_call)
        tokens = tokenizer.encode(opening, add_special_tokens=False)
        processors.append(Opening(prompt, tokens, end if speech.begins_in_reasoning else ()))
    return processors
