"""What tells repetition from healing: how varied a text is, and what copying from it would accept.

A target that repeats itself is easy to draft for, so a head may look better on it than it is.
"""

from collections.abc import Collection, Iterable, Sequence

from mlx_drift.drafters.prompt_lookup import LookupState
from mlx_drift.measure.acceptance.asking import Answer
from mlx_drift.train.held_out import Held, Rounds, rounds
from mlx_drift.train.layout import Text

LEAST_VARIED = 0.5
"""The least share of distinct 4-grams in an answer to learn from: what a small model repeats
without end teaches repeating alone."""


def distinct(answers: Iterable[Sequence[int]]) -> float:
    """Returns the share of distinct 4-grams in answers, each by itself; 1 if there is none."""
    grams = [list(zip(*(answer[i:] for i in range(4)), strict=False)) for answer in answers]
    total = sum(map(len, grams))
    return sum(len({*one}) for one in grams) / total if total else 1.0


def said(texts: Iterable[Text]) -> list[list[int]]:
    """Returns what the assistant says in some texts."""
    return [text.tokens[start:stop] for text in texts for start, stop in text.said]


def varied(texts: Sequence[Text]) -> bool:
    """Tells whether what is said goes on saying new things."""
    return distinct(said(texts)) >= LEAST_VARIED


def replay_lookup(held: Held, steps: int, stops: Collection[int]) -> Answer:
    """Replays the rounds of prompt lookup over all turns of a conversation.

    Arguments and result as of `mlx_drift.train.held_out.replay`.
    """
    prompts: list[int] = []
    found: Rounds = []
    for text in held.texts:
        state, tokens = LookupState(), text.tokens

        def copied(at: int, state: LookupState = state, tokens: list[int] = tokens) -> list[int]:
            state.append(tokens[len(state.tokens) : at])
            return state.copy(steps)

        for start, stop in text.said:
            first = max(start, 2)  # where heads begin
            if first < stop:
                found += rounds(tokens, copied, (first, stop), tokens[stop - 1] in stops)
                prompts.append(start)
    return Answer(tuple(prompts), tuple(found))
