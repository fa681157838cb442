"""The claims of the paper's abstract, as figures that the study has.

Figures are functions of arms, so that `findings.compare` can have each of all seeds together and of
each alone. Chains are `DEEP` drafts long, four times what most drafters were trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from attention_drift.arms import DEPTH, MTP_ARMS
from attention_drift.findings import (
    Arm,
    Compared,
    Factors,
    Study,
    Sums,
    compare,
    every,
    ratio,
    to_the,
)
from attention_drift.measure_all import DEEP, DRAFTS, deep
from attention_drift.settings import SEEN
from attention_drift.texts import HELD_OUT
from mlx_drift.measure.acceptance.context import condition

PRE, BOTH = "neither", "both"
"""EAGLE-3, and EAGLE-3.1 with its two norms."""


def step(arm: Arm, number: int, *names: str) -> Sums:
    """Returns a figure of drift at one chain step, the first being 1: sums, and the chains."""
    sums, chains = arm.drift(*names)
    return sums[:, number - 1], chains[:, 0]


def growth(arm: Arm, last: int = DEEP) -> Factors:
    """How many times its RMS at step 1 the recycled state has at a later one."""
    return [(step(arm, last, "rms"), 1), (step(arm, 1, "rms"), -1)]


def mass(kind: str, arm: Arm, number: int = DEEP) -> Factors:
    """The attention on a class of keys at some step."""
    return [(step(arm, number, "attention", kind), 1)]


def change(kind: str, first: int, arm: Arm) -> Factors:
    """How many times its mass at an early step a class of keys has at the last."""
    return [*mass(kind, arm), *to_the(-1, mass(kind, arm, first))]


def shifted(kinds: Sequence[str], first: int, last: int, arm: Arm) -> Factors:
    """How many times its mass at one step some classes of keys have at another."""

    def together(number: int) -> Sums:
        masses = [step(arm, number, "attention", kind) for kind in kinds]
        return sum(mass for mass, _ in masses), masses[0][1]

    return [(together(last), 1), (together(first), -1)]


def length(name: str, arm: Arm, nth: int = 1) -> Factors:
    """The acceptance_length under some condition, of every nth prompt."""
    return [(every(nth, arm.acceptance(name)), 1)]


def kept(name: str, nth: int, arm: Arm) -> Factors:
    """The acceptance_length in parts of that of the same questions, as usual."""
    return [*length(name, arm), *to_the(-1, length(HELD_OUT, arm, nth))]


def beyond(arm: Arm, first: int = DEPTH) -> Factors:
    """The conditional acceptance at the positions of deep chains after some."""
    accepted, tested = arm.conditional(deep(HELD_OUT))
    return [((accepted[:, first:].sum(axis=1), tested[:, first:].sum(axis=1)), 1)]


def forced(arm: Arm, first: int = DEPTH) -> Factors:
    """How often the teacher-forced chain is right at the steps after some."""
    right, chains = arm.drift("agreement", column="teacher_forced")
    return [((right[:, first:].sum(axis=1), chains[:, 0] * (right.shape[1] - first)), 1)]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        says: What the paper says.
        figure: What is computed here.
        found: The figure.
        expected: Where the claim has it: above 1, below (−1), or at 1 (0).
    """

    says: str
    figure: str
    found: Compared
    expected: int

    @property
    def verdict(self) -> str:
        """What may be said of it."""
        if self.found.is_one:
            return "replicates" if self.expected == 0 else "no difference"
        if self.found.direction == 0:
            return "not settled"
        if self.expected == 0:
            return "a difference"
        return "replicates" if self.found.direction == self.expected else "the opposite"

    @property
    def says_what(self) -> str:
        """What it is a claim about, whatever the target: its words and its figure."""
        return f"{self.says}\n{self.figure}"


