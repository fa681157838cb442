"""Drafters that recycle no state: what there is of them to see, since nothing of theirs can drift.

A DFlash or DSpark block, and P-EAGLE's rows, are filled in one pass: no row reads what another one
made. What they attend to is measured as a chain's is, row by row: the context, which is committed
(`sink`, `prompt`, `answer`, `recent`), and the rows of the block (`drafts`). Medusa's and Hydra's
heads attend to nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_drift.drafters.dflash import DFlashDrafter
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.p_eagle import PEagleDrafter
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.measure.bootstrap import Interval, ratio
from mlx_drift.measure.inside.figures import Attention, attention_of
from mlx_drift.watch.observe import WatchedCache
from mlx_drift.watch.sums import Looks, Split, look

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Still:
    """A drafter that recycles no state.

    Attributes:
        drafter: Its name.
        acceptance_length: Accepted drafts a round, without the target's own token.
        attention: What the row that makes each draft attends to; None if it attends to nothing.
    """

    drafter: str
    acceptance_length: Interval
    attention: Attention | None


class WatchedPasses:
    """A network whose passes are watched; in all else it is the one inside.

    Args:
        inner: The network.

    Attributes:
        rounds: Of each pass that made drafts, what its rows attended to, `[heads, M, keys]`, and
            what the row did that was ingested last, `[heads, 1, keys]`, if it made a draft, too.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        self.rounds: list[tuple[mx.array, mx.array | None]] = []
        self._ingests = False
        self._ingested: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        """Is what the network inside is."""
        return getattr(self.inner, name)

    def fuse(self, taps: mx.array) -> mx.array:
        """Fuses the taps of committed rows, which come in the next pass."""
        self._ingests = True
        return self.inner.fuse(taps)

    def __call__(self, *inputs: Any) -> Any:
        """Runs a pass; the last input is the layers' caches."""
        *others, caches = inputs
        watched = [WatchedCache(cache, MAX_DRAFT_TOKENS) for cache in caches]
        output = self.inner(*others, watched)
        weights = mx.concatenate([cache.weights for cache in watched])
        if self._ingests:
            self._ingests, self._ingested = False, weights[:, -1:]
        else:
            self.rounds.append((weights, self._ingested))
        return output

    def take(self) -> list[tuple[list[Array], int]]:
        """Returns for each round what its rows attend to, `[heads, keys]`, and the rows before."""
        rounds, self.rounds = self.rounds, []
        found = []
        for weights, ingested in rounds:
            rows = [np.array(weights[:, row], np.float64) for row in range(weights.shape[1])]
            if ingested is not None:
                rows = [np.array(ingested[:, 0], np.float64), *rows]
            found.append((rows, weights.shape[2] - weights.shape[1]))
        return found


def watch(
    name: str,
    drafter: HeadDrafter,
    prompts: Sequence[list[int]],
    steps: int,
    sinks: int,
    recent: int,
    generate: Callable[[HeadDrafter, list[int]], Any],
) -> Still:
    """Has prompts answered and watches.

    Args:
        name: The drafter's.
        drafter: It.
        prompts: Token ids of each prompt.
        steps: Drafts a round, at most.
        sinks: How many of the first rows are the sink.
        recent: How many of the last committed rows are a class of their own.
        generate: Answers a prompt with a drafter, a response a token.
    """
    steps = min(steps, drafter.max_drafts or steps)
    attends = isinstance(drafter, DFlashDrafter | PEagleDrafter)
    first = int(isinstance(drafter, DFlashDrafter) and drafter.config.slots == "unshifted")
    accepted, rounds, looks = [], [], []
    for prompt in prompts:
        seen = WatchedPasses(drafter.network)
        split = Split(len(prompt) - 1, sinks, recent)
        sums: Looks | None = None
        for response in generate(drafter.through(seen) if attends else drafter, prompt):
            statistics = response.statistics
            for rows, committed in seen.take():
                made = rows[first : first + steps]
                if len(made) == steps:
                    found = look(made, committed, split)
                    sums = found if sums is None else sums + found
        accepted.append(sum(statistics.accepted))
        rounds.append(statistics.rounds)
        looks += [] if sums is None else [sums]
    layers = getattr(drafter.config, "num_layers", 1)
    return Still(name, ratio(accepted, rounds), attention_of(looks, layers) if looks else None)
