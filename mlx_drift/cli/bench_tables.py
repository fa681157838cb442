"""The tables of `mlx-drift bench`, and what their columns mean."""

from collections.abc import Sequence

from rich.table import Table

from mlx_drift.decode.tuned import device_name
from mlx_drift.measure.bootstrap import Interval
from mlx_drift.measure.speed.bench import Arm, Bench
from mlx_drift.measure.speed.replay import Replay
from mlx_drift.measure.speed.shape_costs import SAMPLED, LengthCost, ShapeCosts

NOTHING = "–"


def table(found: Bench) -> Table:
    """Returns the arms, a row each."""
    names = "", "tokens/s", "× plain", "quartiles", "accepted", "ms", "Python", "alone", "pays at"
    shown = _new_table(names)
    unquantized = {
        (arm.num_draft_tokens, arm.tree): arm
        for arm in found.arms
        if arm.drafter_bits is None and not arm.name.startswith("mlx-lm")
    }
    for arm in found.arms:
        before = None if arm.drafter_bits is None else unquantized[arm.num_draft_tokens, arm.tree]
        shown.add_row(*_row(arm, before))
    return shown


def _row(arm: Arm, before: Arm | None) -> list[str]:
    """Lays out one arm; `before` is the same one with the drafter as it is on disk."""
    if arm.num_draft_tokens is None:
        return [arm.name, f"{arm.tokens_per_second:.1f}"]
    low, middle, high = arm.speedup
    accepted = _number(arm.acceptance_length)
    if before is not None:
        accepted = f"{_number(before.acceptance_length)} → {accepted}"
    return [
        arm.name,
        f"{arm.tokens_per_second:.1f}",
        f"{middle:.2f}",
        f"{low:.2f}–{high:.2f}",
        accepted,
        _milliseconds(arm.round_seconds),
        _milliseconds(arm.host_seconds),
        NOTHING if arm.efficiency is None else _both(arm.efficiency),
        _pays(arm.num_draft_tokens, arm.break_even) if arm.tree is None else NOTHING,
    ]


def about(found: Bench) -> str:
    """Explains the table: the conditions and the columns."""
    bits = {arm.drafter_bits for arm in found.arms} - {None}
    explained = [
        f"{found.device}, mlx {found.mlx_version}, {found.dtype} activations, "
        f"temperature {found.temp:g};",
        f"{found.prompts} prompts × {found.repeats}, at most {found.max_tokens} tokens each.",
        *[f"{found.ranks} ranks; times are rank 0's"] * (found.ranks > 1),
        "K=…       mlx-drift with so many drafts a round; plain is mlx-lm's plain decoding",
        *["tree of   rows that the target verifies a round, their drafts a tree"]
        * any(arm.tree for arm in found.arms),
        *["mlx-lm    mlx-lm's own speculative loop, with the small model that was given"]
        * any(arm.name.startswith("mlx-lm") for arm in found.arms),
        "× plain   tokens a second over plain decoding's of the same prompt and turn: the median",
        "accepted  drafts a round" + "; before → after the drafter was quantized" * bool(bits),
        "ms        of a round, and what Python takes of it",
        "alone     round efficiency: the passes of a round, timed alone, over the round;",
        f"          of greedy rounds, then of sampled ones (temperature {found.temp or SAMPLED:g})",
        *_choosing({arm.name: arm.choosing for arm in found.arms if arm.choosing is not None}),
        "pays at   the acceptance of every draft from which rounds of this length pay",
    ]
    return "\n".join(["", *explained])


def shape_table(found: ShapeCosts) -> Table:
    """Returns the lengths, a row each."""
    names = "K", "ms", "Python", "verify", "draft", "ingest", "steps", "alone", "pays at"
    assumed = [f"a={a:g}" for a in found.lengths[0].speedups] if found.lengths else []
    shown = _new_table((*names, *assumed))
    for length in found.lengths:
        shown.add_row(*_shape_row(length))
    return shown


