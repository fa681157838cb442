"""One answer, a step at a time: the prompt's chunks, then the rounds.

Whoever runs the steps decides when: `stream_generate` one after another, a server in turns with
those of other answers. Between any two of them the caches are whole.
"""

from collections.abc import Collection, Generator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.decode.clock import Clock
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import Cut, speculate
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.text import Round
from mlx_drift.drafters.expecting import ExpectingDrafter


@dataclass(frozen=True)
class Chunk:
    """So many of the prompt's tokens are processed, or were in the cache."""

    done: int
    total: int


def answer(
    prompt_cache: PromptCache,
    prompt: Sequence[int],
    *,
    cut: Cut,
    marks: Collection[int] = (),
    draft_length: DraftLength,
    max_tokens: int,
    stop_tokens: AbstractSet[int],
    sampling: Sampling,
    key: mx.array | None,
    statistics: Statistics,
    clock: Clock | None = None,
    number: int | None = None,
    expected: Sequence[int] = (),
) -> Generator[Chunk | Round]:
    """Reads a prompt and answers it.

    Args:
        prompt_cache: What the conversation has in the caches.
        prompt: Token ids of the whole conversation.
        cut: Says where a chunk of the prompt ends.
        marks: Numbers of tokens after which another prompt may branch off.
        draft_length: Says how many tokens to draft.
        max_tokens: Tokens to commit at most; −1 for no limit.
        stop_tokens: Token ids after which nothing is wanted.
        sampling: What tokens are drawn from.
        key: The randomness, at a temperature above 0.
        statistics: Grows with the rounds.
        clock: What the steps are timed by; see `speculate`.
        number: What `prompt_cache.begin()` returned; None to begin here.
        expected: Token ids that the answer may have, to draft from; it need not.

    Yields:
        A `Chunk` before the first chunk of the prompt and after each, then a `Round` for each
        target pass.
    """
    tokens = list(prompt)
    number = prompt_cache.begin() if number is None else number
    for done in prompt_cache.reading(tokens, cut=cut, marks=marks, number=number):
        yield Chunk(done, len(tokens))
    statistics.record_prompt(prompt_cache.reuse, len(tokens), prompt_cache.reused)
    statistics.cache_bytes = prompt_cache.nbytes
    expecting = None
    if expected:
        expecting = ExpectingDrafter(prompt_cache.drafter, expected, prompt_cache.drafter_cache)
    rounds = speculate(
        prompt_cache.target,
        expecting or prompt_cache.drafter,
        mx.array(tokens[-1:], dtype=mx.int32),
        prompt_cache.target_cache,
        prompt_cache.drafter_cache,
        num_draft_tokens=draft_length,
        max_tokens=max_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        key=key,
        history=tokens,
        clock=clock,
    )
    for round in prompt_cache.follow(rounds, number):
        statistics.record_round(round)
        if expecting is not None:
            statistics.expected = expecting.counts
        yield round
    statistics.cache_bytes = prompt_cache.nbytes
