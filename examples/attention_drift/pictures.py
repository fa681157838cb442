"""The pictures of the report. Points and lines are of all seeds together, with 95 % intervals over
prompts; what is thin or small is a single seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from attention_drift.findings import Arm, share
from attention_drift.measure_all import DEEP, DRAFTS, deep
from attention_drift.settings import EMBEDDED
from attention_drift.texts import HELD_OUT
from mlx_drift.measure.acceptance.context import condition
from mlx_drift.measure.bootstrap import Interval
from mlx_drift.measure.inside.drift import RECENT
from mlx_drift.measure.inside.drift_plot import FILLS, LABELS, LINES
from mlx_drift.watch.sums import CLASSES

STEPS = range(1, DEEP + 1)
TICKS = (1, *range(4, DEEP + 1, 4))

LENGTHS = EMBEDDED.lengths


def growth(arms: Sequence[Arm]) -> Figure:
    """Draws the RMS of the recycled state by step, a line an arm."""
    figure, (axes,) = _panels(1, 7.5, 4.0)
    for number, arm in enumerate(arms):
        # Arms that lie on each other are told apart by dashes, the first on top.
        look: dict[str, Any] = {"color": LINES[number], "zorder": 3 - number / len(arms)}
        for seed in arm.drafters:
            values = _values(share(arm.of([seed]).drift("rms")))
            axes.plot(STEPS, values, linewidth=0.7, alpha=0.6, **look)
        together = _values(share(arm.drift("rms")))
        dashes = ("-", "--", ":")[number % 3]
        axes.plot(STEPS, together, dashes, marker="o", markersize=3.5, label=arm.name, **look)
    axes.set_yscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xticks(TICKS)
    axes.set_xlabel("chain step")
    axes.set_ylabel("RMS of the recycled state  ‖h‖₂/√d")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def attention(arms: Sequence[Arm]) -> Figure:
    """Draws the attention on each class of keys by step, stacked, a panel an arm."""
    figure, panels = _panels(len(arms), 3.0, 2.5, across=3)
    for arm, axes in zip(arms, panels, strict=True):
        bottom = np.zeros(DEEP)
        for kind in CLASSES:
            values = np.array(_values(share(arm.drift("attention", kind))))
            axes.bar(STEPS, values, 0.9, bottom=bottom, color=FILLS[kind])
            bottom += values
        axes.set_title(arm.name, fontsize=10)
        axes.set_xticks(TICKS)
        axes.set_ylim(0, 1)
    for axes in panels[-3:]:
        axes.set_xlabel("chain step")
    for axes in panels[::3]:
        axes.set_ylabel("attention mass")
    handles = [
        Patch(color=FILLS[kind], label=LABELS[kind].format(recent=RECENT)) for kind in CLASSES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def acceptance(arms: Sequence[Arm]) -> Figure:
    """Draws the acceptance_length of each arm and its seeds, for short rounds and deep ones."""
    figure, panels = _panels(2, 4.2, 3.2, sharey=True)
    kinds = (HELD_OUT, f"{DRAFTS} drafts a round"), (deep(HELD_OUT), f"{DEEP} drafts a round")
    for axes, (name, title) in zip(panels, kinds, strict=True):
        for place, arm in enumerate(arms):
            _point(axes, place, share(arm.acceptance(name))[0], LINES[place])
            for seed in arm.drafters:
                alone = share(arm.of([seed]).acceptance(name))[0].value
                axes.plot(alone, place + 0.22, ".", color=LINES[place], markersize=4, alpha=0.7)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        axes.set_xlabel("acceptance_length (drafts a round)")
    panels[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    panels[0].invert_yaxis()
    return figure


def depth(arms: Mapping[str, Sequence[Arm]]) -> Figure:
    """Draws how often each teacher-forced step is right, a panel a kind and a line a depth."""
    figure, panels = _panels(len(arms), 4.2, 3.2, sharey=True)
    for axes, (name, of_depths) in zip(panels, arms.items(), strict=True):
        for arm, colour in zip(of_depths, LINES, strict=False):
            found = share(arm.drift("agreement", column="teacher_forced"))
            values, low, high = np.array(found).T
            axes.plot(STEPS, values, color=colour, label=f"trained on {arm.depth}")
            axes.fill_between(STEPS, low, high, color=colour, alpha=0.1, linewidth=0)
            axes.plot(arm.depth, values[arm.depth - 1], "o", color=colour, markersize=5)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(TICKS)
        axes.set_xlabel("chain step; point: the last one trained on")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("share of drafts that are right,\nfed the target's text")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def wordings(arms: Sequence[Arm], names: Sequence[str]) -> Figure:
    """Draws the acceptance_length of arms under each wording."""
    figure, (axes,) = _panels(1, 7.5, 0.5 * len(names) + 1.2)
    for number, arm in enumerate(arms):
        for place, name in enumerate(names):
            at = place + 0.12 * (number - (len(arms) - 1) / 2)
            label = arm.name if place == 0 else None
            _point(axes, at, share(arm.acceptance(name))[0], LINES[number], label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("acceptance_length (drafts a round)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def contexts(arms: Sequence[Arm]) -> Figure:
    """Draws acceptance_length by context length, a panel a way to see it and a line an arm."""
    figure, panels = _panels(len(EMBEDDED.seen), 3.0, 3.0, sharey=True)
    for axes, attention in zip(panels, EMBEDDED.seen, strict=True):
        for number, arm in enumerate(arms):
            found = [share(arm.acceptance(condition(n, attention)))[0] for n in LENGTHS]
            at = [place + 0.06 * (number - (len(arms) - 1) / 2) for place in range(len(LENGTHS))]
            _line(axes, at, found, LINES[number], arm.name)
        axes.set_title(attention, fontsize=10)
        axes.set_xticks(range(len(LENGTHS)), map(str, LENGTHS))
        axes.set_xlabel("context (tokens)")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("acceptance_length (drafts a round)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panels(
    count: int, width: float, height: float, across: int | None = None, sharey: bool = False
) -> tuple[Figure, list[Any]]:
    """Makes a figure of some panels; width and height of one are in inches."""
    across = across or count
    down = -(-count // across)
    figure = Figure(figsize=(width * across + 0.6, height * down + 0.5), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=sharey, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _values(found: Sequence[Interval]) -> list[float]:
    return [one.value for one in found]


def _line(axes: Any, at: Any, found: Sequence[Interval], colour: str, label: str) -> None:
    values, low, high = np.array(found).T
    bars = np.maximum(0, (values - low, high - values))
    axes.errorbar(at, values, bars, color=colour, label=label, capsize=2, linewidth=1.2)


def _point(axes: Any, at: float, found: Interval, colour: str, label: str | None = None) -> None:
    bars = [[max(0, found.value - found.low)], [max(0, found.high - found.value)]]
    axes.errorbar(
        found.value, at, xerr=bars, fmt="o", color=colour, label=label, capsize=2, markersize=5
    )
