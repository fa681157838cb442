"""Heads held against each other, as they will be used: in the target's dtype, packed and folded.

Beside them stands prompt lookup over the same texts, which says how much of it is repetition.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import mlx.nn as nn

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.load import load_converted
from mlx_drift.measure.acceptance.asking import Answer, Answers
from mlx_drift.measure.acceptance.count import Condition, conditions
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.target.model import Target
from mlx_drift.train.held_out import Held, replay_all
from mlx_drift.train.repetition import replay_lookup

LOOKUP = "prompt lookup"


def compare(
    model: nn.Module,
    heads: Mapping[str, Path],
    parts: Mapping[str, Sequence[Held]],
    steps: int,
    stops: Collection[int],
    progress: Callable[[], None] = lambda: None,
) -> list[Condition]:
    """Measures acceptance.

    Args:
        model: The target.
        heads: Their folders, by what they are called; the first is what others are held against.
        parts: What they are measured on.
        steps: Drafts a round.
        stops: Tokens that end an answer.
        progress: Called after each conversation; may raise to stop.
    """
    by_head: dict[str, dict[str, list[Answer]]] = {}
    for name, folder in heads.items():
        drafter = load_converted(folder, model)
        assert isinstance(drafter, ChainDrafter)
        target = Target(model, drafter.taps)
        by_head[name] = {
            part: replay_all(target, drafter, held, steps, stops, progress)
            for part, held in parts.items()
        }
    by_head[LOOKUP] = {
        part: [replay_lookup(one, steps, stops) for one in held] for part, held in parts.items()
    }
    found: list[tuple[Question, Answers]] = []
    for part, held in parts.items():
        for number, one in enumerate(held):
            answers = {name: by_part[part][number] for name, by_part in by_head.items()}
            if all(answer.rounds for answer in answers.values()):
                found.append((Question(one.id, one.source, one.category, ("",)), {part: answers}))
    return conditions(found)
