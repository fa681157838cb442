"""How the command line shows acceptance: a table for one condition, or for many."""

from collections.abc import Sequence

from rich.table import Table

from mlx_drift.cli.show import as_is
from mlx_drift.measure.acceptance.count import ALL, Condition
from mlx_drift.measure.bootstrap import Interval


def figures(condition: Condition) -> Table:
    """Lays out all figures of one condition, a column a drafter, then those by category."""
    drafters = condition.acceptance
    table = _table("", *drafters)
    found = [groups[ALL] for groups in drafters.values()]
    count = condition.questions
    table.add_row("questions", *(str(one.questions) for one in found))
    table.add_row("rounds", *(str(one.rounds) for one in found))
    table.add_row("acceptance_length", *(_show(one.acceptance_length, count) for one in found))
    _, *ratios = condition.ratio.values()
    below = f"÷ that of {next(iter(drafters))}"
    if ratios:
        shares = (_show(by_group[ALL], count) for by_group in ratios)
        table.add_row(as_is(f"  {below}"), "1", *shares)
    table.add_row("tokens_per_round", *(_show(one.tokens_per_round, count) for one in found))
    for name in ("conditional_acceptance", "unconditional_acceptance"):
        by_position = [getattr(one, name) for one in found]
        table.add_row()
        table.add_row(name.replace("_", " "))
        for position in range(max(map(len, by_position))):
            shares = (
                _show(values[position], count) if position < len(values) else "–"
                for values in by_position
            )
            table.add_row(f"  draft {position + 1}", *shares)
    levels = max(len(one.acceptance_by_rank) for one in found)
    for level in range(levels):
        by_rank = [one.acceptance_by_rank[level : level + 1] for one in found]
        table.add_row()
        table.add_row(f"level {level + 1} of the trees")
        for rank in range(max(len(ranks[0]) for ranks in by_rank if ranks)):
            shares = (
                _show(ranks[0][rank], count) if ranks and rank < len(ranks[0]) else "–"
                for ranks in by_rank
            )
            table.add_row(f"  its draft {rank + 1}", *shares)
    groups = [name for name in next(iter(drafters.values())) if name != ALL]
    if groups:
        table.add_row()
        table.add_row("acceptance_length by category")
    for group in groups:
        of_group = [by_group[group] for by_group in drafters.values()]
        asked = of_group[0].questions
        table.add_row(
            as_is(f"  {group} ({asked})"),
            *(_show(one.acceptance_length, asked) for one in of_group),
        )
        if ratios:
            shares = (_show(by_group[group], asked) for by_group in ratios)
            table.add_row(as_is(f"    {below}"), "1", *shares)
    return table


def comparison(conditions: Sequence[Condition], what: str) -> Table:
    """Lays out acceptance_length a condition a row, a column a drafter, with their ratios.

    Args:
        conditions: What was measured.
        what: What the conditions are.
    """
    first, *others = conditions[0].acceptance
    ratios = (f"{other} ÷ {first}" for other in others)
    table = _table(what, "rounds", first, *others, *ratios)
    for condition in conditions:
        if condition.same_as is not None:
            same = as_is(f"same tokens as {condition.same_as}")
            table.add_row(as_is(condition.name), "", same)
            continue
        count, found = condition.questions, condition.acceptance
        rounds = next(iter(found.values()))[ALL].rounds
        lengths = (
            _show(found[name][ALL].acceptance_length, count) if name in found else "–"
            for name in (first, *others)
        )
        shares = (_show(condition.ratio.get(other, {}).get(ALL), count) for other in others)
        table.add_row(as_is(condition.name), str(rounds), *lengths, *shares)
    return table


def kept(conditions: Sequence[Condition], what: str) -> Table:
    """Lays out what share of its acceptance_length under the first condition a drafter keeps."""
    table = _table(what, *conditions[0].acceptance)
    for condition in conditions[1:]:
        if condition.same_as is None:
            shares = (
                _show(condition.kept.get(name), condition.questions)
                for name in conditions[0].acceptance
            )
            table.add_row(as_is(condition.name), *shares)
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(as_is(name))
    return table


def _show(interval: Interval | None, questions: int) -> str:
    return "–" if interval is None else interval.shown(questions)
