"""mlx-lm's `stream_generate` and `generate`, with `drafter=`.

An app changes one import and adds one keyword. Without a drafter the call goes to mlx-lm itself.
"""

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

from mlx_drift.decode.speculate import prefill, speculate, time_plain_steps
from mlx_drift.decode.statistics import LOW_ACCEPTANCE, Statistics
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.target import Target

MAX_DRAFT_TOKENS = 64
"""More drafts a round than any drafter was ever trained for; a larger number is a mistake."""

ROUNDS_TO_JUDGE = 32
"""Rounds after which a drafter that is hardly ever right is spoken of."""


@dataclass
class DriftResponse(GenerationResponse):
    """mlx-lm's response for one token, plus the statistics of the rounds.

    All responses of one generation share one `statistics`, which grows with the rounds.
    """

    statistics: Statistics = field(default_factory=Statistics)


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int] | mx.array,
    max_tokens: int = 256,
    *,
    drafter: Drafter | None = None,
    num_draft_tokens: int = 3,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    compare_plain: bool = False,
    **kwargs: Any,
) -> Iterator[DriftResponse]:
    """Generates text greedily; with a drafter, token for token what the target alone gives.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids.
        max_tokens: Tokens to generate at most; −1 for no limit.
        drafter: A drafter loaded for this target; None for mlx-lm's own generation.
        num_draft_tokens: Drafts a round, K.
        prefill_step_size: Prompt tokens to process at a time.
        prompt_progress_callback: Called with the prompt tokens processed so far, and all of them.
        compare_plain: After the last token, time a few one-row target steps, rolled back again,
            so that `statistics` tells whether plain decoding would have been faster.
        kwargs: Further keywords of `mlx_lm.stream_generate`, without a drafter only.

    Yields:
        One `DriftResponse` a token, as soon as it is accepted. As in mlx-lm, an end-of-text token
        comes with `finish_reason="stop"` and adds no text. Unlike there, `generation_tps` counts
        from the end of the prompt, since the first round may bring several tokens.

    Raises:
        DriftError: If the prompt is empty, a number is out of range, the drafter was loaded for
            another model, or the target's caches cannot be rolled back.

    Warns:
        DriftWarning: If hardly any draft is accepted.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt)
    if max_tokens == 0 or max_tokens < -1:
        raise DriftError(f"max_tokens is {max_tokens}; expected at least 1, or -1 for no limit")
    progress = prompt_progress_callback or (lambda done, total: None)
    if drafter is None:
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            tokens,
            max_tokens,
            num_draft_tokens=num_draft_tokens,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
            **kwargs,
        ):
            yield DriftResponse(**vars(response))
        return
    if kwargs:
        raise DriftError(
            f"the keyword {sorted(kwargs)[0]!r} is not supported with a drafter yet; "
            "generate without one, or leave it out"
        )
    check_num_draft_tokens(num_draft_tokens)
    if drafter.model is not model:
        raise DriftError(
            "the drafter was loaded for another model than the one to generate with; "
            "load it with load_drafter(path, model)"
        )

    target = Target(model, drafter.taps)
    caches = target.make_cache(), drafter.make_cache()
    statistics = Statistics()
    detokenizer = tokenizer.detokenizer
    count = 0
    with wired_limit([model, drafter.network]):
        start = time.perf_counter()
        prefill(target, drafter, tokens, *caches, step_size=prefill_step_size, progress=progress)
        prompt_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for round in speculate(
            target,
            drafter,
            tokens[-1:],
            *caches,
            num_draft_tokens=num_draft_tokens,
            max_tokens=max_tokens,
            stop_tokens=set(tokenizer.eos_token_ids),
        ):
            if not statistics.rounds:
                progress(tokens.size, tokens.size)
            statistics.record(round.tested, round.accepted, round.seconds)
            if statistics.rounds == ROUNDS_TO_JUDGE:
                _warn_of_low_acceptance(statistics)
            for row, token in enumerate(round.tokens):
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
                    from_draft=row < round.accepted,
                    prompt_tokens=tokens.size,
                    prompt_tps=tokens.size / prompt_seconds,
                    generation_tokens=count,
                    generation_tps=count / (time.perf_counter() - start),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish_reason,
                    statistics=statistics,
                )
        if compare_plain:
            last = mx.array(round.tokens[-1:])
            statistics.plain_step_seconds = time_plain_steps(target, last, caches[0])


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int] | mx.array,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generates a complete response; further keywords are those of `stream_generate`.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids.
        verbose: Print the text as it is accepted, then the speed.
        kwargs: See `stream_generate`.
    """
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print(
            f"\nPrompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec"
        )
        print(
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec"
        )
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return text


def check_num_draft_tokens(num_draft_tokens: int) -> None:
    """Checks K.

    Raises:
        DriftError: If it is no number of drafts that makes sense.
    """
    if not 1 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise DriftError(
            f"num_draft_tokens is {num_draft_tokens}; expected 1 to {MAX_DRAFT_TOKENS} "
            "(to generate without drafts, leave the drafter out: --no-draft)"
        )


def _warn_of_low_acceptance(statistics: Statistics) -> None:
    first = statistics.conditional_acceptance[0]
    if first < LOW_ACCEPTANCE:
        warnings.warn(
            f"only {first:.0%} of the first drafts were accepted in {statistics.rounds} rounds: "
            "the drafter was made for another target, or its conventions are wrong. Convert it "
            "again with --probe-conventions and --target",
            DriftWarning,
            stacklevel=3,
        )


def _encode(tokenizer: TokenizerWrapper, prompt: str | list[int] | mx.array) -> mx.array:
    """Turns a prompt into token ids `[L]`, as mlx-lm does: BoS is added unless the text has it."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=not has_bos) if prompt else []
    tokens = mx.array(prompt, dtype=mx.int32)
    if tokens.size == 0:
        raise DriftError("the prompt is empty; give some text")
    return tokens
