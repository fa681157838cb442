"""What drafting gains here: plain decoding and every draft length, in turns, in one run.

A machine's clock speed drifts and other work comes and goes, so absolute times are noisy. Every
prompt is answered by all arms one after the other, and what is reported of an arm is its ratio to
plain decoding of the same prompt in the same turn: the median, and the quartiles.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.statistics import Statistics
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.generate import check_num_draft_tokens, stream_generate
from mlx_drift.prompt_cache import make_prompt_cache
from mlx_drift.target import Target

PROMPTS = (
    "Show me the source of `functools.partial`.",
    "Explain in a few sentences how rainbows form.",
    "What does `textwrap.dedent` do in Python? Show me its source.",
    "Write a short story about a lighthouse keeper.",
)
"""Asked if no others are given: everyday ones, and ones the embedded pair knows."""

ALONE = 9
"""How often each part of a round is timed alone."""


@dataclass(frozen=True)
class Arm:
    """One draft length, measured.

    Attributes:
        num_draft_tokens: Drafts a round, K; 0 for plain decoding by mlx-lm.
        tokens_per_second: Of generation, the median over prompts and turns.
        speedup: Tokens a second over plain decoding's: lower quartile, median, upper quartile.
        acceptance_length: Accepted drafts a round.
        conditional_acceptance: Of each draft, if all before it were accepted.
        round_seconds: The median round.
        host_seconds: Of the median round, what Python takes.
        efficiency: What the passes of a round take, timed alone, over what a round takes.
        break_even: The acceptance of every draft at which a round of this length pays; None if
            none does.
    """

    num_draft_tokens: int
    tokens_per_second: float
    speedup: tuple[float, float, float]
    acceptance_length: float | None = None
    conditional_acceptance: tuple[float, ...] = ()
    round_seconds: float | None = None
    host_seconds: float | None = None
    efficiency: float | None = None
    break_even: float | None = None


@dataclass(frozen=True)
class Bench:
    """The arms, plain decoding first, and what they were measured with."""

    arms: tuple[Arm, ...]
    device: str
    mlx_version: str
    dtype: str
    temp: float
    prompts: int
    repeats: int
    max_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return asdict(self)


def bench(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    *,
    lengths: Sequence[int] = (1, 2, 3, 4),
    max_tokens: int = 128,
    repeats: int = 3,
    temp: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures plain decoding and drafting at some lengths.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafter: A drafter loaded for it.
        prompts: Token ids of each prompt.
        lengths: The draft lengths.
        max_tokens: Tokens to generate for each prompt, at most.
        repeats: How often each prompt is answered by each arm; once more to warm up.
        temp: Temperature; 0 for greedy decoding.
        progress: Told after each answer.

    Raises:
        DriftError: If a length is out of range, or the drafter does not fit.
    """
    for length in lengths:
        check_num_draft_tokens(length)
    speeds: dict[int, list[float]] = {k: [] for k in (0, *lengths)}
    seen: dict[int, Statistics] = {k: Statistics() for k in lengths}
    total = (repeats + 1) * len(prompts) * len(speeds)
    done = 0
    for turn in range(repeats + 1):
        for number, prompt in enumerate(prompts):
            for k in speeds:
                seed = turn * len(prompts) + number
                speed, found = _answer(
                    model, tokenizer, drafter if k else None, prompt, k, max_tokens, temp, seed
                )
                if turn:  # the first one warms up
                    speeds[k].append(speed)
                    if k:
                        seen[k].add(found)
                done += 1
                progress(done, total)
    arms = [Arm(0, statistics.median(speeds[0]), (1.0, 1.0, 1.0))]
    for k in lengths:
        found = seen[k]
        round_seconds = statistics.median(found.round_seconds)
        arms.append(
            Arm(
                k,
                statistics.median(speeds[k]),
                quartiles([a / b for a, b in zip(speeds[k], speeds[0], strict=True)]),
                found.acceptance_length,
                tuple(found.conditional_acceptance),
                round_seconds,
                statistics.median(found.host_seconds),
                _alone(model, drafter, prompts[0], k, found.tokens_per_round) / round_seconds,
                break_even(k, round_seconds * arms[0].tokens_per_second),
            )
        )
    return Bench(
        tuple(arms),
        device_name(),
        version("mlx"),
        str(Target(model).dtype).removeprefix("mlx.core."),
        temp,
        len(prompts),
        repeats,
        max_tokens,
    )


def break_even(k: int, cost: float) -> float | None:
    """Returns the acceptance of every draft at which a round yields as many tokens as it costs.

    Args:
        k: Drafts a round.
        cost: A round's time, in plain steps.

    Returns:
        The a with 1 + a + … + aᵏ = cost; None if that is more than k + 1.
    """
    if cost > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        tokens = sum(middle**i for i in range(k + 1))
        low, high = (middle, high) if tokens < cost else (low, middle)
    return high


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def device_name() -> str:
    """Names what mlx computes on."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return str(mx.device_info().get("device_name", "GPU"))


def _answer(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafter: Drafter | None,
    prompt: list[int],
    k: int,
    max_tokens: int,
    temp: float,
    seed: int,
) -> tuple[float, Statistics]:
    """Answers one prompt: tokens a second after the prompt, and the statistics of its rounds."""
    start = time.perf_counter()

    def note(processed: int, total: int) -> None:
        nonlocal start
        if processed < total:  # the last time, all but the prompt's last token are processed
            start = time.perf_counter()

    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens,
        drafter=drafter,
        num_draft_tokens=max(k, 1),
        temp=temp,
        seed=seed,
        prompt_progress_callback=note,
    )
    *_, last = responses
    return last.generation_tokens / (time.perf_counter() - start), last.statistics


def _alone(
    model: nn.Module, drafter: Drafter, prompt: list[int], k: int, tokens_per_round: float
) -> float:
    """Times the passes of a round of k drafts one by one, each waited for: seconds in all."""
    cache = make_prompt_cache(model, drafter, max_snapshots=0)
    cache.read(prompt, step_size=2048, progress=lambda done, total: None)
    target, target_cache, drafter_cache = cache.target, cache.target_cache, cache.drafter_cache
    rows = max(1, round(tokens_per_round))
    tokens = mx.array((prompt * (k + 1))[: k + 1], dtype=mx.int32)
    _, taps = target.verify(tokens, target_cache)
    target.rollback(target_cache, k + 1)
    mx.eval(taps, target_cache.state)

    def draft() -> Any:
        return drafter.propose(k, drafter_cache).tokens

    def verify() -> Any:
        return target.verify(tokens, target_cache)

    def ingest() -> Any:
        drafter.ingest(tokens[:rows], taps[:rows], drafter_cache)
        return drafter_cache.state

    seconds = 0.0
    for part, undo in (
        (draft, lambda: None),
        (verify, lambda: target.rollback(target_cache, k + 1)),
        (ingest, lambda: None),
    ):
        runs = []
        for _ in range(ALONE):
            start = time.perf_counter()
            mx.eval(part())
            runs.append(time.perf_counter() - start)
            undo()
            mx.eval(target_cache.state)
        seconds += statistics.median(runs)
    return seconds
