"""What rounds cost at a real model's shapes, and what that comes to at any acceptance.

Random pairs accept nothing, so how often a draft is accepted is assumed, not measured: the cost of
a round is measured (`mlx_drift.measure.speed.rounds`), and the tokens that it yields follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlx_drift.decode.tuned import device_name
from mlx_drift.errors import DriftError
from mlx_drift.generate import check_num_draft_tokens
from mlx_drift.measure.speed.arithmetic import break_even, tokens_per_round
from mlx_drift.measure.speed.rounds import TURNS, Plan, RoundCost, round_costs
from mlx_drift.measure.speed.shapes import RandomPair
from mlx_drift.target.model import Target

ACCEPTANCES = 0.5, 0.6, 0.7, 0.8
SAMPLED = 0.7
"""The temperature of sampled rounds, where greedy ones were asked for."""


@dataclass(frozen=True)
class LengthCost:
    """Rounds of one length.

    Attributes:
        num_draft_tokens: Drafts a round, K.
        cost: Of a round at the temperature that was asked for.
        efficiency: Round efficiency of greedy rounds, and of sampled ones.
        choosing: What choosing tokens takes of them, timed alone.
        plain_steps: A round's time in plain steps.
        break_even: The acceptance of every draft at which such rounds pay; None if none does.
        speedups: Tokens a second over plain decoding's, by the acceptance of every draft.
    """

    num_draft_tokens: int
    cost: RoundCost
    efficiency: tuple[float, float]
    choosing: tuple[float, float]
    plain_steps: float
    break_even: float | None
    speedups: dict[float, float]


@dataclass(frozen=True)
class ShapeCosts:
    """The lengths, and what they were measured with."""

    shape: str
    layers: int
    target_bits: int
    drafter_bits: int | None
    target_bytes: int
    drafter_bytes: int
    context: int
    temp: float
    device: str
    mlx_version: str
    dtype: str
    plain_step_seconds: float
    lengths: tuple[LengthCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return asdict(self)


def shape_costs(
    name: str,
    pair: RandomPair,
    *,
    target_bits: int,
    drafter_bits: int | None = None,
    lengths: Sequence[int] = (1, 2, 3, 4),
    context: int = 128,
    acceptances: Sequence[float] = ACCEPTANCES,
    temp: float = 0.0,
    turns: int = TURNS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShapeCosts:
    """Measures the cost of rounds of some lengths.

    Args:
        name: The shape's.
        pair: What `random_pair` built of it.
        target_bits: What it was built with.
        drafter_bits: Likewise.
        lengths: The draft lengths.
        context: Tokens in the caches when the measurement begins.
        acceptances: Of every draft if all before it were accepted, to compute speed-ups for.
        temp: Temperature; 0 for greedy decoding.
        turns: How often every kind of round has its turn.
        progress: Told after each turn.

    Raises:
        DriftError: If a number is out of range.
    """
    check_assumptions(lengths, context, acceptances)
    vocab = pair.drafter.config.target.vocab_size
    prompt: list[int] = mx.random.randint(0, vocab, (context,), key=mx.random.key(0)).tolist()  # type: ignore[assignment]
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress(done, turns + 1)

    plans = [
        Plan(k, (k + 1) // 2, t)  # about what an acceptance of 0.6 or 0.7 comes to
        for k in lengths
        for t in (0.0, temp or SAMPLED)
    ]
    costs, plain = round_costs(pair.model, pair.drafter, prompt, plans, turns=turns, progress=tell)
    found = []
    for k, greedy, sampled in zip(lengths, costs[::2], costs[1::2], strict=True):
        cost = sampled if temp else greedy
        steps = cost.seconds / plain
        found.append(
            LengthCost(
                k,
                cost,
                (greedy.efficiency, sampled.efficiency),
                (greedy.choosing, sampled.choosing),
                steps,
                break_even(k, steps),
                {a: tokens_per_round(k, a) / steps for a in acceptances},
            )
        )
    return ShapeCosts(
        name,
        pair.layers,
        target_bits,
        drafter_bits,
        pair.target_bytes,
        pair.drafter_bytes,
        context,
        temp,
        device_name(),
        version("mlx"),
        str(Target(pair.model).dtype).removeprefix("mlx.core."),
        plain,
        tuple(found),
    )


def check_assumptions(lengths: Sequence[int], context: int, acceptances: Sequence[float]) -> None:
    """Checks the settings before anything is built.

    Raises:
        DriftError: If a number is out of range.
    """
    for length in lengths:
        check_num_draft_tokens(length)
    if context < 2:
        raise DriftError(f"context is {context}; expected at least 2")
    for acceptance in acceptances:
        if not 0 <= acceptance <= 1:
            raise DriftError(f"acceptance is {acceptance:g}; expected 0 to 1")
