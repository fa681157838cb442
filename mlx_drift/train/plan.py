"""What a training would be, before it is begun: memory by term, tokens, time."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_drift.train.answers import Answerer
from mlx_drift.train.conversations import Conversation
from mlx_drift.train.held_out import Held, replay
from mlx_drift.train.layout import Text
from mlx_drift.train.learner import Learner
from mlx_drift.train.memory import Memory

TRIED = 2
"""Conversations that are answered to tell how long all take."""


@dataclass(frozen=True)
class Plan:
    """What a training would be.

    Attributes:
        memory: Bytes by term.
        conversations: By part: to learn from, to measure on.
        tokens: That the target would read in all steps, by what was tried.
        answer_seconds: Until all answers are there.
        step_seconds: Of one step, the second of two.
        measure_seconds: Of one measurement.
        seconds: Of all, at most.
    """

    memory: Memory
    conversations: dict[str, int]
    tokens: int
    answer_seconds: float
    step_seconds: float
    measure_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total}}


def make_plan(
    learner: Learner,
    answerer: Answerer,
    conversations: dict[str, Sequence[Conversation]],
    memory: Memory,
    *,
    given: bool,
) -> Plan:
    """Times some answers and two steps; the head that takes them is of no use afterwards.

    Args:
        learner: A head in training.
        answerer: The target, answering.
        conversations: By part; the first is learned from.
        memory: What it takes.
        given: The answers to learn from came with the conversations.
    """
    recipe, train = learner.recipe, next(iter(conversations.values()))
    tried: list[Text] = []
    taken = []
    for one in train[:TRIED]:
        started = time.perf_counter()
        if given:
            texts = answerer.layout.given(one)
            tried += [text.cut(answerer.asking.max_seq_length) for text in texts]
        else:
            tried += answerer.answer(one)
        taken.append(time.perf_counter() - started)
    batch = [tried[i % len(tried)] for i in range(recipe.batch_size)] if tried else []
    step_seconds = 0.0
    for step in range(2):
        started = time.perf_counter()
        learner.learn(batch, step)
        step_seconds = time.perf_counter() - started
    started = time.perf_counter()
    if tried:
        held = Held("", "", "", tuple(tried[:1]))
        stops = answerer.layout.stops
        replay(learner.target, learner.drafter, held, recipe.num_draft_tokens, stops)
        learner.loss(tried[0])
    counts = {part: len(found) for part, found in conversations.items()}
    measured = sum(counts.values()) - len(train)
    asked = measured + (0 if given else len(train))
    answer_seconds = asked * sum(taken) / max(1, len(taken))
    measure_seconds = len(conversations.get("valid", ())) * (time.perf_counter() - started)
    times = 1 + -(-recipe.iters // recipe.steps_per_eval)
    return Plan(
        memory,
        counts,
        recipe.iters * sum(len(text.tokens) for text in batch),
        answer_seconds,
        step_seconds,
        measure_seconds,
        answer_seconds + recipe.iters * step_seconds + times * measure_seconds,
    )
