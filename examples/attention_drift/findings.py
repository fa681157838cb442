"""What the study found: figures of arms over seeds and prompts, and when one differs from another.

An arm is its drafters of all seeds. Its figures are ratios of sums over them, and intervals are of
prompts drawn again (`mlx_drift.measure.bootstrap`), the same prompts for all arms. They tell of
prompts, not of trainings, of which there are too few to draw from: so one arm is said to differ
from another only if the interval excludes it and every seed alone says the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attention_drift.settings import Setting
from mlx_drift.measure.bootstrap import DRAWS, LEVEL, Interval

Array = npt.NDArray[np.float64]

Sums = tuple[Array, Array]
"""What is divided by what, a row a prompt."""

TEXTS = "texts.json"
About = dict[str, dict[str, list[int]]]
"""Of each condition, the tokens of its prompts and answers."""

CLOSE = 0.1
"""Ratios this near to 1 are as good as 1."""


@dataclass(frozen=True)
class Arm:
    """The drafters of one kind, a seed each.

    Attributes:
        name: The kind.
        depth: Of their train-time test.
        drafters: What was measured of each, by seed.
    """

    name: str
    depth: int
    drafters: dict[int, dict[str, Any]]

    def of(self, seeds: Sequence[int]) -> "Arm":
        """Returns it with the drafters of some seeds only."""
        return Arm(self.name, self.depth, {seed: self.drafters[seed] for seed in seeds})

    def acceptance(self, condition: str) -> Sums:
        """Returns accepted drafts and rounds, `[prompts]`."""
        return self._counts(condition, "accepted").sum(axis=1), self._counts(condition, "rounds")

    def conditional(self, condition: str) -> Sums:
        """Returns accepted and tested drafts at each position, `[prompts, K]`."""
        return self._counts(condition, "accepted"), self._counts(condition, "tested")

    def drift(self, *names: str, column: str = "free_running") -> Sums:
        """Returns a figure's sums over chains, `[prompts, K]`, and the chains, `[prompts, 1]`."""
        sums, chains = [], []
        for drafter in self.drafters.values():
            table = drafter["drift"][column]
            chains.append(np.array(table["chains"], float)[:, None])
            for name in names:
                table = table[name]
            values = np.array(table, float)
            sums.append(values.reshape(len(values), -1) * chains[-1])
        return np.sum(sums, axis=0), np.sum(chains, axis=0)

    def _counts(self, condition: str, what: str) -> Array:
        counted = [one["acceptance"][condition][what] for one in self.drafters.values()]
        return np.sum(np.array(counted, float), axis=0)


class Study:
    """All that was measured in one setting.

    Args:
        folder: Of the JSON files.
        setting: What was asked.
    """

    def __init__(self, folder: Path, setting: Setting):
        files = sorted(folder.glob("*-ttt*-seed*.json"))
        self.drafters = [json.loads(file.read_text()) for file in files]
        self.about: About = json.loads((folder / TEXTS).read_text())
        self.setting = setting

    def arm(self, name: str, depth: int) -> Arm:
        """Returns the drafters of one kind, seeds in the order of their files."""
        found = [one for one in self.drafters if (one["arm"], one["depth"]) == (name, depth)]
        return Arm(
            name, depth, {one["seed"]: one for one in sorted(found, key=lambda d: d["seed"])}
        )