def _shape_row(length: LengthCost) -> list[str]:
    cost = length.cost
    return [
        str(length.num_draft_tokens),
        _milliseconds(cost.seconds),
        _milliseconds(cost.host_seconds),
        _milliseconds(cost.verify_seconds),
        _milliseconds(cost.draft_seconds),
        _milliseconds(cost.ingest_seconds),
        f"{length.plain_steps:.2f}",
        _both(length.efficiency),
        _pays(length.num_draft_tokens, length.break_even),
        *(f"{speedup:.2f}×" for speedup in length.speedups.values()),
    ]


def about_shape(found: ShapeCosts) -> str:
    """Explains the table: the conditions and the columns."""
    unquantized = found.target_bits == 16
    target = "unquantized" if unquantized else f"{found.target_bits} bits"
    drafter = "unquantized" if found.drafter_bits is None else f"{found.drafter_bits} bits"
    return f"""
{found.device}, mlx {found.mlx_version}, {found.dtype} activations, temperature {found.temp:g};
random weights at {found.shape}'s shapes: {found.layers} layers, {target} ({
        found.target_bytes / 1e9:.2f} GB);
an EAGLE-3.1 drafter, {drafter} ({found.drafter_bytes / 1e9:.2f} GB); from {
        found.context
    } tokens of context on.
A plain step takes {1000 * found.plain_step_seconds:.1f} ms.
K         drafts a round
ms        of a round, and what Python takes of it; then of its passes, each timed alone
steps     a round's time in plain steps
alone     round efficiency: the passes, timed alone, over the round;
          of greedy rounds, then of sampled ones (temperature {found.temp or SAMPLED:g})
{"".join(_choosing({f"K={one.num_draft_tokens}": one.choosing for one in found.lengths}))}
pays at   the acceptance of every draft from which rounds of this length pay
a=…       tokens a second over plain decoding's, if every draft were accepted so often"""


def replay_table(found: Replay) -> Table:
    """Returns the arms of a replay, a row each."""
    branches = ("× chain",) * any(arm.tree for arm in found.arms)
    names = "", "× plain", "tokens/round", *branches, "rounds", "plain", "drafted", "copied"
    shown = _new_table(names)
    plain, *_ = found.arms
    for arm in found.arms:
        share = {name: one["share"] for name, one in arm.statistics.sources.items()}
        shown.add_row(
            arm.name,
            f"{arm.tokens_per_second / plain.tokens_per_second:.2f}",
            _number(arm.statistics.tokens_per_round) if arm.statistics.rounds else NOTHING,
            *(_interval(found.over_chain(arm)) for _ in branches),
            str(arm.statistics.rounds),
            str(arm.statistics.plain_tokens or NOTHING),
            *(f"{share[name]:.0%}" if name in share else NOTHING for name in ("drafter", "copy")),
        )
    return shown


def about_replay(found: Replay) -> str:
    """Says what was replayed and what the columns are."""
    return f"""
{sum(found.arms[0].tokens)} tokens of recorded answers. Acceptance is exact, greedily; what a
round takes was measured on {device_name()}, once for each length.
K=…           mlx-drift with so many drafts a round; lookup copies, alone or beside
auto          what pays, with lookup and by the drafter alone; trees or chains
tree of …     so many rows a round, their drafts a tree
× plain       tokens a second over plain decoding's
× chain       tokens a round over those of the chain of as many rows
plain         tokens of plain decoding, between the rounds
drafted       share of the text that the drafter's accepted drafts are, and copied ones"""


def _interval(value: Interval | None) -> str:
    return NOTHING if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"


def _choosing(shares: dict[str, tuple[float, float]]) -> list[str]:
    """Tells what choosing tokens takes of greedy and sampled rounds, in a line; in none of none."""
    told = ", ".join(f"{name} {_both(both)}" for name, both in shares.items())
    return [f"          choosing tokens, timed alone likewise: {told}"] * bool(shares)


def _both(shares: tuple[float, float]) -> str:
    """Lays out a share of greedy rounds, and of sampled ones."""
    return " ".join(f"{share:.2f}" for share in shares)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{1000 * seconds:.1f}"


def _pays(length: int | str, break_even: float | None) -> str:
    if length == "auto":
        return NOTHING
    return "never" if break_even is None else f"{break_even:.2f}"


def _new_table(names: Sequence[str]) -> Table:
    shown = Table(box=None, header_style="dim")
    for name in names:
        shown.add_column(name, no_wrap=True)
    return shown
