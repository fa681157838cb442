"""How often drafts are accepted, learned from the rounds: recent ones count most.

Notable:
- Of a network's drafts each position has an acceptance of its own, given that all before it were
  accepted.
- A copy's acceptance depends on how many tokens agree before it, and a copied token that is
  accepted is one more. So copies of all lengths are one curve, and every round tells much of it.
"""

import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterable

GUESS, GUESS_WEIGHT = 0.7, 3.0  # an untested drafter's acceptance, and the rounds it counts for
FADING, COPY_FADING = 0.99, 0.997  # what is left of the past after a token; copies are rarer

COPY_GUESS = {0: 0.0, 3: 0.6, 4: 0.75, 5: 0.8, 6: 0.85, 12: 0.9, 16: 0.92, 24: 0.95, 32: 0.97}
"""An untested copied token's acceptance, by how many tokens agree before it."""


class Acceptance:
    """How often each draft is accepted if all before it were, recent rounds counting most.

    Args:
        guess: What is believed of the first one before it was tested.
    """

    def __init__(self, guess: float = GUESS) -> None:
        self._guess = guess
        self._tested: list[float] = []
        self._accepted: list[float] = []

    def __len__(self) -> int:
        """Returns how many drafts a round ever had tested."""
        return len(self._tested)

    def record(self, tested: int, accepted: int) -> None:
        """Notes one round."""
        while len(self._tested) < tested:
            self._tested.append(0.0)
            self._accepted.append(0.0)
        for i in range(tested):
            self._tested[i] += 1
            self._accepted[i] += i < accepted

    def fade(self, tokens: int, fading: float = FADING) -> None:
        """Lets the past count for less: `tokens` tokens went by."""
        kept = fading**tokens
        self._tested = [x * kept for x in self._tested]
        self._accepted = [x * kept for x in self._accepted]

    def rates(self, k: int) -> list[float]:
        """Returns the conditional acceptance of drafts 1 … k.

        One that was hardly tested is believed to fare as the one before it.
        """
        rates, belief = [], self._guess
        for i in range(k):
            tested = self._tested[i] if i < len(self._tested) else 0.0
            accepted = self._accepted[i] if i < len(self._accepted) else 0.0
            belief = (accepted + GUESS_WEIGHT * belief) / (tested + GUESS_WEIGHT)
            rates.append(belief)
        return rates

    def tokens(self, k: int) -> list[float]:
        """Returns how many tokens rounds of 0 … k drafts commit on average."""
        return committed(self.rates(k))


class CopyAcceptance:
    """How often a copied token is accepted, by how many tokens agree before it."""

    def __init__(self) -> None:
        self._from = [*COPY_GUESS]
        self._tested = [0.0] * len(COPY_GUESS)
        self._accepted = [0.0] * len(COPY_GUESS)

    def record(self, match: int, tested: int, accepted: int) -> None:
        """Notes a round that copied after a match of so many tokens."""
        for i in range(tested):
            place = self._place(match + i)
            self._tested[place] += 1
            self._accepted[place] += i < accepted

    def fade(self, tokens: int) -> None:
        """Lets the past count for less: `tokens` tokens went by."""
        kept = COPY_FADING**tokens
        self._tested = [x * kept for x in self._tested]
        self._accepted = [x * kept for x in self._accepted]

    def rates(self, match: int, k: int) -> list[float]:
        """Returns the conditional acceptance of copied tokens 1 … k after a match."""
        by_place = self._rates()
        return [by_place[self._place(match + i)] for i in range(k)]

    def tokens(self, match: int, k: int) -> list[float]:
        """Returns how many tokens rounds that copy 0 … k tokens commit on average."""
        return committed(self.rates(match, k))

    def to_dict(self) -> dict[int, float]:
        """Returns the acceptance by the tokens that agree, where it was tested."""
        places = zip(self._from, self._tested, self._rates(), strict=True)
        return {agree: rate for agree, tested, rate in places if tested}

    def _rates(self) -> list[float]:
        seen = zip(self._accepted, self._tested, COPY_GUESS.values(), strict=True)
        return [(a + GUESS_WEIGHT * guess) / (t + GUESS_WEIGHT) for a, t, guess in seen]

    def _place(self, agree: int) -> int:
        return bisect_right(self._from, agree) - 1


def committed(rates: Iterable[float]) -> list[float]:
    """Returns how many tokens rounds of 0 … k drafts commit on average.

    Args:
        rates: The conditional acceptance of drafts 1 … k.
    """
    kept = itertools.accumulate(rates, operator.mul, initial=1.0)
    return list(itertools.accumulate(kept))
