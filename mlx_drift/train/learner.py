"""One step of training: the gradients of some texts, clipped, and AdamW."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.train.layout import Text
from mlx_drift.train.losses import LOSSES
from mlx_drift.train.objective import Objective, Row
from mlx_drift.train.ranges import Range, check_numbers
from mlx_drift.train.rows import see

BETAS = [0.9, 0.95]
"""AdamW's, as in SafeAILab/EAGLE."""

LOWEST = 0.1
"""What share of its peak the learning rate ends at."""

RANGES = {
    **dict.fromkeys(("iters", "batch_size", "steps", "save_every"), Range(1)),
    **dict.fromkeys(("steps_per_report", "steps_per_eval"), Range(1)),
    **dict.fromkeys(("rank", "patience", "seed"), Range(0)),
    **dict.fromkeys(("learning_rate", "decay"), Range(0, 1, above=True)),
    **dict.fromkeys(("warmup", "weight_decay"), Range(0, 1)),
    "max_grad_norm": Range(0, above=True),
    "num_draft_tokens": Range(1, MAX_DRAFT_TOKENS),
}
"""Of the numbers of a `Recipe`."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained. Names are `mlx_lm.lora`'s where it has them.

    Attributes:
        iters: Steps of the optimizer, at most.
        batch_size: Texts a step. They run one after another, so memory is that of one.
        learning_rate: At its peak.
        warmup: Over what share of the steps it rises; then it falls as a cosine.
        weight_decay: AdamW's.
        max_grad_norm: What gradients are clipped to.
        steps: Of the train-time test: how deep a chain is trained.
        loss: A name of `LOSSES`.
        decay: What a step of it weighs beside the one before.
        rank: Of low-rank factors, merged at the end; 0 trains the whole head.
        grad_checkpoint: Compute again instead of keeping: less memory, more time.
        save_every: Steps between checkpoints.
        steps_per_report: Steps between reports of the loss.
        steps_per_eval: Steps between measurements of the acceptance.
        patience: After how many of those without a rise it stops; 0 for never.
        num_draft_tokens: Drafts a round, of what is measured.
        seed: Of the order, and of low-rank factors.
    """

    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int = 4
    loss: str = "soft-ce"
    decay: float = 0.8
    rank: int = 0
    grad_checkpoint: bool = False
    save_every: int = 100
    steps_per_report: int = 10
    steps_per_eval: int = 200
    patience: int = 3
    num_draft_tokens: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        check_numbers(self, RANGES)
        if self.loss not in LOSSES:
            raise DriftError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")

    @property
    def objective(self) -> Objective:
        """What is minimized."""
        return Objective(self.steps, self.loss, self.decay, self.grad_checkpoint)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, the first being 0."""
        rising = round(self.warmup * self.iters)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        gone = (step - rising) / max(1, self.iters - rising)
        share = LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))
        return self.learning_rate * share


class NotFinite(DriftError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class Learned:
    """What a step came to.

    Attributes:
        loss: The mean over the texts, each weighing as many positions as count in it.
        norm: Of the gradients, before they were clipped.
        tokens: The target read.
        counted: Positions that counted.
    """

    loss: float
    norm: float
    tokens: int
    counted: int


class Learner:
    """A head in training, and its optimizer.

    Args:
        target: The target, capturing the drafter's taps.
        drafter: The head, loaded to be trained.
        recipe: How.
    """

    def __init__(self, target: Target, drafter: ChainDrafter, recipe: Recipe):
        self.target, self.drafter, self.recipe = target, drafter, recipe
        self.network = cast(Any, drafter.network)
        self.objective = recipe.objective
        self.optimizer = optim.AdamW(
            recipe.learning_rate,
            betas=BETAS,
            weight_decay=recipe.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.network.trainable_parameters())
        mx.eval(self.optimizer.state)
        self._grade = nn.value_and_grad(self.network, lambda row: self.objective(drafter, row))

    def learn(self, texts: Sequence[Text], step: int) -> Learned:
        """Takes one step.

        Args:
            texts: The batch; a text in which nothing counts changes nothing.
            step: Its number, from 0.

        Raises:
            NotFinite: If the loss or its gradients are not finite; nothing is changed then.
        """
        total: Any = None
        loss, counted = 0.0, 0
        for text in texts:
            row = self.see(text)
            weight = int(row.counted[1:].sum().item())  # type: ignore[arg-type]
            if not weight:
                continue
            value, gradients = self._grade(row)
            gradients = tree_map(lambda g, w=weight: g * w, gradients)
            if total is not None:
                gradients = tree_map(mx.add, total, gradients)
            total = gradients
            mx.eval(total, value)
            loss += weight * value.item()
            counted += weight
        tokens = sum(len(text.tokens) for text in texts)
        if total is None:
            return Learned(0.0, 0.0, tokens, 0)
        gradients = tree_map(lambda g: g / counted, total)
        gradients, norm = optim.clip_grad_norm(gradients, self.recipe.max_grad_norm)
        learned = Learned(loss / counted, float(norm.item()), tokens, counted)
        if not (math.isfinite(learned.loss) and math.isfinite(learned.norm)):
            what = "the loss" if not math.isfinite(learned.loss) else "the gradients' norm"
            raise NotFinite(f"{what} of step {step + 1} is not a finite number")
        self.optimizer.learning_rate = self.recipe.rate(step)
        self.optimizer.update(self.network, gradients)
        mx.eval(self.network.parameters(), self.optimizer.state)
        return learned

    def see(self, text: Text) -> Row:
        """Runs the target over a text."""
        tokens = mx.array(text.tokens, dtype=mx.int32)
        return see(self.target, self.drafter, tokens, mx.array(text.learned))

    def loss(self, text: Text) -> tuple[float, int]:
        """Returns the loss of a text that is not learned from, and how many positions counted."""
        row = self.see(text)
        counted = int(row.counted[1:].sum().item())  # type: ignore[arg-type]
        loss = float(self.objective(self.drafter, row).item())  # type: ignore[arg-type]
        mx.clear_cache()
        return loss, counted

    @property
    def state(self) -> dict[str, mx.array]:
        """All arrays that training goes on from, by name."""
        parts = {"weights": self.network.trainable_parameters(), "optimizer": self.optimizer.state}
        return dict(tree_flatten(parts))

    @state.setter
    def state(self, arrays: dict[str, mx.array]) -> None:
        parts = tree_unflatten(list(arrays.items()))
        self.network.update(parts["weights"])
        self.optimizer.state = parts["optimizer"]
        mx.eval(self.network.parameters(), self.optimizer.state)
