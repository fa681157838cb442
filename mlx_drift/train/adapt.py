"""`adapt_drafter`: a head and a target in, the head adapted to that target out."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.convert.write import free_path, written_whole
from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import read_config
from mlx_drift.drafters.load import WEIGHTS, load_converted
from mlx_drift.errors import DriftError, printable
from mlx_drift.files.hub import check_upload_repo, upload_folder
from mlx_drift.loading import find_drafter
from mlx_drift.measure.acceptance.count import ALL, Condition
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.context import longest_text
from mlx_drift.target.model import Target
from mlx_drift.train.answers import Answerer, Asking
from mlx_drift.train.card import adapted_card
from mlx_drift.train.checkpoint import Progress
from mlx_drift.train.compare import compare
from mlx_drift.train.conversations import (
    Data,
    check_conversations,
    hold_out,
    read_conversations,
    read_data,
)
from mlx_drift.train.head import load_trainable
from mlx_drift.train.held_out import Held
from mlx_drift.train.layout import Layout, Text
from mlx_drift.train.learner import Learner, Recipe
from mlx_drift.train.loop import Loop, Tell
from mlx_drift.train.memory import estimate_memory
from mlx_drift.train.plan import Plan, make_plan
from mlx_drift.train.repetition import distinct, said
from mlx_drift.train.run import Run, run_folder
from mlx_drift.train.scratch import Kind, lazy_head, scratch_config, write_scratch_head
from mlx_drift.train.texts import Gathering

HELD_OUT, CONTROL = "held out", "control"
BEFORE, AFTER = "before", "after"
REPORT = "adapted.json"
QUESTIONS = 256
"""That the target asks itself, if nothing else is said."""


@dataclass(frozen=True)
class Adapted:
    """What came of it.

    Attributes:
        path: The folder of the adapted head.
        progress: The steps, and what was measured on the way.
        measured: Acceptance before and after, and that of prompt lookup: on what was held out, and
            on the control.
        distinct: The share of distinct 4-grams in what was held out, of all and by category: near
            0, the target repeats itself, and any drafter looks good.
        texts: How many it learned from.
        seconds: What training took, this time.
        notes: What the user should know, a line each.
        url: Where it was uploaded to, if it was.
    """

    path: Path
    progress: Progress
    measured: list[Condition]
    distinct: dict[str, float]
    texts: int
    seconds: float
    notes: list[str]
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return {
            "path": str(self.path),
            **asdict(self.progress),
            "texts": self.texts,
            "seconds": self.seconds,
            "distinct_4_grams": self.distinct,
            "conditions": [condition.to_dict() for condition in self.measured],
            "notes": self.notes,
            "url": self.url,
        }


class Stopped(Exception):
    """It was asked to stop before it was done; the run's folder has what it goes on from."""

    def __init__(self, run: Path, step: int):
        super().__init__(f"stopped after step {step}; {run} has what it goes on from")
        self.run, self.step = run, step


