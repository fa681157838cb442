"""What drafting gains here: plain decoding and every way of drafting, in turns, in one run.

A machine's clock speed drifts and other work comes and goes, so absolute times are noisy. Every
prompt is answered by all arms one after the other, and what is reported of an arm is its ratio to
plain decoding of the same prompt in the same turn: the median, and the quartiles.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.trees import Rows, check_tree, prepare_trees
from mlx_drift.decode.tuned import device_name
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.generate import check_num_draft_tokens
from mlx_drift.measure.speed.arithmetic import break_even, quartiles
from mlx_drift.measure.speed.arms import Answer, Length, Way, answer, check_baseline
from mlx_drift.measure.speed.rounds import TURNS, Plan, RoundCost, round_costs
from mlx_drift.measure.speed.shape_costs import SAMPLED
from mlx_drift.ranks.world import ranks_of
from mlx_drift.target.model import Target

LENGTHS: tuple[Length, ...] = (1, 2, 3, 4, "auto")
"""The draft lengths that are measured if none are given."""

PROMPTS = (
    "Show me the source of `functools.partial`.",
    "Explain in a few sentences how rainbows form.",
    "What does `textwrap.dedent` do in Python? Show me its source.",
    "Write a short story about a lighthouse keeper.",
)
"""Asked if no others are given: everyday ones, and ones the embedded pair knows."""


@dataclass(frozen=True)
class Arm:
    """One way of answering, measured.

    Attributes:
        name: `plain`, `K=2`, `auto`, `K=2, 4 bits` (of the drafter), `tree of 5`, `mlx-lm K=2`.
        num_draft_tokens: Drafts a round, K, or `auto`; None for plain decoding by mlx-lm.
        drafter_bits: What the drafter was quantized to for this run.
        tokens_per_second: Of generation, the median over prompts and turns.
        speedup: Tokens a second over plain decoding's: lower quartile, median, upper quartile.
        speeds: Tokens a second of each prompt in each turn, `[turns][prompts]`.
        acceptance_length: Accepted drafts a round.
        conditional_acceptance: Of each draft, if all before it were accepted.
        round_seconds: From the end of a round to the next one's: the median.
        host_seconds: Of the median round, what Python takes.
        break_even: The acceptance of every draft at which a round of this length pays; None if
            none does.
        greedy, sampled: What greedy and sampled rounds cost, whole and in parts, with about as many
            drafts accepted as here (`mlx_drift.measure.speed.rounds`).
        efficiency: Round efficiency of the two.
        choosing: What choosing tokens takes of the two, timed alone.
        draft_length: What `auto` decided last, and by what numbers.
        tree: Rows that the target verified a round, in a tree; or `auto`; None for a chain.
        acceptance_by_rank: Of each level of a tree, the share of its tests in which the first draft
            was accepted, the second and so on.
    """

    name: str
    num_draft_tokens: Length | None
    drafter_bits: int | None
    tokens_per_second: float
    speedup: tuple[float, float, float]
    speeds: list[list[float]]
    acceptance_length: float | None = None
    conditional_acceptance: tuple[float, ...] = ()
    round_seconds: float | None = None
    host_seconds: float | None = None
    break_even: float | None = None
    greedy: RoundCost | None = None
    sampled: RoundCost | None = None
    efficiency: tuple[float, float] | None = None
    choosing: tuple[float, float] | None = None
    draft_length: dict[str, Any] | None = None
    tree: Rows | None = None
    acceptance_by_rank: tuple[list[float], ...] = ()


@dataclass(frozen=True)
class Bench:
    """The arms, plain decoding first, and what they were measured with; times are rank 0's."""

    arms: tuple[Arm, ...]
    device: str
    mlx_version: str
    dtype: str
    temp: float
    prompts: int
    repeats: int
    max_tokens: int
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return asdict(self)


