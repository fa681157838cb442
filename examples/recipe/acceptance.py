"""How many drafts a round a drafter gets accepted, without writing a speculative decoder.

Greedy speculative decoding does not change the target's answer, so the answer is generated once
and every round is known in advance: `unroll` drafts a chain from every row in one pass, and a
round that starts at row i accepts as many drafts as agree with the answer from token i+2 on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipe.loss import Drafter
from recipe.precision import products
from recipe.rows import Row
from recipe.target import Llama


@dataclass(frozen=True)
class Measured:
    """What was found of one drafter.

    Attributes:
        acceptance_length: Accepted drafts a round, free-running.
        rounds: How many rounds there were.
        conditional: Of each step, how often it was right where all before were, free-running.
        agreement: Of each step, how often it was right where it read the target's tokens.
        rms: Of each step, the size of the state that the next one gets, reading those.
    """

    acceptance_length: float
    rounds: int
    conditional: list[float]
    agreement: list[float]
    rms: list[float]

    def __str__(self) -> str:
        """The figures, in four lines."""

        def listed(values: list[float]) -> str:
            return " ".join(f"{value:.3f}" for value in values)

        return (
            f"acceptance_length {self.acceptance_length:.3f}"
            f"\n    conditional {listed(self.conditional)}"
            f"\n    agreement   {listed(self.agreement)}"
            f"\n    rms         {listed(self.rms)}"
        )


def count_rounds(matches: list[list[bool]]) -> tuple[int, list[int], list[int]]:
    """Rounds over an answer, and how often draft k was reached and accepted.

    Args:
        matches: Of each of the answer's tokens but the last, whether the drafts of a chain behind
            it are the tokens that follow. What a chain drafts beyond the end is not looked at.
    """
    steps = len(matches[0]) if matches else 0
    reached, accepted = [0] * steps, [0] * steps
    row, rounds = 0, 0
    while row < len(matches):
        rounds, taken = rounds + 1, 0
        while taken < min(steps, len(matches) - row):
            reached[taken] += 1
            if not matches[row][taken]:
                break
            accepted[taken] += 1
            taken += 1
        row += taken + 1  # the target's own token ends the round
    return rounds, reached, accepted


@torch.no_grad()
def measure(drafter: Drafter, target: Llama, answers: Iterable[Row], steps: int) -> Measured:
    """Reads off the rounds of `steps` drafts.

    Args:
        drafter: The drafter.
        target: Its target.
        answers: Prompts, each with the target's greedy answer, which alone is `said`.
        steps: Drafts a round.
    """
    rounds, reached, accepted = 0, torch.zeros(steps), torch.zeros(steps)
    rows, hits, squares = torch.zeros(steps), torch.zeros(steps), torch.zeros(steps)
    for row in answers:
        first = int(row.said.nonzero()[0]) - 1  # it reads the first token of the answer
        chains = torch.arange(first, len(row.ids) - 2)  # the last to have something to predict
        if not len(chains):
            continue
        ahead = row.ids[(chains[:, None] + 2 + torch.arange(steps)).clamp(max=len(row.ids) - 1)]
        with products(drafter):
            forced = _unroll(drafter, target, row, chains, steps, own=False)
            own = _unroll(drafter, target, row, chains, steps, own=True)
            for step, (drafts, state) in enumerate(forced):
                valid = len(chains) - step  # chains whose predicted token exists
                rows[step] += max(valid, 0)
                hits[step] += (drafts == ahead[:, step])[: max(valid, 0)].sum()
                squares[step] += state[: max(valid, 0)].float().square().mean(-1).sum()
            matches = torch.stack([drafts for drafts, _ in own], 1) == ahead
        counts = count_rounds(matches.tolist())
        rounds += counts[0]
        reached += torch.tensor(counts[1])
        accepted += torch.tensor(counts[2])
    return Measured(
        acceptance_length=accepted.sum().item() / max(rounds, 1),
        rounds=rounds,
        conditional=(accepted / reached.clamp(min=1)).tolist(),
        agreement=(hits / rows.clamp(min=1)).tolist(),
        rms=(squares / rows.clamp(min=1)).sqrt().tolist(),
    )


def _unroll(
    drafter: Drafter, target: Llama, row: Row, chains: Tensor, steps: int, *, own: bool
) -> list[tuple[Tensor, Tensor]]:
    """Each step's drafts `[chains]` and fed-back states, reading the text or their own drafts."""

    def read(step: int, normed: Tensor | None) -> Tensor:
        ids = row.ids.roll(-1 - step)  # what wraps around is never counted
        if normed is not None:
            ids = drafter.choose(target, normed[0], step - 1) if own else ids[chains]
        return target.model.embed_tokens(ids)[None]

    return [
        (drafter.choose(target, normed[0], step), state[0])
        for step, (normed, state) in enumerate(
            drafter.unroll(drafter.start(row), read, steps, chains)
        )
    ]