def bootstrap(figures: Callable[..., Array], *sums: Array) -> list[Interval]:
    """Returns figures with the interval of prompts drawn again.

    Args:
        figures: Computes them of sums over prompts: of as many `[draws, columns]` as there are,
            `[draws, figures]`.
        sums: What is summed, `[prompts, columns]` each, of the same prompts.
    """
    times = _drawn(len(sums[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = figures(*(one.sum(axis=0, keepdims=True) for one in sums))[0]
        draws = figures(*(times @ one for one in sums))
    return [_interval(value, drawn) for value, drawn in zip(whole, draws.T, strict=True)]


def _interval(value: float, draws: Array) -> Interval:
    """Bounds a figure by its draws; those without anything to divide by tell nothing."""
    told = draws[np.isfinite(draws)]
    if not told.size:
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.quantile(told, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


@cache
def _drawn(prompts: int) -> Array:
    """Returns how often each prompt is drawn, `[draws, prompts]`."""
    drawn = np.random.default_rng(0).integers(prompts, size=(DRAWS, prompts))
    return np.stack([np.bincount(one, minlength=prompts) for one in drawn]).astype(float)


def share(sums: Sums) -> list[Interval]:
    """Returns a ratio of sums for each column."""
    return bootstrap(np.divide, *(one.reshape(len(one), -1) for one in sums))


Factors = Sequence[tuple[Sums, float]]
"""A product of ratios of sums, each to a power."""


def product(factors: Factors) -> Interval:
    """Returns a product of ratios of sums of the same prompts."""

    def figure(*sums: Array) -> Array:
        logs = [
            power * np.log(above / below)
            for (_, power), above, below in zip(factors, sums[::2], sums[1::2], strict=True)
        ]
        return np.exp(sum(logs))

    return bootstrap(figure, *(part[:, None] for sums, _ in factors for part in sums))[0]


def to_the(power: float, factors: Factors) -> Factors:
    """Returns the factors of a power of a product."""
    return [(sums, own * power) for sums, own in factors]


@dataclass(frozen=True)
class Compared:
    """A ratio, of all seeds together and of each alone.

    Attributes:
        all: Of all seeds together.
        seeds: Of each seed.
        prompts: How many prompts they are of.
    """

    all: Interval
    seeds: tuple[float, ...]
    prompts: int = 0

    @property
    def direction(self) -> int:
        """1 if it is more than 1, −1 if less, 0 if not settled or there is no such ratio."""
        if np.isnan(self.seeds).any():
            return 0
        if self.all.low > 1 and min(self.seeds) > 1:
            return 1
        if self.all.high < 1 and max(self.seeds) < 1:
            return -1
        return 0

    @property
    def is_one(self) -> bool:
        """Whether it is 1 for all that matters: interval and seeds differ by `CLOSE` at most."""
        return all(abs(value - 1) <= CLOSE for value in (*self.all[1:], *self.seeds))

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.all.high - self.all.low) / 2

    @property
    def prompts_to_settle(self) -> int | None:
        """How many prompts would bring the interval clear of 1, or within `CLOSE` of it.

        If the figure stays what it is: an interval is as wide as one over the root of the prompts.
        None where seeds contradict each other, which prompts do not mend.
        """
        off, values = abs(self.all.value - 1), (self.all.value, *self.seeds)
        rooms = [off] if len({value > 1 for value in values}) == 1 else []
        if all(abs(value - 1) < CLOSE for value in values):
            rooms.append(CLOSE - off)
        return ceil(self.prompts * (self.half_width / max(rooms)) ** 2) if rooms else None


def every(nth: int, sums: Sums) -> Sums:
    """Returns the sums of every nth prompt."""
    return sums[0][::nth], sums[1][::nth]


Figure = Callable[..., Factors]
"""A figure of one arm or several."""


def compare(figure: Figure, *arms: Arm) -> Compared:
    """Computes a figure of arms over the seeds that all of them have, and for each alone."""
    seeds = [seed for seed in arms[0].drafters if all(seed in arm.drafters for arm in arms)]
    alone = [product(figure(*(arm.of([seed]) for arm in arms))).value for seed in seeds]
    factors = figure(*(arm.of(seeds) for arm in arms))
    prompts = len(factors[0][0][0]) if seeds else 0
    return Compared(product(factors), tuple(alone), prompts)


def ratio(figure: Figure) -> Figure:
    """Returns the ratio of a figure of two arms, the first over the second."""
    return lambda above, below: [*figure(above), *to_the(-1, figure(below))]
