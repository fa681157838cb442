"""Acceptance without decoding: the rounds over a text that the target has said.

Greedy drafts do not change what the target says, so with the text every round is known in advance:
one pass drafts a chain from every position at once, and a round accepts as many drafts of its chain
as are the text. Rounds, and what is counted of them, are those of `mlx_drift.decode.speculate`.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.measure.acceptance.asking import Answer
from mlx_drift.target.model import Target
from mlx_drift.train.layout import Text

Rounds = list[tuple[int, int]]
Draw = Callable[[int], Sequence[int]]
CHUNK = 512


@dataclass(frozen=True)
class Held:
    """A conversation that is held out: what the target said, greedily.

    Attributes:
        source: Where it is from.
        id: Which it is there.
        category: What it is counted with.
        texts: What was said.
    """

    source: str
    id: str
    category: str
    texts: tuple[Text, ...]


def replay(
    target: Target, drafter: ChainDrafter, held: Held, steps: int, stops: Collection[int]
) -> Answer:
    """Replays the rounds over all turns of a conversation.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The drafter.
        held: The conversation.
        steps: Drafts a round, K.
        stops: Tokens that end an answer.
    """
    prompts: list[int] = []
    found: Rounds = []
    for text in held.texts:
        tokens = mx.array(text.tokens, dtype=mx.int32)
        drafts = []
        for draft in drafter.chains(tokens, read_taps(target, tokens[:-1]), steps):
            mx.eval(draft)
            drafts.append(np.array(draft).tolist())
        for start, stop in text.said:
            first = max(start, 2)  # a chain needs a row before it
            if first >= stop:
                continue
            ends = text.tokens[stop - 1] in stops
            chain = functools.partial(_chain, drafts)
            found += rounds(text.tokens, chain, (first, stop), ends)
            prompts.append(start)
    return Answer(tuple(prompts), tuple(found))


def _chain(drafts: Sequence[Sequence[int]], at: int) -> list[int]:
    """Returns the chain of the row that has read the token before a place."""
    return [of_step[at - 2] for of_step in drafts]


def rounds(tokens: Sequence[int], draft: Draw, span: tuple[int, int], ends: bool) -> Rounds:
    """Plays the rounds over a span.

    Args:
        tokens: The whole text.
        draft: Of a place in it, all but the first two in turn, the chain drafted there: the drafts
            of ``tokens[at]`` and what follows.
        span: What is said.
        ends: Whether it ends by itself, by a stop token; else by its length, which is known when
            drafts are made.

    Returns:
        Of each round how many drafts were tested and how many accepted.
    """
    at, stop = span
    found = []
    while at < stop:
        left, chain = stop - at, draft(at)
        k = len(chain) if ends else min(len(chain), left - 1)
        accepted = 0
        while accepted < min(k, left) and chain[accepted] == tokens[at + accepted]:
            accepted += 1
        rows = min(accepted + 1, left)
        found.append((min(accepted + 1, k, rows), accepted))
        at += rows
    return found


def replay_all(
    target: Target,
    drafter: ChainDrafter,
    held: Iterable[Held],
    steps: int,
    stops: Collection[int],
    progress: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Replays several conversations, as `replay` does one."""
    found = []
    for one in held:
        found.append(replay(target, drafter, one, steps, stops))
        progress()
        mx.clear_cache()
    return found


def acceptance_length(answers: Sequence[Answer]) -> float:
    """Returns the accepted drafts a round, of all rounds; 0 if there is none."""
    counts = [accepted for answer in answers for _, accepted in answer.rounds]
    return sum(counts) / len(counts) if counts else 0.0


def read_taps(target: Target, tokens: mx.array) -> mx.array:
    """Runs the target over tokens `[M]`, a piece at a time, and returns its taps `[M, A, T]`."""
    cache, found = target.make_cache(), []
    for start in range(0, tokens.size, CHUNK):
        _, taps = target(tokens[start : start + CHUNK], cache)
        mx.eval(taps, cache.state)
        found.append(taps)
    return mx.concatenate(found)
