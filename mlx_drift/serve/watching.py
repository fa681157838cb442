"""The drift of an answer's rounds, for those who ask: what the drafter's chain does, by step."""

from dataclasses import dataclass

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.copying import CopyingDrafter
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.watch.observe import Observed
from mlx_drift.watch.sums import CLASSES, Split, add_up

SINKS, RECENT = 1, 4
"""As `mlx-drift drift` has them: rows of the drafter's cache that count as the sink, as recent."""


@dataclass(frozen=True)
class Drift:
    """One round's, a figure a step; what they mean is said in `mlx_drift.watch.sums`.

    Attributes:
        rms: Of the state that is recycled.
        attention: The mass on each class of keys; a mean over heads.
    """

    rms: list[float]
    attention: dict[str, list[float]]


class Watch:
    """Watches the drafter of one answer.

    Args:
        drafter: The drafter.
        prompt: How many tokens the prompt has.

    Attributes:
        drafter: The same one, watched: it drafts the same.

    Raises:
        DriftError: If there is nothing to watch.
    """

    def __init__(self, drafter: Drafter, prompt: int):
        chain = drafter.drafter if isinstance(drafter, CopyingDrafter) else drafter
        if not isinstance(chain, ChainDrafter) or not chain.recycles:
            raise DriftError(
                "speculative.drift: this server's drafter recycles no state that could drift; "
                "leave it out"
            )
        self._seen = Observed(chain.network, 1)
        self._split = Split(prompt - 1, SINKS, RECENT)
        watched = chain.through(self._seen)
        is_chain = chain is drafter
        self.drafter: Drafter = watched if is_chain else CopyingDrafter(watched)

    def take(self) -> Drift | None:
        """Returns what the last chain that is over did, if there was one since; forgets the rest.

        So it is to be called after every step: of the prompt's chunks nothing is drafted.
        """
        chains = self._seen.take()
        if not chains:
            return None
        chain = chains[-1]
        committed = chain.steps[0].weights[0].shape[-1]
        sums = add_up(chain, slice(-1, None), [committed], self._split)
        masses = sums.attention.mean(axis=1)
        return Drift(
            sums.states[:, 0].tolist(),
            {name: masses[:, i].tolist() for i, name in enumerate(CLASSES)},
        )
