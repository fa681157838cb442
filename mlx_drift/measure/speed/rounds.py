"""What a round costs, as a whole and pass by pass, in turns with a plain step.

*Round efficiency* is what the passes of a round take, each timed alone and waited for, over what a
round takes: what the loop loses between the passes (Python, sampling, rollback), less what it gains
by not waiting for each. What choosing tokens takes of it is timed alone, too.

Notable:
- Rounds, their passes and plain steps are timed in turns, in one conversation, so that they see the
  same context and the same other work on the machine. Figures are medians.
- It is the real loop that is timed (`speculate`), but the target is made to accept as many drafts
  as it is told: the cost of a round does not depend on which tokens are drafted, and so random
  weights will do. Its logits are swayed by no more than a number a draft.
- A round is timed from its end to the next one's, as a reader of its tokens would: what the device
  still does after a round's tokens are known counts for the next one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit

from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.plain import time_plain_steps
from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import speculate
from mlx_drift.decode.text import Round
from mlx_drift.drafters.protocol import Branches, Draft, Drafter, Propose
from mlx_drift.generate import wait_for_streams
from mlx_drift.ranks.world import ranks_of
from mlx_drift.target.caches import TargetCache
from mlx_drift.target.model import Target
from mlx_drift.target.tree import Tree

TURNS, ROUNDS = 16, 3
"""How often every kind of round has its turn, and rounds a turn."""

LEAST_TURNS, SECONDS = 1, 60
"""Where rounds are slow, no turn begins after so many seconds, once so many count."""

Found = TypeVar("Found")

CERTAIN = 1e4
"""What is added to a logit to make its token certain; within float16."""


@dataclass(frozen=True)
class Plan:
    """A kind of round.

    Attributes:
        num_draft_tokens: Drafts a round, K.
        accepted: How many of them are accepted; of a tree that is less deep, all of a path.
        temp: Temperature; 0 for greedy decoding.
        tree: Whether they branch.
    """

    num_draft_tokens: int
    accepted: int
    temp: float = 0.0
    tree: bool = False


@dataclass(frozen=True)
class RoundCost:
    """What a kind of round costs: medians, in seconds.

    Attributes:
        plan: The kind of round.
        seconds: From the end of a round to the next one's.
        host_seconds: Of it, what Python takes.
        draft_seconds: The drafter's chain, alone.
        verify_seconds: The target's pass over the drafts, alone.
        ingest_seconds: The drafter's pass over the committed rows, alone.
        choose_seconds: Choosing tokens, alone: the target's, and what drafts take longer that are
            drawn than those that are the likeliest.
    """

    plan: Plan
    seconds: float
    host_seconds: float
    draft_seconds: float
    verify_seconds: float
    ingest_seconds: float
    choose_seconds: float

    @property
    def efficiency(self) -> float:
        """The passes, timed alone, over the round."""
        return (self.draft_seconds + self.verify_seconds + self.ingest_seconds) / self.seconds

    @property
    def choosing(self) -> float:
        """Choosing tokens, timed alone, over the round."""
        return self.choose_seconds / self.seconds


class Swayed(Target):
    """A target that accepts a set number of drafts, or all where there are fewer.

    Attributes:
        verified_taps: The taps of what it verified last.
    """

    verified_taps: mx.array

    def __init__(self, target: Target, accepted: int):
        vars(self).update(vars(target))
        self._accepted = accepted

    def verify(
        self, tokens: mx.array, cache: TargetCache, tree: Tree | None = None
    ) -> tuple[mx.array, mx.array]:
        """Verifies as a target does, and sways the logits."""
        logits, taps = super().verify(tokens, cache, tree)
        self.verified_taps = taps
        if tree is not None:
            return self._swayed_on_tree(tree, tokens, logits), taps
        drafts = tokens.size - 1
        swayed = min(self._accepted + 1, drafts)  # the one after the accepted is refused
        if swayed:
            signs = [1 if row < self._accepted else -1 for row in range(swayed)]
            by = CERTAIN * mx.array(signs, logits.dtype)
            logits = logits.at[mx.arange(swayed), tokens[1 : swayed + 1]].add(by)
        return logits, taps

    def _swayed_on_tree(self, tree: Tree, tokens: mx.array, logits: mx.array) -> mx.array:
        """Has one path of a tree be accepted, and no draft beside it."""
        last = mx.argmax(mx.minimum(tree.depths, self._accepted))
        is_parent = tree.sees & (tree.depths[:, None] == tree.depths + 1)
        by = CERTAIN * mx.where(tree.sees[last], 1, -1).astype(logits.dtype)
        return logits.at[mx.argmax(is_parent, axis=1)[1:], tokens[1:]].add(by[1:])


@dataclass
class Times:
    """All times that were taken of a kind of round, in seconds."""

    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    ingest: list[float] = field(default_factory=list)
    choose: list[float] = field(default_factory=list)

    def cost(self, plan: Plan) -> RoundCost:
        """Returns the medians."""
        parts = (self.whole, self.host, self.draft, self.verify, self.ingest, self.choose)
        return RoundCost(plan, *(statistics.median(part) for part in parts))


def round_costs(
    model: nn.Module,
    drafter: Drafter,
    prompt: list[int],
    plans: Sequence[Plan],
    *,
    turns: int = TURNS,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[RoundCost], float]:
    """Times some kinds of rounds, their passes and plain steps in turns.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        prompt: Token ids of the context, at least two.
        plans: The kinds of rounds.
        turns: How often each has its turn, if that is soon done; once more to warm up.
        progress: Told after each turn of all.

    Returns:
        The cost of each kind, and the seconds of a plain step.
    """
    ranks = ranks_of(model)
    wait_for_streams(ranks)
    conversation = Conversation(model, drafter, prompt)
    plain: list[float] = []
    start = time.perf_counter()
    with wired_limit([model, drafter.network]):
        for turn in range(turns + 1):
            is_late = turn > LEAST_TURNS and time.perf_counter() - start > SECONDS
            if ranks.exchange(is_late)[0]:
                break
            if turn < 2:  # the first turn warmed up
                times = [Times() for _ in plans]
                plain.clear()
            plain.append(conversation.time_plain())
            for plan, taken in zip(plans, times, strict=True):
                conversation.time_rounds(plan, taken, seed=turn)
            progress()
    costs = [taken.cost(plan) for plan, taken in zip(plans, times, strict=True)]
    return costs, statistics.median(plain)


class Conversation:
    """What rounds are timed in; it grows with them.

    Args:
        model: The target.
        drafter: Its drafter.
        prompt: Token ids of the context, at least two.
    """

    def __init__(self, model: nn.Module, drafter: Drafter, prompt: list[int]):
        self._drafter = drafter
        self._cache: PromptCache = make_prompt_cache(model, drafter, max_snapshots=0)
        self._cache.read(prompt, step_size=2048, progress=lambda done, total: None)
        self._last = mx.array(prompt[-1:], dtype=mx.int32)
        self._length = len(prompt)

    def time_plain(self) -> float:
        """Times plain steps: seconds of one."""
        return time_plain_steps(self._cache.target, self._last, self._cache.target_cache)

    def time_rounds(self, plan: Plan, times: Times, seed: int) -> None:
        """Times some rounds, then as often each of their passes alone."""
        cache, target = self._cache, Swayed(self._cache.target, plan.accepted)
        rounds = speculate(
            target,
            self._drafter,
            self._last,
            cache.target_cache,
            cache.drafter_cache,
            num_draft_tokens=DraftLength(plan.num_draft_tokens, tree=plan.tree),
            max_tokens=-1,
            stop_tokens=frozenset(),
            sampling=Sampling(temp=plan.temp),
            key=mx.random.key(seed) if plan.temp else None,
        )
        start = 0.0
        for _ in range(ROUNDS + 1):
            round = next(rounds)
            now = time.perf_counter()
            if start:  # nothing was left to do before the first one, so it is no round like others
                times.whole.append(now - start)
                times.host.append(round.host_seconds)
            start = now
            self._length += len(round.tokens)
        rounds.close()
        self._last = mx.array(round.tokens[-1:], dtype=mx.int32)
        self._wait()
        for number in range(ROUNDS):
            self._time_passes(plan, target, round, times, seed + number)

    def _time_passes(
        self, plan: Plan, target: Swayed, last: Round, times: Times, seed: int
    ) -> None:
        """Times the parts of a round alone, in the order of the caches' needs."""
        drafter, cache = self._drafter, self._cache
        fresh, taps = mx.array(last.tokens), target.verified_taps[: len(last.tokens)]
        mx.eval(fresh, taps)
        # Where it cannot go back, the drafter sees a few rows twice, which cost the same.
        cache.drafter_cache.rewind(self._length - 1 - len(last.tokens))

        propose: Propose = drafter.propose
        if plan.tree:
            assert isinstance(drafter, Branches)
            propose = drafter.propose_tree
        key = mx.random.key(seed) if plan.temp else None
        chooser = Chooser(Sampling(temp=plan.temp), plan.num_draft_tokens, key)

        def ingest() -> None:
            drafter.ingest(fresh, taps, cache.drafter_cache)
            mx.eval(cache.drafter_cache.state)

        def draft(chooser: Chooser | None = None) -> Draft:
            found = propose(plan.num_draft_tokens, cache.drafter_cache, chooser)
            mx.eval(found.tokens, found.log_probabilities, found.parents)
            return found

        def verify() -> mx.array:
            logits, taps = Target.verify(target, rows, cache.target_cache, found.tree)
            mx.eval(logits, taps)
            return logits

        ingested, _ = self._time(ingest)
        drafted, found = self._time(draft)
        drawn, found = self._time(lambda: draft(chooser)) if plan.temp else (drafted, found)
        rows = mx.concatenate([self._last, found.tokens])
        mx.eval(rows, vars(found.tree) if found.tree else ())
        verified, logits = self._time(verify)
        chosen, _ = self._time(lambda: mx.eval(chooser.verify(found, logits)))
        times.ingest.append(ingested)
        times.draft.append(drafted)
        times.verify.append(verified)
        times.choose.append(max(0.0, drawn - drafted) + chosen)
        target.rollback(cache.target_cache, rows.size)

    def _time(self, run: Callable[[], Found]) -> tuple[float, Found]:
        """Times what computes something and waits for it; returns the seconds, and what it gave."""
        self._wait()
        start = time.perf_counter()
        found = run()
        return time.perf_counter() - start, found

    def _wait(self) -> None:
        mx.eval(self._cache.target_cache.state, self._cache.drafter_cache.state)
