"""Pictures of attention drift: growth by step, attention by step, the map of one round.

They are drawn with matplotlib (the `plot` extra), which is imported when one is asked for.
"""

from collections.abc import Sequence
from itertools import cycle
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mlx_drift.errors import DriftError
from mlx_drift.measure.inside.drift import Arm, Drift
from mlx_drift.measure.pictures import check_matplotlib
from mlx_drift.watch.sums import CLASSES

INTERVAL = "95 % interval over prompts"
LINES = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
"""Of the arms; colours that colour-blind people tell apart (Okabe and Ito)."""

FILLS = dict(zip(CLASSES, ("#222222", "#0072B2", "#56B4E9", "#F0E442", "#D55E00"), strict=True))
LABELS = {
    "sink": "sink",
    "prompt": "prompt",
    "answer": "answer",
    "recent": "last {recent} committed",
    "drafts": "own drafts",
}
ACROSS = 3
"""Panels side by side; more are laid out in a square."""

NARROWEST = 7.0
"""Inches that a legend below takes."""

MOST_KEYS, FIRST_KEYS = 96, 8
"""Keys of a map, and how many of them are the first where it cannot have all."""

FAINTEST = 1e-3
"""Attention below it looks like none."""


def plot_drift(found: Drift, folder: Path) -> list[Path]:
    """Writes the three pictures, `growth.png`, `attention.png` and `map.png`.

    Args:
        found: What was measured.
        folder: Where to; made if it is not there.

    Returns:
        The files.

    Raises:
        DriftError: If matplotlib is not installed, or a file cannot be written.
    """
    check_matplotlib()
    if not found.arms:
        raise DriftError(
            "none of the drafters recycles a state, and that is what is drawn: leave --plot out"
        )
    pictures = {"growth": growth, "attention": attention, "map": round_map}
    paths = [folder / f"{name}.png" for name in pictures]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(paths, pictures.values(), strict=True):
            picture(found).savefig(path, dpi=160)
    except OSError as error:
        raise DriftError(f"{folder}: cannot be written ({error.strerror})") from None
    return paths


def growth(found: Drift) -> Any:
    """Draws the RMS of the recycled state by step, a line for each arm."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    steps = range(found.settings.steps + 1)
    for arm, color in zip(found.arms, cycle(LINES), strict=False):
        free, forced = arm.free_running, arm.teacher_forced
        value, low, high = zip(*[free.fused, *free.rms], strict=True)
        axes.plot(steps, value, color=color, marker="o", markersize=4, label=arm.name)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if forced is not None:
            means = [forced.fused.value, *(at.value for at in forced.rms)]
            axes.plot(steps, means, color=color, linestyle=(0, (2, 2)), linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 1.3, top * 1.3)
    axes.set_xticks(steps, ["fused\ninput", *map(str, steps[1:])])
    axes.set_xlabel("chain step")
    axes.set_ylabel("RMS of the recycled state  ‖h‖₂/√d")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if found.prompts > 1:
        handles.append(Line2D([], [], color="gray", linewidth=6, alpha=0.4, label=INTERVAL))
    if any(arm.teacher_forced is not None for arm in found.arms):
        handles.append(
            Line2D([], [], color="gray", linestyle=(0, (2, 2)), linewidth=1, label="teacher-forced")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Growth of the recycled state, free-running rounds", fontsize=11)
    return figure


def attention(found: Drift) -> Any:
    """Draws the attention mass on each class of keys by step, a panel for each arm."""
    figure, panels = _panels(found.arms, width=3.0, height=2.9)
    steps = range(1, found.settings.steps + 1)
    for arm, axes in zip(found.arms, panels, strict=True):
        bottom = np.zeros(len(steps))
        for name in CLASSES:
            mass = np.array([at.value for at in arm.free_running.attention[name]])
            axes.bar(steps, mass, 0.9, bottom=bottom, color=FILLS[name])
            bottom += mass
        axes.set_title(arm.name, fontsize=10)
        axes.set_xlabel("chain step")
        axes.set_xticks(steps if len(steps) <= 10 else steps[:: ceil(len(steps) / 8)])
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("attention mass")
    _legend_of_classes(figure, found.settings.recent)
    figure.suptitle("Where a drafted step looks: mean over heads and rounds", fontsize=11)
    return figure


def round_map(found: Drift) -> Any:
    """Draws attention of one round, query × key, a panel for each arm."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    colors = colormaps["magma"].with_extremes(bad="#e8e8e8")  # keys that a query does not see
    figure, panels = _panels(found.arms, width=4.2, height=3.7)
    steps = found.settings.steps
    for arm, axes in zip(found.arms, panels, strict=True):
        queries, keys = arm.map.weights.shape
        shown = _shown(keys)
        weights = arm.map.weights[:, shown]
        first = steps - queries + 0.5  # the rows are steps … −1, 0, 1 … K
        image = axes.imshow(
            np.where(weights > 0, np.maximum(weights, FAINTEST), np.nan),
            aspect="auto",
            norm=LogNorm(FAINTEST, 1),
            cmap=colors,
            extent=(-0.5, len(shown) - 0.5, steps + 0.5, first),
            interpolation="nearest",
        )
        axes.axhline(1.5, color="#00A0FF", linewidth=1.2, linestyle=(0, (4, 3)))
        for place, row in enumerate(shown):
            name = CLASSES[np.searchsorted(arm.map.edges, row, side="right") - 1]
            strip = {"ymin": 1.01, "ymax": 1.04, "color": FILLS[name], "linewidth": 0}
            axes.axvspan(place - 0.5, place + 0.5, **strip, clip_on=False)
        axes.set_title(arm.name, fontsize=10, pad=14)
        label = "key: row of the drafter's cache"
        if len(shown) < keys:
            axes.axvline(FIRST_KEYS - 0.5, color="white", linewidth=4)
            label += f" ({FIRST_KEYS}–{shown[FIRST_KEYS] - 1} left out)"
        axes.set_xlabel(label)
        ticks = range(0, len(shown), max(1, len(shown) // 8))
        axes.set_xticks(ticks, [str(shown[tick]) for tick in ticks])
        axes.set_yticks([y for y in range(ceil(first), steps + 1) if (y - 1) % 4 == 0] + [steps])
    panels[0].set_ylabel("query: chain step (≤ 1: committed)")
    figure.colorbar(image, ax=panels, label="attention, mean over heads", shrink=0.8, extend="min")
    _legend_of_classes(figure, found.settings.recent)
    title = "Attention in the first round of the first prompt; drafting starts below the line"
    figure.suptitle(title, fontsize=11)
    return figure


def _shown(keys: int) -> list[int]:
    """Returns which keys a map has room for: all, or the first and the last."""
    if keys <= MOST_KEYS:
        return list(range(keys))
    return [*range(FIRST_KEYS), *range(keys - MOST_KEYS + FIRST_KEYS, keys)]


def _panels(arms: Sequence[Arm], width: float, height: float) -> tuple[Any, list[Any]]:
    """Makes a figure with a panel for each arm; width and height of one are in inches."""
    from matplotlib.figure import Figure

    across = len(arms) if len(arms) <= ACROSS else ceil(sqrt(len(arms)))
    down = ceil(len(arms) / across)
    size = max(NARROWEST, width * across + 1.2), height * down + 0.9
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in panels[len(arms) :]:
        empty.remove()
    return figure, panels[: len(arms)]


def _legend_of_classes(figure: Any, recent: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=FILLS[n], label=LABELS[n].format(recent=recent)) for n in CLASSES]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
