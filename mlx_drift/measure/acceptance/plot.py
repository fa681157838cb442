"""Pictures of acceptance. They need the `plot` extra, matplotlib, which is loaded only for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.context import parse_condition
from mlx_drift.measure.acceptance.count import ALL, Condition
from mlx_drift.measure.bootstrap import Interval
from mlx_drift.measure.pictures import check_matplotlib

KINDS = ".png", ".svg", ".pdf"

SIDE_BY_SIDE = 0.08
"""How far figures of the same place stand apart, so that their bars do not cover each other."""

INTERVALS = "bars: 95 % of what resampled questions give"


def check_plot(path: Path) -> None:
    """Checks, before anything is measured, that a picture can be drawn and written.

    Raises:
        DriftError: If the `plot` extra is missing, or the file's folder, or its kind is unknown.
    """
    check_matplotlib()
    if path.suffix.lower() not in KINDS:
        raise DriftError(f"{path}: a picture is written as {', '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise DriftError(f"{path}: there is no folder {path.absolute().parent}")


def plot_positions(condition: Condition, path: Path) -> None:
    """Draws acceptance by draft position, conditional and unconditional, of all questions.

    Args:
        condition: What was measured.
        path: Where the picture goes.

    Raises:
        DriftError: If matplotlib is missing or the file cannot be written.
    """

    figure = new_figure()
    axes = figure.subplots()
    draw_positions(axes, condition)
    write_figure(figure, axes, "Acceptance by position", condition, path)


def draw_positions(axes: Any, condition: Condition) -> None:
    """Draws into matplotlib's axes what `plot_positions` does into a picture."""
    drafters = condition.acceptance
    deepest = max(len(groups[ALL].conditional_acceptance) for groups in drafters.values())
    for number, (name, groups) in enumerate(drafters.items()):
        found = groups[ALL]
        kinds = (
            ("conditional", found.conditional_acceptance, "o-"),
            ("unconditional", found.unconditional_acceptance, "s--"),
        )
        for half, (kind, values, style) in enumerate(kinds):
            shift = _shift(2 * number + half, 2 * len(drafters))
            at = [1 + place + shift for place in range(len(values))]
            _with_bars(axes, at, values, style, f"C{number}", f"{name}, {kind}")
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("draft position in the round")
    axes.set_ylabel("share of drafts accepted")


def plot_conditions(conditions: Sequence[Condition], path: Path) -> None:
    """Draws the acceptance_length of each drafter under each condition.

    Args:
        conditions: What was measured.
        path: Where the picture goes.

    Raises:
        DriftError: If matplotlib is missing or the file cannot be written.
    """

    measured = [condition for condition in conditions if condition.same_as is None]
    drafters = list(measured[0].acceptance)
    figure = new_figure()
    axes = figure.subplots()
    for number, name in enumerate(drafters):
        values = [condition.acceptance[name][ALL].acceptance_length for condition in measured]
        at = [place + _shift(number, len(drafters)) for place in range(len(values))]
        _with_bars(axes, at, values, "o", f"C{number}", name, upright=False)
    axes.set_yticks(range(len(measured)), [condition.name for condition in measured])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("acceptance_length (drafts a round)")
    write_figure(figure, axes, "Acceptance by wording", measured[0], path)


def plot_contexts(conditions: Sequence[Condition], path: Path) -> None:
    """Draws acceptance_length by context length, a line for each drafter and kind of attention.

    Args:
        conditions: What was measured, as `mlx_drift.measure.acceptance.context` names it.
        path: Where the picture goes.

    Raises:
        DriftError: If matplotlib is missing or the file cannot be written.
    """

    kinds = list(dict.fromkeys(parse_condition(condition.name)[1] for condition in conditions))
    lengths = list(dict.fromkeys(parse_condition(condition.name)[0] for condition in conditions))
    drafters = list(conditions[0].acceptance)
    figure = new_figure()
    panels = figure.subplots(1, len(drafters), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, drafters, strict=True):
        for number, kind in enumerate(kinds):
            there = [
                (lengths.index(length), condition.acceptance[name][ALL].acceptance_length)
                for condition in conditions
                for length, its_kind in [parse_condition(condition.name)]
                if its_kind == kind and name in condition.acceptance
            ]
            at = [place + _shift(number, len(kinds)) for place, _ in there]
            label = kind if name == drafters[0] else None
            style = ("o-", "s--", "^:", "D-.")[number]
            _with_bars(axes, at, [value for _, value in there], style, f"C{number}", label)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_xlabel(f"context of {name} (tokens)")
    panels[0].set_ylim(bottom=0)  # of all panels, once they know how high they are
    panels[0].set_ylabel("acceptance_length (drafts a round)")
    write_figure(figure, panels[0], "Acceptance by context length", conditions[0], path)


def new_figure() -> Any:
    """Makes an empty figure of matplotlib's."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(9.5, 4.8), layout="constrained")


def _shift(number: int, count: int) -> float:
    """Returns where the one of that number stands, of as many side by side."""
    return SIDE_BY_SIDE * (number - (count - 1) / 2)


def write_figure(figure: Any, first: Any, title: str, condition: Condition, path: Path) -> None:
    """Gives a figure its title, over the first of its axes, and a legend, and writes it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    asked = f"{condition.questions} question" + ("s" if condition.questions != 1 else "")
    first.set_title(f"{title}\n", loc="left")
    first.text(0, 1.02, f"{asked}; {INTERVALS}", transform=first.transAxes, fontsize=8, alpha=0.7)
    figure.legend(loc="outside right upper", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DriftError(f"{path}: cannot be written ({error.strerror})") from None


def _with_bars(
    axes: Any,
    at: Sequence[float],
    values: Sequence[Interval],
    style: str,
    colour: str,
    label: str | None,
    *,
    upright: bool = True,
) -> None:
    figures = [value.value for value in values]
    bars = [
        [max(0.0, value.value - value.low) for value in values],
        [max(0.0, value.high - value.value) for value in values],
    ]
    along: dict[str, Any] = {"x": at, "y": figures, "yerr": bars}
    across: dict[str, Any] = {"x": figures, "y": at, "xerr": bars}
    axes.errorbar(
        **(along if upright else across),
        fmt=style,
        color=colour,
        label=label,
        capsize=3,
        markersize=5,
        linewidth=1.4,
    )