def bench(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    *,
    lengths: Sequence[Length] = LENGTHS,
    trees: Sequence[Rows] = (),
    quantized: tuple[int, Drafter] | None = None,
    draft_model: nn.Module | None = None,
    max_tokens: int = 128,
    repeats: int = 3,
    temp: float = 0.0,
    turns: int = TURNS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures plain decoding and drafting at some lengths.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafter: A drafter loaded for it.
        prompts: Token ids of each prompt.
        lengths: The draft lengths.
        trees: Rows of trees to measure beside them; `auto` chooses chains as well.
        quantized: Bits, and the drafter quantized to them: an arm more for each length.
        draft_model: A small model with the target's tokenizer, for mlx-lm's own speculative loop:
            an arm more for each length that is a number.
        max_tokens: Tokens to generate for each prompt, at most.
        repeats: How often each prompt is answered by each arm; once more to warm up.
        temp: Temperature; 0 for greedy decoding.
        turns: How often each kind of round has its turn when round efficiency is measured.
        progress: Told after each answer, and each turn of rounds.

    Raises:
        DriftError: If a length is out of range, or the drafter or draft model does not fit.
    """
    for length in lengths:
        check_num_draft_tokens(length)
    for rows in trees:
        check_tree(rows)
        prepare_trees(drafter, Target(model, drafter.taps))
    if draft_model is not None:
        check_baseline(model, draft_model)
    drafters = {None: drafter} | ({} if quantized is None else {quantized[0]: quantized[1]})
    numbers = [k for k in lengths if isinstance(k, int)]
    ways = [
        Way(),
        *(Way(k, d, drafter_bits=bits) for k in lengths for bits, d in drafters.items()),
        *(
            Way("auto" if rows == "auto" else rows - 1, d, drafter_bits=bits, tree=rows)
            for rows in trees
            for bits, d in drafters.items()
        ),
        *(Way(k, draft_model=draft_model) for k in numbers if draft_model is not None),
    ]
    total = (repeats + 1) * len(prompts) * len(ways) + (turns + 1) * len(drafters) * bool(numbers)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    answers = [Answer() for _ in ways]
    for turn in range(repeats + 1):
        for number, prompt in enumerate(prompts):
            seed = turn * len(prompts) + number
            for way, found in zip(ways, answers, strict=True):
                one = answer(
                    way, model, tokenizer, prompt, max_tokens=max_tokens, temp=temp, seed=seed
                )
                if turn:  # the first one warms up
                    found.add(one)
                tell()
    costs: dict[tuple[int | None, Length], list[RoundCost]] = {}
    for bits, one_drafter in drafters.items() if numbers else ():
        accepted = {
            way.num_draft_tokens: round(found.statistics.acceptance_length)
            for way, found in zip(ways, answers, strict=True)
            if way.drafter is one_drafter and way.tree is None
        }
        plans = [Plan(k, accepted[k], t) for k in numbers for t in (0.0, temp or SAMPLED)]
        taken, _ = round_costs(model, one_drafter, prompts[0], plans, turns=turns, progress=tell)
        costs |= {(bits, k): taken[2 * i : 2 * i + 2] for i, k in enumerate(numbers)}
    arms = []
    for way, found in zip(ways, answers, strict=True):
        key = way.drafter_bits, way.num_draft_tokens
        timed = way.drafter is not None and way.tree is None
        of_mlx_drift = costs.get(key, ()) if timed else ()  # type: ignore[arg-type]
        arms.append(_arm(way, found, answers[0], len(prompts), of_mlx_drift))
    return Bench(
        tuple(arms),
        device_name(),
        version("mlx"),
        str(Target(model).dtype).removeprefix("mlx.core."),
        temp,
        len(prompts),
        repeats,
        max_tokens,
        ranks_of(model).size,
    )


def _arm(way: Way, found: Answer, plain: Answer, prompts: int, costs: Sequence[RoundCost]) -> Arm:
    """Sums up one arm's answers.

    Args:
        way: The way.
        found: What was seen of it.
        plain: What was seen of plain decoding.
        prompts: How many prompts there were.
        costs: Of greedy and sampled rounds, where they were timed.
    """
    k, seen = way.num_draft_tokens, found.statistics
    round_seconds = statistics.median(found.round_seconds) if found.round_seconds else None
    steps = None if round_seconds is None else round_seconds * statistics.median(plain.speeds)
    greedy, sampled = costs or (None, None)
    is_mlx_drift = way.drafter is not None and seen.rounds
    is_chain = way.tree is None
    return Arm(
        way.name,
        k,
        way.drafter_bits,
        statistics.median(found.speeds),
        quartiles([a / b for a, b in zip(found.speeds, plain.speeds, strict=True)]),
        [found.speeds[i : i + prompts] for i in range(0, len(found.speeds), prompts)],
        seen.acceptance_length if seen.rounds else None,
        tuple(seen.conditional_acceptance),
        round_seconds,
        statistics.median(seen.host_seconds) if is_mlx_drift else None,
        break_even(k, steps) if is_chain and isinstance(k, int) and steps is not None else None,
        greedy,
        sampled,
        (greedy.efficiency, sampled.efficiency) if greedy and sampled else None,
        (greedy.choosing, sampled.choosing) if greedy and sampled else None,
        found.draft_length,
        way.tree,
        tuple(seen.acceptance_by_rank),
    )
