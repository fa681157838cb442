"""The loop: step after step, and every so often the acceptance on what is held out.

The head that accepted most is kept. A loop that is cut short, at whatever moment, goes on from its
last checkpoint and comes to the very same weights.
"""

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_drift.errors import DriftError
from mlx_drift.measure.acceptance.asking import Answer
from mlx_drift.train.checkpoint import Progress, load_checkpoint, order, save_checkpoint
from mlx_drift.train.head_file import read_head, write_head
from mlx_drift.train.held_out import Held, acceptance_length, replay_all
from mlx_drift.train.layout import Text
from mlx_drift.train.learner import Learner, NotFinite
from mlx_drift.train.low_rank import merged
from mlx_drift.train.run import Run

Tell = Callable[[str, dict[str, Any]], None]
"""Told what happens: its kind, and its figures under mlx-lm's names."""


class Loop:
    """Trains a head in the folder of a run.

    Args:
        learner: The head and its optimizer.
        texts: What it learns from.
        held: What it is measured on.
        stops: Tokens that end an answer.
        run: The folder; the loop goes on from its checkpoint, if there is one.
        original: The folder of the head as it was.
        tell: Told of losses and acceptances.
    """

    def __init__(
        self,
        learner: Learner,
        texts: Sequence[Text],
        held: Sequence[Held],
        stops: Collection[int],
        run: Run,
        original: Path,
        tell: Tell,
    ):
        self.learner, self.texts, self.held, self.stops = learner, texts, held, stops
        self.run, self.original, self.tell = run, original, tell
        self.progress = Progress()
        if run.checkpoint.exists():
            learner.state, self.progress = load_checkpoint(run.checkpoint, learner.state)
            if self.progress.history:
                self._check_best()

    def _check_best(self) -> None:
        """Checks that the best head so far is there: a training that goes on may not better it."""
        try:
            read_head(self.run.best)
        except DriftError:
            raise DriftError(
                f"{self.run.best}: damaged, or not there; remove {self.run.checkpoint}, and the "
                "training begins anew, on the answers beside it"
            ) from None

    def train(self, stop: Callable[[], bool] = lambda: False) -> Progress:
        """Trains to the end, or until `stop` says so, after a step or while it measures.

        Either is saved; what was being measured is measured anew.

        Raises:
            DriftError: If the loss is no number; the last checkpoint and the best head are kept.
        """
        recipe, progress = self.learner.recipe, self.progress
        losses: list[float] = []
        since, tokens = time.perf_counter(), progress.tokens
        while True:
            if self._is_due():
                started = time.perf_counter()
                if not self._measure(stop):
                    break
                since += time.perf_counter() - started
            if progress.finished or stop():
                break
            drawn = order(progress.step, recipe.batch_size, len(self.texts), recipe.seed)
            try:
                learned = self.learner.learn([self.texts[i] for i in drawn], progress.step)
            except NotFinite as error:
                raise DriftError(
                    f"{error}; the best head so far, of step {progress.best_step}, is in "
                    f"{self.run.best}. Begin anew with a smaller --learning-rate"
                ) from None
            progress.step += 1
            progress.tokens += learned.tokens
            losses.append(learned.loss)
            mx.clear_cache()
            if progress.step % recipe.steps_per_report == 0 or progress.step == recipe.iters:
                seconds = time.perf_counter() - since
                self._tell(
                    "train",
                    iteration=progress.step,
                    train_loss=sum(losses) / len(losses),
                    learning_rate=recipe.rate(progress.step - 1),
                    iterations_per_second=len(losses) / seconds,
                    tokens_per_second=(progress.tokens - tokens) / seconds,
                    trained_tokens=progress.tokens,
                    peak_memory=mx.get_peak_memory() / 1e9,
                )
                losses, since, tokens = [], time.perf_counter(), progress.tokens
            if progress.step % recipe.save_every == 0:
                self._save()
        if not progress.finished:
            self._save()
        return progress

    def _is_due(self) -> bool:
        """Tells whether acceptance is to be measured before the next step."""
        recipe, step = self.learner.recipe, self.progress.step
        measured = self.progress.history and self.progress.history[-1]["step"] == step
        return not measured and (step % recipe.steps_per_eval == 0 or step == recipe.iters)

    def _measure(self, stop: Callable[[], bool]) -> bool:
        """Measures acceptance, keeps the head if it is the best, and saves; False if stopped."""
        progress, recipe, learner = self.progress, self.learner.recipe, self.learner
        started, before = time.perf_counter(), progress.best
        answers: list[Answer] = []
        losses: list[tuple[float, int]] = []
        for held in self.held:
            if stop():
                return False
            answers += replay_all(
                learner.target, learner.drafter, [held], recipe.num_draft_tokens, self.stops
            )
            losses += [learner.loss(text) for text in held.texts]
        found = acceptance_length(answers)
        counted = sum(count for _, count in losses)
        loss = sum(one * count for one, count in losses) / max(1, counted)
        progress.history.append(
            {"step": progress.step, "acceptance_length": found, "val_loss": loss}
        )
        if found > before:
            progress.best_step = progress.step
            write_head(self.run.best, merged(self.learner.network), self.original)
        rises = [one["step"] > progress.best_step for one in progress.history]
        stuck = recipe.patience and sum(rises) >= recipe.patience
        progress.finished = progress.step >= recipe.iters or bool(stuck)
        self._save()
        self._tell(
            "valid",
            iteration=progress.step,
            val_loss=loss,
            val_time=time.perf_counter() - started,
            acceptance_length=found,
            best_iteration=progress.best_step,
        )
        return True

    def _save(self) -> None:
        save_checkpoint(self.run.checkpoint, self.learner.state, self.progress)

    def _tell(self, kind: str, **figures: Any) -> None:
        self.run.note({"kind": kind, **figures})
        self.tell(kind, figures)
