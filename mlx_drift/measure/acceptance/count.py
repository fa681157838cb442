"""Acceptance: how many drafts are right, by position, by category, by condition.

Of all rounds of all turns of some questions:

- acceptance_length: accepted drafts ÷ rounds. The paper's τ; without the target's own token
- tokens_per_round: that plus one
- conditional acceptance of draft i: accepted at i ÷ tested at i. A draft is tested if all before it
  in its round were accepted (`mlx_drift.decode.statistics`)
- unconditional acceptance of draft i: accepted at i ÷ rounds

Sums over rounds, not means of answers: a long answer counts for more, as it does in every engine.
The intervals are of questions drawn again, each with all its turns (`mlx_drift.measure.bootstrap`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_drift.measure.acceptance.asking import Answer, Answers
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.bootstrap import Interval, ratio, ratio_of_ratios

ALL = "all"
"""The group of all questions."""

ELSEWHERE = """
acceptance_length        accepted drafts a round: τ of arXiv 2605.09992
tokens_per_round         that plus one: vLLM's mean acceptance length, SGLang's accept length,
                         SafeAILab's accepted + 1
conditional acceptance   of drafts whose predecessors were accepted: SafeAILab's n-α
unconditional acceptance of all rounds: vLLM's acceptance rate per position"""
"""What each figure is called by other engines."""