def claims(study: Study, wordings: Sequence[str]) -> Iterator[Claim]:
    """Yields the claims, those of one kind together; with those of other wordings."""
    setting = study.setting
    pre, both = study.arm(PRE, DEPTH), study.arm(BOTH, DEPTH)
    over = f"`{BOTH}` ÷ `{PRE}`"
    grown = f"its RMS at step {DEEP} ÷ at step 1"
    yield Claim("the recycled state grows", f"`{PRE}`: {grown}", compare(growth, pre), 1)
    yield Claim("the two norms bound it", f"`{BOTH}`: {grown}", compare(growth, both), 0)
    for kind in ("sink", "prompt"):
        yield Claim(
            f"attention leaves the {kind}",
            f"`{PRE}`: mass at step {DEEP} ÷ at step 1",
            compare(partial(change, kind, 1), pre),
            -1,
        )
    yield Claim(
        "and goes to the drafter's own drafts",
        f"`{PRE}`: mass at step {DEEP} ÷ at step 2, the first with such a key",
        compare(partial(change, "drafts", 2), pre),
        1,
    )
    yield Claim(
        "less so with the two norms",
        f"mass on own drafts at step {DEEP} ÷ at step 2, {over}",
        compare(ratio(partial(change, "drafts", 2)), both, pre),
        -1,
    )
    yield Claim(
        "more is accepted on usual prompts (1.10×)",
        f"acceptance_length of {DRAFTS} drafts, {over}",
        compare(ratio(partial(length, HELD_OUT)), both, pre),
        1,
    )
    for wording in wordings:
        yield Claim(
            f"another wording costs less (2×): {wording}",
            f"share of acceptance_length that is kept, {over}",
            compare(ratio(partial(kept, wording, setting.every_perturbed)), both, pre),
            1,
        )
    for attention in SEEN:
        name = condition(max(setting.lengths), attention)
        yield Claim(
            f"a long context costs less (1.18×): {name}",
            f"share of acceptance_length that is kept, {over}",
            compare(ratio(partial(kept, name, setting.every_long)), both, pre),
            1,
        )
    yield Claim(
        "chains go on past the depth of training",
        f"conditional acceptance of drafts {DEPTH + 1} to {DEEP}, {over}",
        compare(ratio(beyond), both, pre),
        1,
    )
    yield Claim(
        "chains go on past the depth of training",
        f"teacher-forced steps {DEPTH + 1} to {DEEP} that are right, {over}",
        compare(ratio(forced), both, pre),
        1,
    )
    for says, above, below, expected in (
        ("half the depth of training is enough", (BOTH, DEPTH), (BOTH, 8), 1),
        ("but not without the norms", (PRE, DEPTH), (PRE, 8), -1),
        ("half the depth with them beats the whole without", (BOTH, DEPTH), (PRE, 8), 1),
    ):
        arms = study.arm(*above), study.arm(*below)
        if not all(arm.drafters for arm in arms):
            continue
        yield Claim(
            says,
            f"acceptance_length of {DEEP} drafts, `{above[0]}` at depth {above[1]} ÷ `{below[0]}` "
            f"at depth {below[1]}",
            compare(ratio(partial(length, deep(HELD_OUT))), *arms),
            expected,
        )


def mtp_claims(study: Study) -> Iterator[Claim]:
    """Yields what the paper's figure 7 says of an MTP head, beside what was found of ours.

    There, in a head that is post-norm, attention leaves the sink at once when drafting begins, for
    what is recent and its own, and stays so.
    """
    near = "recent", "drafts"
    for name in MTP_ARMS:
        arm = study.arm(name, DEPTH)
        if not arm.drafters:
            continue
        for says, kinds, first, last, expected in (
            ("the sink's share falls when drafting begins (to 0.4)", ("sink",), 1, 2, -1),
            ("and stays there", ("sink",), 2, DEEP, 0),
            ("that of recent tokens and own drafts rises (1.3×)", near, 1, 2, 1),
            ("and stays there", near, 2, DEEP, 0),
        ):
            figure = f"`{name}`: mass on {' and '.join(kinds)}, step {last} ÷ step {first}"
            yield Claim(says, figure, compare(partial(shifted, kinds, first, last), arm), expected)
