"""mlx-lm's `stream_generate` and `generate`, with `drafter=`.

An app changes one import and adds one keyword. Without a drafter the call goes to mlx-lm itself.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.arguments import (
    Prompt,
    check_loaded,
    check_vocabulary,
    encode,
    function,
    functions,
    takes_numbers,
    token_ids,
    without_defaults,
)
from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.fork import LogitsProcessor, unforkable
from mlx_drift.decode.one_thread import one_thread_at_a_time
from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.responses import DriftResponse, drafted_responses, plain_responses
from mlx_drift.decode.sampling import Sampler, Sampling
from mlx_drift.decode.trees import check_tree, prepare_trees
from mlx_drift.decode.tuned import tuned_costs
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Drafter
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.ranks.world import Ranks, ranks_of
from mlx_drift.target.caches import KVQuantization
from mlx_drift.target.parts import vocabulary_size

CHAIN = 3
"""Drafts a round where nothing says how many."""


@takes_numbers
@one_thread_at_a_time
def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    drafter: Drafter | None = None,
    num_draft_tokens: int | Literal["auto"] | None = None,
    tree: int | Literal["auto"] | None = None,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] = (),
    seed: int | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    grammar: Grammar | None = None,
    sampler: Sampler | None = None,
    prompt_cache: PromptCache | list[Any] | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = KVQuantization.group_size,
    quantized_kv_start: int = KVQuantization.start,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    compare_plain: bool = False,
    **kwargs: Any,
) -> Iterator[DriftResponse]:
    """Generates text through a drafter, and loses nothing by it.

    Greedily, token for token what the target alone gives; at a temperature above 0, tokens with
    exactly the distribution of those that the target alone gives (rejection sampling).

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids: a list, an array, a batch of one, a tokenizer's result.
        max_tokens: Tokens to generate at most; −1 for no limit.
        drafter: A drafter loaded for this target; None for mlx-lm's own generation.
        num_draft_tokens: Drafts a round, K; or `"auto"`: what pays, learned from the rounds and
            from what this process or `mlx-drift tune` measured before, plain decoding where
            nothing does. That depends on time: a seed gives the same text again at a fixed K only.
            None for 3, or for `tree`.
        tree: Rows the target verifies a round, the last token and drafts that branch; or `"auto"`:
            a tree or a chain, whichever pays. Instead of `num_draft_tokens`; None for a chain.
            More is accepted a row where a drafter's likeliest token is often wrong and its second
            right. A target with recurrent layers gains less: they run each path by itself. At a
            temperature above 0 a tree's drafts are the likeliest ones, while a chain's are drawn,
            which may be accepted more often.
        temp: Temperature; 0 for greedy decoding. This and the next seven are the keywords of
            mlx-lm's `make_sampler`, and mean the same.
        top_p: Keep the likeliest tokens that make up this mass; 0 or 1 for all.
        min_p: Keep tokens at least this likely, in parts of the likeliest.
        min_tokens_to_keep: Tokens that `min_p` cannot remove.
        top_k: Keep so many of the likeliest tokens; 0 for all.
        xtc_probability: How often XTC removes the likeliest tokens but one.
        xtc_threshold: What a token must reach for XTC to see it.
        xtc_special_tokens: Tokens that XTC never removes.
        seed: Makes the output reproducible. None draws one from mlx's own random state.
        logits_processors: As in mlx-lm: called with all tokens so far and logits `[1, V]`. One may
            keep a state (a counter, a thinking budget, a grammar): it is called for every token
            that is generated, once and in order, so the text is what mlx-lm gives with it, and
            after the answer its state is that of these tokens. (mlx-lm is one call ahead then.)
            Drafts are chosen with copies of it: by its `fork()` if it has one, else by
            `copy.deepcopy`; if neither works, nothing is drafted. What keeps no state is asked
            about all drafts at once, which is faster: mlx-lm's own, functions that refer to nothing
            that can change, and what says so by an attribute `stateless = True`.
        grammar: What the answer must be: `Grammar.json_schema(schema)`, say. It comes after the
            logits processors. Needs the `grammar` extra.
        sampler: As in mlx-lm, instead of the keywords. As nothing is known of its probabilities, a
            draft is accepted only if it is what the sampler drew: the same distribution, lower
            acceptance. It may keep a state as a logits processor may.
        prompt_cache: What the conversation has in the caches: `make_prompt_cache(model, drafter)`.
            Unlike with mlx-lm's, the prompt is then the whole conversation: what the caches hold of
            it is not processed again (`statistics.reuse` says how much and how). Its own settings
            hold for the four keywords that follow.
        max_kv_size: As in mlx-lm: rows of keys and values to keep, the first four and the last.
        kv_bits: As in mlx-lm: bits to quantize keys and values to. None for none.
        kv_group_size: As in mlx-lm: values that share a scale under `kv_bits`.
        quantized_kv_start: As in mlx-lm: from how many rows on `kv_bits` quantizes.
        prefill_step_size: Prompt tokens to process at a time.
        prompt_progress_callback: Called with the prompt tokens processed so far, and all of them.
        compare_plain: After the last token, time a few one-row target steps, rolled back again,
            so that `statistics` tells whether plain decoding would have been faster.
        kwargs: Further keywords of `mlx_lm.stream_generate`, without a drafter only; those that
            say what it does without them are let through.

    Yields:
        One `DriftResponse` a token, as soon as it is accepted. As in mlx-lm, an end-of-text token
        comes with `finish_reason="stop"` and adds no text. Unlike there, `generation_tps` counts
        from the end of the prompt, since the first round may bring several tokens.

    Raises:
        DriftError: If the prompt is empty or has an id outside the vocabulary, a number is out of
            range, the drafter was loaded for another model, or the target's caches cannot be rolled
            back. It is a `ValueError`, as mlx-lm's are.

    Warns:
        DriftWarning: If the drafter's states are not finite, hardly any draft is accepted, or a
            logits processor cannot be copied.
    """
    check_loaded(model, tokenizer, drafter)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    kwargs = without_defaults(kwargs)
    models = [m for m in (model, kwargs.get("draft_model")) if isinstance(m, nn.Module)]
    sizes = map(vocabulary_size, models)
    vocab_size = min((size for size in sizes if size is not None), default=None)
    tokens = encode(tokenizer, prompt, vocab_size)
    special_tokens = token_ids(xtc_special_tokens, "xtc_special_tokens")
    check_vocabulary(special_tokens, vocab_size, "xtc_special_tokens")
    if max_tokens == 0 or max_tokens < -1:
        raise DriftError(f"max_tokens is {max_tokens}; expected at least 1, or -1 for no limit")
    told = function("prompt_progress_callback", prompt_progress_callback)
    progress = told or (lambda done, total: None)
    processors = functions("logits_processors", logits_processors)
    if grammar is not None:
        if not isinstance(grammar, Grammar):
            raise DriftError(
                f"grammar is of type {type(grammar).__name__}; expected "
                "Grammar.json_schema(schema), or another Grammar"
            )
        processors = (*processors, grammar.processor(tokenizer, tokens))
    sampling = Sampling(
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        min_tokens_to_keep=min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tuple(special_tokens),
        logits_processors=processors,
        sampler=function("sampler", sampler),
    )
    if seed is not None and not 0 <= seed < 1 << 64:
        raise DriftError(f"seed is {seed}; expected a whole number from 0 to 2**64 - 1")
    ranks = ranks_of(model)
    if ranks.size > 1:
        seed = _same_start(ranks, tokens, seed)
    if seed is not None and not (drafter is not None and sampling.is_random):
        mx.random.seed(seed)  # what an opaque sampler, and mlx-lm, draw from
    if drafter is None:
        if isinstance(prompt_cache, PromptCache):
            raise DriftError("the prompt cache was made for a drafter; give that one as drafter=")
        if isinstance(num_draft_tokens, int):
            kwargs["num_draft_tokens"] = num_draft_tokens
        yield from plain_responses(
            model,
            tokenizer,
            tokens,
            max_tokens,
            sampler=sampling.as_sampler(),
            logits_processors=list(sampling.logits_processors),
            prompt_cache=prompt_cache,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=progress,
            **kwargs,
        )
        return
    if kwargs:
        raise DriftError(
            f"the keyword {sorted(kwargs)[0]!r} is not supported with a drafter; "
            "generate without one, or leave it out"
        )
    if tree is not None:
        check_tree(tree)
        if num_draft_tokens is not None:
            raise DriftError("num_draft_tokens and tree are both given; give one of them")
        num_draft_tokens = "auto" if tree == "auto" else tree - 1
    elif num_draft_tokens is None:
        num_draft_tokens = CHAIN
    check_num_draft_tokens(num_draft_tokens)
    if drafter.model is not model:
        raise DriftError(
            "the drafter was loaded for another model than the one to generate with; "
            "load it with load_drafter(path, model)"
        )
    if (name := unforkable(sampling.logits_processors)) is not None:
        warnings.warn(
            f"the logits processor {name} keeps a state that cannot be copied, so nothing is "
            "drafted. Give it a method fork() that returns an independent copy of it; or, if it "
            "keeps no state, mark it: processor.stateless = True",
            DriftWarning,
            stacklevel=2,
        )
        num_draft_tokens = PLAIN
    if prompt_cache is None:
        prompt_cache = make_prompt_cache(
            model,
            drafter,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            max_snapshots=0,
        )
        prompt_cache.single_use = True
    prompt_cache = _own(prompt_cache, model, drafter)
    if tree is not None and num_draft_tokens != PLAIN:
        prepare_trees(drafter, prompt_cache.target)
    draft_length = _draft_length(num_draft_tokens, prompt_cache, len(tokens))
    draft_length.tree = tree is not None
    yield from drafted_responses(
        prompt_cache,
        tokenizer,
        tokens,
        max_tokens,
        draft_length=draft_length,
        sampling=sampling,
        key=_random_key(seed) if sampling.is_random else None,
        prefill_step_size=prefill_step_size,
        progress=progress,
        compare_plain=compare_plain,
    )


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
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


def _same_start(ranks: Ranks, tokens: list[int], seed: int | None) -> int:
    """Checks that all ranks were given the same tokens; returns the seed of rank 0 for all."""
    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:12]
    prompt = {"its tokens": f"{len(tokens)}, digest {digest}"}
    wait_for_streams(ranks)
    ranks.check_same("the prompt", prompt, "Give all ranks the same files")
    drawn: Any = mx.random.randint(0, 2**31 - 1).item() if seed is None else seed
    shared: int = ranks.exchange(drawn)[0]
    return shared


def wait_for_streams(ranks: Ranks) -> None:
    """Waits for what an answer left under way, before others make collectives.

    mlx-lm computes on a stream of its own, and its last step, which nobody reads, is still under
    way there when an answer ends: those of two streams would meet in another order on each rank.
    """
    if ranks.size > 1:
        mx.synchronize(generation_stream)
        mx.synchronize()


def _random_key(seed: int | None) -> mx.array:
    """Returns the key of a seed, or one drawn from mlx's own random state."""
    drawn: Any = mx.random.randint(0, 2**31 - 1).item() if seed is None else seed
    return mx.random.key(drawn)