class Adaptation:
    """A head, a target and data: read and checked, nothing computed yet.

    Args:
        model: The target, as `mlx_lm.load` returns it: quantized, with adapters, as it is used.
        tokenizer: Its tokenizer.
        drafter: The head, as for `load_drafter`: EAGLE-1/2, EAGLE-3, EAGLE-3.1, P-EAGLE or MTP;
            None to begin from nothing.
        data: What it learns from, as for `mlx_drift.train.conversations.read_data`; None for
            questions that the target asks itself.
        answers: `self`: the target answers the questions in the data itself; `given`: the answers
            in the data are learned from.
        recipe: How it is trained.
        asking: How the target answers.
        wordings: Chat templates and system prompts; each conversation draws one.
        limit: So many of the first conversations of each file, or questions of the target's own;
            None for all, or `QUESTIONS`.
        control: A file of unrelated questions, to measure what was forgotten on.
        from_scratch: Which head to begin from nothing, where there is none.
        draft_vocab_size: Of that, the size of its vocabulary.
        revision: The drafter's branch, tag or commit on the Hub.

    Raises:
        DriftError: If anything is missing, damaged or does not fit, or the training would take
            more memory than there is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        drafter: str | None,
        data: str | None,
        *,
        answers: Literal["self", "given"] = "self",
        recipe: Recipe | None = None,
        asking: Asking | None = None,
        wordings: Sequence[Wording] = (Wording(),),
        limit: int | None = None,
        control: str | None = None,
        from_scratch: Kind | None = None,
        draft_vocab_size: int | None = None,
        revision: str | None = None,
    ):
        self.recipe, self.asking = recipe or Recipe(), asking or Asking()
        self.model, self.tokenizer = model, tokenizer
        self.drafter, self.given = drafter, answers == "given"
        if (drafter is None) == (from_scratch is None):
            raise DriftError("a head to adapt, or a kind to train from scratch: give one of them")
        if data is None and self.given:
            raise DriftError("there are no answers without data; give some, or let answers be self")
        if drafter is None and self.asking.num_draft_tokens:
            raise DriftError("without a head there are no drafts to answer with: let them be 0")
        self.data = None if data is None else read_data(data, limit, self.recipe.seed)
        self.questions = limit or QUESTIONS
        self.controls = read_conversations(control, limit) if control is not None else []
        self._check()
        self.layout = Layout(tokenizer, wordings, self.asking.seed)
        frozen = None
        if drafter is not None:
            self.folder = find_drafter(drafter, model, revision=revision)
            self.head = load_trainable(
                self.folder, model, rank=self.recipe.rank, seed=self.recipe.seed
            )
            if self.asking.num_draft_tokens:
                frozen = load_converted(self.folder, model)
        else:
            assert from_scratch is not None
            target = Target(model)
            self.config = scratch_config(
                from_scratch, target, draft_vocab_size, self.asking.max_seq_length
            )
            self.head = lazy_head(self.config, target)
        self.target = Target(model, self.head.taps)
        self.memory = estimate_memory(
            self.target, self.head, self.recipe, self.asking.max_seq_length
        )
        self.memory.check()
        self.answerer = Answerer(model, tokenizer, self.layout, self.asking, frozen)

    def _check(self) -> None:
        """Checks that there is something to learn from, and that no text is too long to be read."""
        if self.data is not None:
            check_conversations(self.data.train, given=self.given)
        longest = longest_text(self.model, self.tokenizer)
        if longest is not None and self.asking.max_seq_length > longest[0]:
            raise DriftError(
                f"max_seq_length is {self.asking.max_seq_length}; expected at most {longest[0]}, "
                f"as {longest[1]} says"
            )

    def plan(self) -> Plan:
        """Tells what the training would take; answers a little and takes two steps.

        Raises:
            DriftError: If there is neither data nor a head yet to try it with.
        """
        if self.data is None or self.drafter is None:
            raise DriftError("a dry run times steps of a head on data: give both")
        parts: dict[str, Any] = {"train": self.data.train, "valid": self.data.valid}
        parts |= {"test": self.data.test, "control": self.controls}
        learner = Learner(self.target, self.head, self.recipe)
        return make_plan(learner, self.answerer, parts, self.memory, given=self.given)

    def run(
        self,
        mlx_path: str | Path,
        *,
        name: str | None = None,
        upload_repo: str | None = None,
        stop: Callable[[], bool] = lambda: False,
        tell: Tell = lambda kind, figures: None,
    ) -> Adapted:
        """Trains; arguments and errors are those of `adapt_drafter`."""
        out = free_path(mlx_path)
        check_upload_repo(upload_repo)
        settings = self._settings()
        with Run(run_folder(out), settings) as run:
            gathering = Gathering(self.answerer, run.answers, stop, tell)
            data = self.data or self._own_questions(gathering)
            texts = gathering.to_learn(data.train, given=self.given)
            gathering.check(texts, "learn from")
            held = gathering.to_measure(data.valid)
            gathering.check(held, "measure on")
            tested = gathering.to_measure(data.test) or held
            unrelated = gathering.to_measure(self.controls)
            if gathering.stopped:
                raise Stopped(run.path, 0)
            head, folder = self._head_of(run.path, texts)
            started = time.perf_counter()
            learner = Learner(self.target, head, self.recipe)
            loop = Loop(learner, texts, held, self.layout.stops, run, folder, tell)
            progress = loop.train(stop)
            if not progress.finished:
                raise Stopped(run.path, progress.step)
            seconds = time.perf_counter() - started

            def heed_stop() -> None:
                if stop():
                    raise Stopped(run.path, progress.step)

            measured = compare(
                self.model,
                {BEFORE: folder, AFTER: run.best},
                {HELD_OUT: tested, CONTROL: unrelated},
                self.recipe.num_draft_tokens,
                self.layout.stops,
                heed_stop,
            )
            notes = list(gathering.notes)
            if self.drafter is not None and (q := read_config(folder).quantization) is not None:
                notes.append(
                    f"the head was quantized to {q.bits} bits: its dequantized values were "
                    "trained, and what is written is not quantized (mlx-drift convert -q does that)"
                )
            if not progress.best_step:
                notes.append("acceptance on what was held out never rose: the head is as it was")
            done = Adapted(out, progress, measured, _distinct(tested), len(texts), seconds, notes)
            self._write(done, run, folder, settings, name, upload_repo)
        if upload_repo is None:
            return done
        try:
            return replace(done, url=upload_folder(out, upload_repo))
        except DriftError as error:
            raise DriftError(f"{error}; the adapted head is in {out}") from None

    def _settings(self) -> dict[str, Any]:
        """Returns all that the result depends on."""
        read = self.data
        parts = None if read is None else (read.train, read.valid, read.test)
        return {
            **asdict(self.recipe),
            **{f"answers_{name}": value for name, value in asdict(self.asking).items()},
            "answers": "given" if self.given else "self",
            "wordings": [asdict(wording) for wording in self.layout.wordings],
            "data": self.questions if parts is None else [[c.digest for c in p] for p in parts],
            "control": [one.digest for one in self.controls],
            "target": fingerprint(self.model),
            "drafter": self.config.to_dict()
            if self.drafter is None
            else fingerprint(self.head.network),
        }

    def _own_questions(self, gathering: Gathering) -> Data:
        """Lets the target ask itself, and holds some questions out."""
        asked = gathering.own_questions(self.questions)
        if gathering.stopped:
            return Data([], [])
        return Data(*hold_out(asked, "the target's own questions", self.recipe.seed))

    def _head_of(self, run: Path, texts: Sequence[Text]) -> tuple[ChainDrafter, Path]:
        """Returns the head to train, and its folder; a new one if there is none."""
        if self.drafter is not None:
            return self.head, self.folder
        folder = run / "start"
        if not (folder / "config.json").exists():
            write_scratch_head(folder, self.config, self.target, texts, self.recipe.seed)
        rank, seed = self.recipe.rank, self.recipe.seed
        return load_trainable(folder, self.model, rank=rank, seed=seed), folder

    def _write(
        self,
        done: Adapted,
        run: Run,
        folder: Path,
        settings: dict[str, Any],
        name: str | None,
        upload_repo: str | None,
    ) -> None:
        """Writes the result: the best head, its figures, its card."""
        with written_whole(done.path) as partial:
            for file in ("config.json", WEIGHTS):
                (partial / file).write_bytes((run.best / file).read_bytes())
            report = {"settings": settings, **done.to_dict()}
            (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            called = upload_repo or printable(done.path.name)
            original = None if self.drafter is None else printable(self.drafter)
            card = adapted_card(called, folder, original, name, done, settings)
            (partial / "README.md").write_text(card, encoding="utf-8")


def _distinct(held: Sequence[Held]) -> dict[str, float]:
    """Returns the share of distinct 4-grams in all that was said, then by category."""
    groups = {ALL: [text for one in held for text in one.texts]}
    for one in held:
        groups.setdefault(one.category, []).extend(one.texts)
    return {name: distinct(said(texts)) for name, texts in groups.items()}


def adapt_drafter(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafter: str | None,
    data: str | None,
    mlx_path: str | Path,
    *,
    name: str | None = None,
    upload_repo: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda kind, figures: None,
    **options: Any,
) -> Adapted:
    """Trains a head for a target, on what the target itself says.

    Beside `mlx_path` stands the folder of the run, `mlx_path` with `.run` behind it: answers, the
    last checkpoint, the best head so far. Called again with the same arguments after it was cut
    short, it goes on there and comes to the very same weights. It may be removed at the end.

    Args:
        model: The target; this and the next three are as in `Adaptation`.
        tokenizer: See `model`.
        drafter: See `model`.
        data: See `model`.
        mlx_path: The folder to write; it must not exist.
        name: What the card calls the target.
        upload_repo: A Hub repository to upload the result to.
        stop: Asked after each answer, step and text that is measured on whether to stop.
        tell: Told of `answers`, `train` and `valid`, with figures under mlx-lm's names.
        options: Further keywords of `Adaptation`: `answers, recipe, asking, wordings, limit,
            control, from_scratch, draft_vocab_size, revision`.

    Raises:
        DriftError: If anything is missing, damaged or does not fit, the training would take more
            memory than there is, or the loss is no number.
        Stopped: If `stop` said so.
    """
    adaptation = Adaptation(model, tokenizer, drafter, data, **options)
    return adaptation.run(mlx_path, name=name, upload_repo=upload_repo, stop=stop, tell=tell)
