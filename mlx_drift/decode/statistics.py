"""What happened in the rounds: the acceptance figures of the field, with their definitions.

A drafted token is *tested* if every draft before it in its round was accepted and its text was
still wanted (not past an end-of-text token). Engines differ in what they call acceptance length:
vLLM (`v1/spec_decode/metrics.py`), SGLang and SafeAILab count the target's own token, the paper
(arXiv 2605.09992) does not. Both forms are given here, under names that say which is which.
"""

import statistics
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.text import Round

FREE = "copy", "forced"
"""Where drafts come from that no network makes."""

LOW_ACCEPTANCE = 0.10
"""Below it a drafter was made for another target, or read wrongly: a good one has 0.5 to 0.9."""


@dataclass
class Statistics:
    """Counts over the rounds of one generation, or of several added up.

    Attributes:
        rounds: Target passes after the prompt.
        tested: For each draft position, how many drafts were tested there.
        accepted: For each draft position, how many were accepted.
        not_finite: Rounds in which the drafter's states were not finite, so that nothing it
            drafted meant anything.
        free_rounds: Rounds whose drafts no network made, by where they came from: "copy", "forced".
        free_tested: As `tested`, in those alone.
        free_accepted: As `accepted`, in those alone.
        expected: Tokens that came of what the answer was expected to be, and that did not; None if
            nothing was.
        ranks: Of trees, for each level that was tested, how often the first of the drafts that
            followed the path was accepted, the second and so on; under 0, how often none was.
        round_seconds: Wall-clock seconds of each round, drafting and verifying.
        host_seconds: Of each round, the seconds spent in Python.
        plain_step_seconds: Seconds of a one-row target step, where it was timed.
        prompt_tokens: Prompt tokens that were processed.
        reused_tokens: Prompt tokens whose rows were in the prompt cache already.
        reuse: How the prompt found the prompt cache (`mlx_drift.decode.prompt_cache.Reuse`).
        plain_tokens: Tokens of plain decoding, between the rounds.
        plain_seconds: Seconds they took in all.
        draft_length: What chose the number of drafts, or what would have.
        cache_bytes: Bytes of the caches of target and drafter, snapshots included, after the last
            round; the most of them, where generations are added up.
    """

    rounds: int = 0
    tested: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    not_finite: int = 0
    free_rounds: Counter[str] = field(default_factory=Counter)
    free_tested: dict[str, list[int]] = field(default_factory=dict)
    free_accepted: dict[str, list[int]] = field(default_factory=dict)
    expected: tuple[int, int] | None = None
    ranks: list[Counter[int]] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    plain_step_seconds: float | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    reuse: str | None = None
    plain_tokens: int = 0
    plain_seconds: float = 0.0
    draft_length: DraftLength | None = None
    cache_bytes: int = 0

    def record_prompt(self, reuse: str, tokens: int, reused: int) -> None:
        """Notes how a prompt of `tokens` tokens found the prompt cache."""
        self.prompt_tokens, self.reused_tokens, self.reuse = tokens - reused, reused, reuse

    def record_round(self, round: Round) -> None:
        """Adds one round, or a token of plain decoding."""
        if round.is_plain:
            self.plain_tokens += 1
            self.plain_seconds += round.seconds
        else:
            self.record(round.tested, round.accepted, round.seconds, round.host_seconds)
            self.not_finite += not round.is_finite
            self._add_ranks([Counter([right]) for _, right in round.levels])
            if round.source in FREE:
                self._add_free(round.source, 1, [1] * round.tested, [1] * round.accepted)

    def record(self, tested: int, accepted: int, seconds: float, host_seconds: float = 0.0) -> None:
        """Adds one round in which `accepted` of the `tested` drafts were accepted."""
        rounds = Statistics(rounds=1, tested=[1] * tested, accepted=[1] * accepted)
        rounds.round_seconds, rounds.host_seconds = [seconds], [host_seconds]
        self.add(rounds)

    def add(self, other: "Statistics") -> None:
        """Adds another generation's rounds."""
        self.rounds += other.rounds
        self.not_finite += other.not_finite
        self._add_ranks(other.ranks)
        for source, rounds in other.free_rounds.items():
            tested, accepted = other.free_tested[source], other.free_accepted[source]
            self._add_free(source, rounds, tested, accepted)
        self.round_seconds += other.round_seconds
        self.host_seconds += other.host_seconds
        self.tested = _sum(self.tested, other.tested)
        self.accepted = _sum(self.accepted, other.accepted)
        self.prompt_tokens += other.prompt_tokens
        self.reused_tokens += other.reused_tokens
        self.plain_tokens += other.plain_tokens
        self.plain_seconds += other.plain_seconds
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)

    def _add_ranks(self, ranks: list[Counter[int]]) -> None:
        none: Counter[int] = Counter()
        self.ranks = [a + b for a, b in zip_longest(self.ranks, ranks, fillvalue=none)]

    def _add_free(self, source: str, rounds: int, tested: list[int], accepted: list[int]) -> None:
        self.free_rounds[source] += rounds
        self.free_tested[source] = _sum(self.free_tested.get(source, []), tested)
        self.free_accepted[source] = _sum(self.free_accepted.get(source, []), accepted)

    @property
    def acceptance_length(self) -> float:
        """Accepted drafts a round, without the target's own token (the paper's τ)."""
        return sum(self.accepted) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """The same plus one: drafts and the target's own token (vLLM's, SGLang's figure)."""
        return self.acceptance_length + 1.0

    @property
    def sources(self) -> dict[str, dict[str, float]]:
        """Where the drafts came from: rounds, accepted drafts, and their share of all tokens."""
        tokens = self.plain_tokens + sum(self.accepted) + self.rounds
        rounds = self.free_rounds
        accepted = {name: sum(self.free_accepted.get(name, ())) for name in FREE}
        counts = {
            "drafter": (self.rounds - rounds.total(), sum(self.accepted) - sum(accepted.values())),
            **{name: (rounds[name], accepted[name]) for name in FREE},
        }
        return {
            name: {"rounds": count, "accepted": right, "share": right / max(1, tokens)}
            for name, (count, right) in counts.items()
            if count
        }

    @property
    def conditional_acceptance(self) -> list[float]:
        """For each draft position, the share accepted of those tested there."""
        return [a / t for a, t in zip_longest(self.accepted, self.tested, fillvalue=0) if t]

    @property
    def acceptance_by_rank(self) -> list[list[float]]:
        """For each level of trees, in what share of its tests the first draft was accepted, …"""
        return [
            [counts[rank] / counts.total() for rank in range(1, max(1, *counts) + 1)]
            for counts in self.ranks
        ]

    @property
    def speedup(self) -> float | None:
        """Tokens a second over plain decoding's, from medians; None if plain was not timed."""
        if self.plain_step_seconds is None or not (self.rounds or self.plain_tokens):
            return None
        drafting = self.rounds * statistics.median(self.round_seconds) if self.rounds else 0.0
        tokens = self.plain_tokens + self.rounds * self.tokens_per_round
        return tokens * self.plain_step_seconds / (self.plain_seconds + drafting)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures for `--json`."""
        return {
            "rounds": self.rounds,
            "not_finite_rounds": self.not_finite,
            "acceptance_length": self.acceptance_length,
            "tokens_per_round": self.tokens_per_round,
            "conditional_acceptance": self.conditional_acceptance,
            "acceptance_by_rank": self.acceptance_by_rank,
            "sources": self.sources,
            "round_seconds": statistics.median(self.round_seconds) if self.rounds else None,
            "host_seconds": statistics.median(self.host_seconds) if self.rounds else None,
            "plain_step_seconds": self.plain_step_seconds,
            "speedup_over_plain": self.speedup,
            "plain_tokens": self.plain_tokens,
            "draft_length": self.draft_length.to_dict() if self.draft_length else None,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "reuse": self.reuse,
            "cache_bytes": self.cache_bytes,
        }


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
