"""`adapt_drafter`: a head and a target in, the head adapted to that target out."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.convert.write import check_free, written_whole
from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.load import WEIGHTS, load_converted
from mlx_drift.errors import DriftError, printable
from mlx_drift.files.hub import split_repository, upload_folder
from mlx_drift.loading import find_drafter
from mlx_drift.measure.acceptance.asking import Answer
from mlx_drift.measure.acceptance.count import Condition, conditions
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.target.model import Target
from mlx_drift.train.answers import Answerer, Asking, distinct
from mlx_drift.train.card import adapted_card
from mlx_drift.train.checkpoint import Progress
from mlx_drift.train.conversations import read_conversations, read_data
from mlx_drift.train.head import load_trainable
from mlx_drift.train.held_out import Held, replay_all
from mlx_drift.train.layout import Layout
from mlx_drift.train.learner import Learner, Recipe
from mlx_drift.train.loop import Loop, Tell
from mlx_drift.train.memory import estimate_memory
from mlx_drift.train.run import Run
from mlx_drift.train.texts import Gathering

HELD_OUT, CONTROL = "held out", "control"
BEFORE, AFTER = "before", "after"
REPORT = "adapted.json"

Answers = Literal["self", "given"]


@dataclass(frozen=True)
class Adapted:
    """What came of it.

    Attributes:
        path: The folder of the adapted head.
        progress: The steps, and what was measured on the way.
        measured: Acceptance before and after: on what was held out, and on the control.
        distinct: The share of distinct 4-grams in what was held out: near 0, the target repeats
            itself, and any drafter looks good.
        texts: How many it learned from.
        seconds: What training took, this time.
        notes: What the user should know, a line each.
        url: Where it was uploaded to, if it was.
    """

    path: Path
    progress: Progress
    measured: list[Condition]
    distinct: float
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


def adapt_drafter(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafter: str,
    data: str,
    mlx_path: str | Path,
    *,
    answers: Answers = "self",
    recipe: Recipe | None = None,
    asking: Asking | None = None,
    wordings: Sequence[Wording] = (Wording(),),
    limit: int | None = None,
    control: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    upload_repo: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda kind, figures: None,
) -> Adapted:
    """Trains a head for a target, on what the target itself says.

    Beside `mlx_path` stands the folder of the run, `mlx_path` with `.run` behind it: answers, the
    last checkpoint, the best head so far. Called again with the same arguments after it was cut
    short, it goes on there and comes to the very same weights. It may be removed at the end.

    Args:
        model: The target, as `mlx_lm.load` returns it: quantized, with adapters, as it is used.
        tokenizer: Its tokenizer.
        drafter: The head, as for `load_drafter`: EAGLE-1/2, EAGLE-3, EAGLE-3.1 or MTP, unquantized.
        data: What it learns from, as for `mlx_drift.train.conversations.read_data`.
        mlx_path: The folder to write; it must not exist.
        answers: `self`: the target answers the questions in the data itself; `given`: the answers
            in the data are learned from.
        recipe: How it is trained.
        asking: How the target answers.
        wordings: Chat templates and system prompts; each conversation draws one.
        limit: So many of the first conversations of each file; None for all.
        control: A file of unrelated questions, to measure what was forgotten on.
        name: What the card calls the target.
        revision: The drafter's branch, tag or commit on the Hub.
        upload_repo: A Hub repository to upload the result to.
        stop: Asked after each answer and step whether to stop.
        tell: Told of `answers`, `train` and `valid`, with figures under mlx-lm's names.

    Raises:
        DriftError: If anything is missing, damaged or does not fit, the training would take more
            memory than there is, or the loss is no number.
        Stopped: If `stop` said so.
    """
    recipe, asking = recipe or Recipe(), asking or Asking()
    out = Path(mlx_path).expanduser()
    check_free(out)
    if upload_repo is not None and split_repository(upload_repo) != (upload_repo, ""):
        raise DriftError(f"{upload_repo}: expected a Hub repository as owner/name to upload to")
    read = read_data(data, limit, recipe.seed)
    controls = read_conversations(control, limit) if control is not None else []
    folder = find_drafter(drafter, model, revision=revision)
    trained = load_trainable(folder, model, rank=recipe.rank, seed=recipe.seed)
    target = Target(model, trained.taps)
    estimate_memory(target, trained, recipe, asking.max_seq_length).check()
    settings = {
        **asdict(recipe),
        **{f"answers_{name}": value for name, value in asdict(asking).items()},
        "answers": answers,
        "wordings": [asdict(wording) for wording in wordings],
        "data": [[one.digest for one in part] for part in (read.train, read.valid, read.test)],
        "control": [one.digest for one in controls],
        "target": fingerprint(model),
        "drafter": fingerprint(trained.network),
    }
    with Run(out.with_name(f"{out.name}.run"), settings) as run:
        layout = Layout(tokenizer, wordings, asking.seed)
        frozen = load_converted(folder, model) if asking.num_draft_tokens else None
        answerer = Answerer(model, tokenizer, layout, asking, frozen)
        gathering = Gathering(answerer, run.answers, stop, tell)
        texts = gathering.to_learn(read.train, given=answers == "given")
        held = gathering.to_measure(read.valid)
        tested = gathering.to_measure(read.test) or held
        unrelated = gathering.to_measure(controls)
        if gathering.stopped:
            raise Stopped(run.path, 0)
        if not texts or not held:
            what = "learn from" if not texts else "measure on"
            raise DriftError(f"{data}: nothing is left to {what}. {'; '.join(gathering.notes)}")
        started = time.perf_counter()
        learner = Learner(target, trained, recipe)
        loop = Loop(learner, texts, held, layout.stops, run, folder, tell)
        progress = loop.train(stop)
        if not progress.finished:
            raise Stopped(run.path, progress.step)
        seconds = time.perf_counter() - started
        measured = compare(
            model,
            {BEFORE: folder, AFTER: run.best},
            {HELD_OUT: tested, CONTROL: unrelated},
            recipe.num_draft_tokens,
            layout,
        )
        said = [t.tokens[a:b] for one in tested for t in one.texts for a, b in t.said]
        notes = list(gathering.notes)
        if not progress.best_step:
            notes.append("acceptance on what was held out never rose: the head is as it was")
        done = Adapted(out, progress, measured, distinct(said), len(texts), seconds, notes)
        with written_whole(out) as partial:
            for file in ("config.json", WEIGHTS):
                (partial / file).write_bytes((run.best / file).read_bytes())
            report = {"settings": settings, **done.to_dict()}
            (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            card = adapted_card(
                upload_repo or printable(out.name), folder, printable(drafter), name, done, settings
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
    if upload_repo is None:
        return done
    try:
        url = upload_folder(out, upload_repo)
    except DriftError as error:
        raise DriftError(f"{error}; the adapted head is in {out}") from None
    return Adapted(**{**vars(done), "url": url})


def compare(
    model: nn.Module,
    heads: dict[str, Path],
    parts: dict[str, Sequence[Held]],
    steps: int,
    layout: Layout,
) -> list[Condition]:
    """Measures heads as they will be used: in the target's dtype, packed and folded.

    Args:
        model: The target.
        heads: Their folders, by what they are called; the first is what others are held against.
        parts: What they are measured on.
        steps: Drafts a round.
        layout: Says what ends an answer.
    """
    found: list[tuple[Question, dict[str, dict[str, Answer]]]] = []
    by_head: dict[str, dict[str, list[Answer]]] = {}
    for name, folder in heads.items():
        drafter = load_converted(folder, model)
        assert isinstance(drafter, ChainDrafter)
        target = Target(model, drafter.taps)
        by_head[name] = {
            part: replay_all(target, drafter, held, steps, layout.stops)
            for part, held in parts.items()
        }
    for part, held in parts.items():
        for number, one in enumerate(held):
            answers = {name: by_part[part][number] for name, by_part in by_head.items()}
            if all(answer.rounds for answer in answers.values()):
                found.append((Question(one.id, one.source, one.category, ("",)), {part: answers}))
    return conditions(found)
