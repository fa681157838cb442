"""Asking questions through drafters, and what is kept of the answers: their rounds.

Notable:
- Several drafters are asked the same prompts. The target reads a prompt once for all of them.
- What a conversation goes on with is the answer through the first of them. Greedily all answers are
  the same anyway, near-ties in low precision aside.
- Answers are a question's whole conversation, all turns added up: the unit of every interval.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.trees import drafting
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.generate import check_num_draft_tokens, stream_generate
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.model import Target


@dataclass(frozen=True)
class Settings:
    """How answers are generated; the names and meanings are those of `stream_generate`."""

    num_draft_tokens: int = 4
    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0
    prefill_step_size: int = 2048
    tree: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one drafter did in one conversation.

    Attributes:
        prompt_tokens: Tokens of each turn's prompt.
        rounds: Of each round of all turns, how many drafts were tested and how many accepted
            (`mlx_drift.decode.statistics` says what these words mean).
        ranks: Of trees: a level, from 0, which of its drafts was accepted, from 1, or 0 for none,
            and how often.
    """

    prompt_tokens: tuple[int, ...] = ()
    rounds: tuple[tuple[int, int], ...] = ()
    ranks: tuple[tuple[int, int, int], ...] = ()


Answers = dict[str, dict[str, Answer]]
"""Of one question: by condition, by drafter."""


def ask(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafters: Mapping[str, Drafter],
    question: Question,
    wording: Wording,
    settings: Settings,
) -> dict[str, Answer]:
    """Asks all turns of a question through each of some drafters.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafters: Drafters loaded for it, by name.
        question: The question.
        wording: How it is laid out.
        settings: How answers are generated.

    Returns:
        The answers by drafter.

    Raises:
        DriftError: If a setting is out of range, or a drafter does not fit.
    """
    texts: list[str] = []
    found = dict.fromkeys(drafters, Answer())
    for number, turn in enumerate(question.turns):
        texts.append(turn)
        prompt = wording.encode(tokenizer, texts, question.system_prompt)
        seed = question_seed(settings.seed, question, number)
        said, answers = answer(model, tokenizer, drafters, prompt, settings, seed)
        texts.append(said)
        found = {
            name: Answer(
                before.prompt_tokens + now.prompt_tokens,
                before.rounds + now.rounds,
                before.ranks + now.ranks,
            )
            for (name, before), now in zip(found.items(), answers.values(), strict=True)
        }
    return found


def answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafters: Mapping[Any, Drafter],
    prompt: list[int],
    settings: Settings,
    seed: int = 0,
) -> tuple[str, dict[Any, Answer]]:
    """Answers one prompt, token ids, through each of some drafters.

    Returns:
        The text of the first one's answer, and the answers by drafter.

    Raises:
        DriftError: If a setting is out of range, or a drafter does not fit.
    """
    check_num_draft_tokens(settings.num_draft_tokens)
    texts: list[str] = []
    answers: dict[Any, Answer] = {}
    caches = _read_together(model, list(drafters.values()), prompt, settings.prefill_step_size)
    for (name, drafter), cache in zip(drafters.items(), caches, strict=True):
        text = ""
        rounds: list[tuple[int, int]] = []
        tested = accepted = 0
        for response in stream_generate(
            model,
            tokenizer,
            prompt,
            settings.max_tokens,
            drafter=drafter,
            **drafting(settings.num_draft_tokens, settings.tree),
            temp=settings.temp,
            top_p=settings.top_p,
            min_p=settings.min_p,
            top_k=settings.top_k,
            seed=seed,
            prompt_cache=cache,
        ):
            text += response.text
            counts = response.statistics
            if counts.rounds > len(rounds):  # the first token of a round
                so_far = sum(counts.tested), sum(counts.accepted)
                rounds.append((so_far[0] - tested, so_far[1] - accepted))
                tested, accepted = so_far
        texts.append(text)
        ranks = [
            (level, rank, count)
            for level, by_rank in enumerate(response.statistics.ranks)
            for rank, count in sorted(by_rank.items())
        ]
        answers[name] = Answer((len(prompt),), tuple(rounds), tuple(ranks))
    return texts[0], answers


def _read_together(
    model: nn.Module, drafters: Sequence[Drafter], prompt: list[int], step_size: int
) -> Iterator[PromptCache]:
    """Yields a prompt cache for each drafter, the target having read the prompt once for all.

    What the target's cache holds is the same for all; each gets its own when its turn comes.
    """
    caches = [make_prompt_cache(model, drafter, max_snapshots=0) for drafter in drafters]
    taps = sorted({tap for drafter in drafters for tap in drafter.taps})
    target = Target(model, taps)
    tokens = mx.array(prompt, dtype=mx.int32)
    read, last = target.make_cache(), len(prompt) - 1
    for drafter, cache in zip(drafters, caches, strict=True):
        drafter.start(tokens[:1], cache.drafter_cache)
    for start in range(0, last, step_size):
        stop = min(start + step_size, last)
        _, states = target(tokens[start:stop], read)
        for drafter, cache in zip(drafters, caches, strict=True):
            own = states[:, mx.array([taps.index(tap) for tap in drafter.taps], dtype=mx.int32)]
            drafter.ingest(tokens[start + 1 : stop + 1], own, cache.drafter_cache)
        mx.eval(read.state, [cache.drafter_cache.state for cache in caches])
        mx.clear_cache()
    arrays = read.to_arrays()
    for cache in caches:
        if last:
            cache.target_cache.from_arrays(arrays, last)
            cache.tokens = list(prompt)
        yield cache


def question_seed(seed: int, question: Question, turn: int) -> int:
    """Returns a turn's own seed, whichever other questions are asked."""
    text = f"{seed}/{question.source}/{question.id}/{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
