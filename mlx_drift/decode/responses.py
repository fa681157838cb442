"""mlx-lm's responses, one a token, of an answer with drafts or without."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.answer import Chunk, answer
from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import every
from mlx_drift.decode.statistics import LOW_ACCEPTANCE, Statistics
from mlx_drift.decode.text import Origin
from mlx_drift.decode.tuned import remember
from mlx_drift.errors import DriftWarning

ROUNDS_TO_JUDGE = 32
"""Rounds after which a drafter that is hardly ever right is spoken of."""


@dataclass
class DriftResponse(GenerationResponse):
    """mlx-lm's response for one token, plus who said it and the statistics of the rounds.

    All responses of one generation share one `statistics`, which grows with the rounds.
    """

    origin: Origin = field(default_factory=Origin)
    statistics: Statistics = field(default_factory=Statistics)


def plain_responses(
    model: nn.Module, tokenizer: TokenizerWrapper, tokens: list[int], max_tokens: int, **kwargs: Any
) -> Iterator[DriftResponse]:
    """Yields those of mlx-lm's own generation, which may have a draft model of its own."""
    position = 0
    for response in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens, **kwargs):
        position = position + 1 if response.from_draft else 0
        origin = Origin("draft", position) if position else Origin()
        yield DriftResponse(**vars(response), origin=origin)


def drafted_responses(
    prompt_cache: PromptCache,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    max_tokens: int,
    *,
    draft_length: DraftLength,
    sampling: Sampling,
    key: mx.array | None,
    prefill_step_size: int,
    progress: Callable[[int, int], None],
    compare_plain: bool,
) -> Iterator[DriftResponse]:
    """Yields one response a token, as soon as it is accepted.

    Args:
        prompt_cache: What the conversation has in the caches.
        tokenizer: The target's.
        tokens: Token ids of the whole conversation.
        max_tokens: Tokens to generate at most; −1 for no limit.
        draft_length: Says how many tokens to draft; what it learned is remembered.
        sampling: What tokens are drawn from.
        key: The randomness, at a temperature above 0.
        prefill_step_size: Prompt tokens to process at a time.
        progress: Told the prompt tokens processed so far, and all of them.
        compare_plain: Time a few plain steps after the last token.
    """
    drafter, target = prompt_cache.drafter, prompt_cache.target
    statistics = Statistics(draft_length=draft_length)
    detokenizer = tokenizer.detokenizer
    count, told = 0, False
    with wired_limit([prompt_cache.model, drafter.network]):
        start = time.perf_counter()
        number = prompt_cache.begin()
        steps = answer(
            prompt_cache,
            tokens,
            cut=every(prefill_step_size),
            draft_length=draft_length,
            max_tokens=max_tokens,
            stop_tokens=set(tokenizer.eos_token_ids),
            sampling=sampling,
            key=key,
            statistics=statistics,
            number=number,
        )
        for step in steps:
            if isinstance(step, Chunk):
                progress(step.done, step.total)
                if step.done == step.total - 1:
                    prompt_seconds, start = time.perf_counter() - start, time.perf_counter()
                continue
            round = step
            if not count:
                progress(len(tokens), len(tokens))
            if not round.is_finite and not told:
                told = True
                _warn_of_states_that_are_not_finite(target.dtype)
            if statistics.rounds == ROUNDS_TO_JUDGE and not round.is_plain and not told:
                _warn_of_low_acceptance(statistics)
            for row, (token, origin) in enumerate(zip(round.tokens, round.origins, strict=True)):
                count += 1
                finish_reason = None
                if token in tokenizer.eos_token_ids:
                    finish_reason = "stop"
                else:
                    detokenizer.add_token(token)
                    if count == max_tokens:
                        finish_reason = "length"
                if finish_reason is not None:
                    detokenizer.finalize()
                yield DriftResponse(
                    text=detokenizer.last_segment,
                    token=token,
                    logprobs=round.log_probabilities[row],
                    from_draft=origin.by != "target",
                    origin=origin,
                    prompt_tokens=len(tokens),
                    prompt_tps=statistics.prompt_tokens / prompt_seconds,
                    generation_tokens=count,
                    generation_tps=count / (time.perf_counter() - start),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish_reason,
                    statistics=statistics,
                )
        seconds = draft_length.costs.known().get(PLAIN)
        if compare_plain and not draft_length.costs.is_settled(PLAIN):
            timed = target.ranks.exchange(prompt_cache.time_plain(round.tokens[-1], number))[0]
            if timed is not None:
                draft_length.costs.know(PLAIN, timed)
                seconds = timed
        statistics.plain_step_seconds = seconds
        if draft_length.fixed is None:
            remember(drafter, draft_length)


def _warn_of_states_that_are_not_finite(dtype: mx.Dtype) -> None:
    why = (
        "they leave the range of float16, in which the target runs: use it in bfloat16 (mlx_lm "
        "convert --dtype bfloat16)"
        if dtype == mx.float16
        else "its weights may hold NaN, which mlx-drift convert tells; convert it again"
    )
    warnings.warn(
        f"the drafter's states are not finite, so that its drafts mean nothing: {why}",
        DriftWarning,
        stacklevel=3,
    )


def _warn_of_low_acceptance(statistics: Statistics) -> None:
    if not statistics.conditional_acceptance:  # nothing was ever drafted
        return
    first = statistics.conditional_acceptance[0]
    if first < LOW_ACCEPTANCE:
        warnings.warn(
            f"only {first:.0%} of the first drafts were accepted in {statistics.rounds} rounds: "
            "the drafter does not suit this target or this text. If it is a head made for it, its "
            "conventions may be wrong: convert it again with --probe-conventions and --target",
            DriftWarning,
            stacklevel=3,
        )