def _draft_length(
    num_draft_tokens: int | Literal["auto"], prompt_cache: PromptCache, context: int
) -> DraftLength:
    """Returns what says how many tokens to draft; what `auto` learned stays with the cache."""
    if num_draft_tokens != "auto":
        return DraftLength(fixed=num_draft_tokens)
    if prompt_cache.draft_length is None:
        costs = tuned_costs(prompt_cache.model, prompt_cache.drafter, context)
        prompt_cache.draft_length = DraftLength(costs=costs, ranks=prompt_cache.target.ranks)
    return prompt_cache.draft_length


def check_num_draft_tokens(num_draft_tokens: int | Literal["auto"]) -> None:
    """Checks K.

    Raises:
        DriftError: If it is no number of drafts that makes sense.
    """
    if num_draft_tokens != "auto" and not 1 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise DriftError(
            f"num_draft_tokens is {num_draft_tokens}; expected 1 to {MAX_DRAFT_TOKENS}, "
            "or auto (to generate without drafts, leave the drafter out: --no-draft)"
        )


def _own(prompt_cache: PromptCache | list[Any], model: nn.Module, drafter: Drafter) -> PromptCache:
    """Checks that a prompt cache is one of ours, of this model and drafter."""
    if not isinstance(prompt_cache, PromptCache):
        if not isinstance(prompt_cache, list | tuple):
            raise DriftError(
                f"prompt_cache is of type {type(prompt_cache).__name__}; expected a loaded one: "
                "prompt_cache = load_prompt_cache(path, model, drafter)"
            )
        kinds = sorted({type(cache).__name__ for cache in prompt_cache})
        raise DriftError(
            f"prompt_cache is mlx-lm's ({', '.join(kinds)}), which knows neither its tokens nor "
            "the drafter's rows; use mlx_drift.make_prompt_cache(model, drafter), and give the "
            "whole conversation as the prompt"
        )
    if prompt_cache.model is not model or prompt_cache.drafter is not drafter:
        raise DriftError(
            "the prompt cache was made for another model or drafter than those to generate with; "
            "make one with make_prompt_cache(model, drafter)"
        )
    return prompt_cache
