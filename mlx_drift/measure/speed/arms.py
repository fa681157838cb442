"""The ways of answering that `bench` compares: one prompt, one way, and the clock.

The clock of every way starts when all of the prompt but its last token is in the caches, and stops
at the last token. mlx-lm's own speculative loop is given caches that hold the prompt already,
since it does not tell when it is done with it.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as make_caches
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.trees import Rows, drafting
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.generate import stream_generate, wait_for_streams
from mlx_drift.ranks.world import ranks_of

Length = int | Literal["auto"]
"""A draft length: how many drafts a round, or mlx-drift's own choice."""


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Attributes:
        num_draft_tokens: Drafts a round; None for plain decoding by mlx-lm.
        drafter: What mlx-drift drafts with; None for mlx-lm.
        draft_model: What mlx-lm's own speculative loop drafts with.
        drafter_bits: What the drafter was quantized to for this run.
        tree: Rows of a tree that the drafts make, one more than they are; `auto` for a tree or a
            chain, whichever pays; None for a chain.
    """

    num_draft_tokens: Length | None = None
    drafter: Drafter | None = None
    draft_model: nn.Module | None = None
    drafter_bits: int | None = None
    tree: Rows | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.num_draft_tokens is None:
            return "plain"
        k = self.num_draft_tokens
        length = f"K={k}" if isinstance(k, int) else k
        if self.tree is not None:
            length = name_of_tree(self.tree)
        if self.draft_model is not None:
            return f"mlx-lm {length}"
        return length if self.drafter_bits is None else f"{length}, {self.drafter_bits} bits"


def name_of_tree(rows: Rows) -> str:
    """Returns what tables call it."""
    return "auto, trees" if rows == "auto" else f"tree of {rows}"


@dataclass
class Answer:
    """What was seen of one answer, or of several added up.

    Attributes:
        speeds: Tokens a second after the prompt, of each answer.
        statistics: Of its rounds, if there were any.
        round_seconds: From the end of each round to the end of the next.
        draft_length: What `auto` decided last, and by what numbers.
    """

    speeds: list[float] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    round_seconds: list[float] = field(default_factory=list)
    draft_length: dict[str, Any] | None = None

    def add(self, other: "Answer") -> None:
        """Adds another answer."""
        self.speeds += other.speeds
        self.statistics.add(other.statistics)
        self.round_seconds += other.round_seconds
        self.draft_length = other.draft_length or self.draft_length


def check_baseline(model: nn.Module, draft_model: nn.Module) -> None:
    """Checks that mlx-lm's own speculative loop runs on two models.

    Raises:
        DriftError: If the caches of one cannot be trimmed.
    """
    for what, network in ("target", model), ("baseline draft model", draft_model):
        if not can_trim_prompt_cache(make_caches(network)):
            raise DriftError(
                f"mlx-lm's own speculative loop cannot take rows back from the {what}'s caches; "
                "leave the baseline draft model out"
            )


def answer(
    way: Way,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    *,
    max_tokens: int,
    temp: float,
    seed: int,
) -> Answer:
    """Answers one prompt in one way.

    Args:
        way: How.
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        prompt: Token ids.
        max_tokens: Tokens to generate at most.
        temp: Temperature; 0 for greedy decoding.
        seed: Makes the answer reproducible.
    """
    if way.draft_model is not None:
        return _answer_of_mlx_lm(way, model, tokenizer, prompt, max_tokens, temp, seed)
    found = Answer()
    start = time.perf_counter()

    def note(processed: int, total: int) -> None:
        nonlocal start
        if processed < total:  # the last time, all but the prompt's last token are processed
            start = time.perf_counter()

    ends: list[float] = []
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens,
        drafter=way.drafter,
        **drafting(way.num_draft_tokens, way.tree),
        temp=temp,
        seed=seed,
        prompt_progress_callback=note,
    ):
        if response.statistics.rounds > len(ends):
            ends.append(time.perf_counter())
    found.speeds.append(response.generation_tokens / (time.perf_counter() - start))
    found.statistics = response.statistics
    found.round_seconds = [end - begin for begin, end in pairwise([start, *ends])]
    decided = response.statistics.draft_length
    if way.num_draft_tokens == "auto" and decided is not None:
        found.draft_length = decided.to_dict()
        found.round_seconds = response.statistics.round_seconds  # plain tokens come between rounds
    return found


def _answer_of_mlx_lm(
    way: Way,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    max_tokens: int,
    temp: float,
    seed: int,
) -> Answer:
    """Answers by mlx-lm's `stream_generate(…, draft_model=…)`."""
    k, draft_model = way.num_draft_tokens, way.draft_model
    assert isinstance(k, int)
    assert draft_model is not None
    caches = []
    wait_for_streams(ranks_of(model))
    for network in model, draft_model:
        cache = make_caches(network)
        if len(prompt) > 1:
            network(mx.array(prompt[:-1])[None], cache=cache)
            mx.eval([one.state for one in cache])
        caches += cache
    mx.random.seed(seed)
    found, accepted = Answer(), 0
    start = before = time.perf_counter()
    for response in mlx_lm.stream_generate(
        model,
        tokenizer,
        prompt[-1:],
        max_tokens,
        draft_model,
        num_draft_tokens=k,
        sampler=Sampling(temp=temp).as_sampler(),
        prompt_cache=caches,
    ):
        if response.from_draft:
            accepted += 1
        else:  # the target's own token, which ends a round
            now = time.perf_counter()
            found.statistics.record(min(accepted + 1, k), accepted, now - before)
            found.round_seconds.append(now - before)
            accepted, before = 0, now
    found.speeds.append(response.generation_tokens / (time.perf_counter() - start))
    if accepted:  # the last round, which the end of the text cut short
        found.statistics.record(accepted, accepted, time.perf_counter() - before)
    return found