@dataclass(frozen=True)
class Acceptance:
    """The figures of some answers.

    Attributes:
        questions: How many answers, each a whole conversation.
        rounds: Target passes after the prompts.
        prompt_tokens: Of the last turns' prompts, the mean.
        acceptance_length: Accepted drafts a round.
        tokens_per_round: That plus one.
        conditional_acceptance: For each draft position, the share accepted of those tested there.
        unconditional_acceptance: For each draft position, the share of rounds that accepted it.
        acceptance_by_rank: For each level of trees, the share of its tests in which the first of
            the drafts there was accepted, the second and so on.
    """

    questions: int
    rounds: int
    prompt_tokens: float
    acceptance_length: Interval
    tokens_per_round: Interval
    conditional_acceptance: tuple[Interval, ...]
    unconditional_acceptance: tuple[Interval, ...]
    acceptance_by_rank: tuple[tuple[Interval, ...], ...] = ()

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Acceptance":
        """Computes the figures of at least one answer."""
        rounds = [len(answer.rounds) for answer in answers]
        length = ratio([_accepted(answer) for answer in answers], rounds)
        positions = range(max((tested for a in answers for tested, _ in a.rounds), default=0))
        tested = [[sum(t > i for t, _ in a.rounds) for a in answers] for i in positions]
        accepted = [[sum(n > i for _, n in a.rounds) for a in answers] for i in positions]
        return cls(
            questions=len(answers),
            rounds=sum(rounds),
            prompt_tokens=sum(answer.prompt_tokens[-1] for answer in answers) / len(answers),
            acceptance_length=length,
            tokens_per_round=Interval(*(bound + 1 for bound in length)),
            conditional_acceptance=tuple(map(ratio, accepted, tested)),
            unconditional_acceptance=tuple(ratio(at, rounds) for at in accepted),
            acceptance_by_rank=_by_rank(answers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`: `[value, low, high]` each."""

        def bounded(interval: Interval) -> list[float | None] | None:
            return _bounded(interval, self.questions)

        return {
            "questions": self.questions,
            "rounds": self.rounds,
            "prompt_tokens": self.prompt_tokens,
            "acceptance_length": bounded(self.acceptance_length),
            "tokens_per_round": bounded(self.tokens_per_round),
            "conditional_acceptance": [bounded(share) for share in self.conditional_acceptance],
            "unconditional_acceptance": [bounded(share) for share in self.unconditional_acceptance],
            "acceptance_by_rank": [
                [bounded(share) for share in level] for level in self.acceptance_by_rank
            ],
        }


@dataclass(frozen=True)
class Condition:
    """What was measured under one condition.

    Attributes:
        name: The condition.
        acceptance: By drafter, by group of questions; `ALL` comes first.
        ratio: As `acceptance`, acceptance_length over the first drafter's; None if that is 0, or
            was not asked under this condition.
        kept: By drafter, its acceptance_length over its own under the first condition.
        same_as: The condition whose prompts are the same, token for token, and whose figures these
            are therefore.
    """

    name: str
    acceptance: dict[str, dict[str, Acceptance]]
    ratio: dict[str, dict[str, Interval | None]]
    kept: dict[str, Interval | None]
    same_as: str | None = None

    @property
    def questions(self) -> int:
        """How many questions were asked."""
        return next(iter(self.acceptance.values()))[ALL].questions

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return {
            "condition": self.name,
            "same_as": self.same_as,
            "drafters": {
                name: {
                    "ratio_to_first_drafter": {
                        group: _bounded(ratio, self.acceptance[name][group].questions)
                        for group, ratio in self.ratio[name].items()
                    },
                    "ratio_to_first_condition": _bounded(self.kept[name], self.questions),
                    "acceptance": {group: found.to_dict() for group, found in groups.items()},
                }
                for name, groups in self.acceptance.items()
            },
        }


def conditions(
    found: Sequence[tuple[Question, Answers]], same_as: Mapping[str, str] | None = None
) -> list[Condition]:
    """Computes the figures of every condition and drafter.

    Args:
        found: At least one question with its answers; several entries may be of one question, each
            with other conditions. Of the first condition there must be all drafters.
        same_as: Conditions that were not asked, by that whose prompts are the same.
    """
    by_condition: dict[str, list[tuple[Question, dict[str, Answer]]]] = {}
    for question, answers in found:
        for name, by_drafter in answers.items():
            by_condition.setdefault(name, []).append((question, by_drafter))
    first = next(iter(by_condition.values()))
    base = next(iter(first[0][1]))
    reported = []
    for name, asked in by_condition.items():
        answers_of = {drafter: [by[drafter] for _, by in asked] for drafter in asked[0][1]}
        groups = _groups([question for question, _ in asked])
        reported.append(
            Condition(
                name,
                {
                    drafter: {
                        group: Acceptance.of([answers[i] for i in members])
                        for group, members in groups.items()
                    }
                    for drafter, answers in answers_of.items()
                },
                {
                    drafter: {
                        group: _compared(answers, answers_of.get(base), members)
                        for group, members in groups.items()
                    }
                    for drafter, answers in answers_of.items()
                },
                {
                    drafter: _compared(answers, [by[drafter] for _, by in first], groups[ALL])
                    for drafter, answers in answers_of.items()
                },
            )
        )
    measured = {condition.name: condition for condition in reported}
    for name, other in (same_as or {}).items():
        same = measured[other]
        reported.append(Condition(name, same.acceptance, same.ratio, same.kept, other))
    return reported


def _compared(
    above: Sequence[Answer], below: Sequence[Answer] | None, members: Sequence[int]
) -> Interval | None:
    """Returns the ratio of two acceptance_lengths over the same questions, if there is one."""
    if below is None:
        return None
    of_above, of_below = (
        ([_accepted(answers[i]) for i in members], [len(answers[i].rounds) for i in members])
        for answers in (above, below)
    )
    return ratio_of_ratios(of_above, of_below)


def _groups(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Returns which questions are in which group: all, each source, each category of a source.

    A group that is another one by another name is left out.
    """
    groups: dict[str, list[int]] = {ALL: list(range(len(questions)))}
    several = len({question.source for question in questions}) > 1
    for i, question in enumerate(questions):
        category = f"{question.source}/{question.category}" if several else question.category
        for name in (question.source, category) if several else (category,):
            groups.setdefault(name, []).append(i)
    kept: dict[str, list[int]] = {}
    for name, members in groups.items():
        if members not in kept.values():
            kept[name] = members
    return kept


def _by_rank(answers: Sequence[Answer]) -> tuple[tuple[Interval, ...], ...]:
    """Returns the shares of each level's ranks."""
    found: list[tuple[Interval, ...]] = []
    for level in range(max((at + 1 for a in answers for at, _, _ in a.ranks), default=0)):
        counts = [[(r, n) for at, r, n in a.ranks if at == level] for a in answers]
        tested = [sum(n for _, n in of_answer) for of_answer in counts]
        ranks = range(1, max(1, *(r for of_answer in counts for r, _ in of_answer)) + 1)
        found.append(
            tuple(
                ratio([sum(n for r, n in of_answer if r == rank) for of_answer in counts], tested)
                for rank in ranks
            )
        )
    return tuple(found)


def _accepted(answer: Answer) -> int:
    return sum(accepted for _, accepted in answer.rounds)


def _bounded(interval: Interval | None, questions: int) -> list[float | None] | None:
    """Returns a figure with its bounds; of a single question there are none."""
    if interval is None:
        return None
    return list(interval) if questions > 1 else [interval.value, None, None]
