"""Answers that survive the run: a file of one a line, each written as soon as it is there.

A run that was killed goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.nn as nn

from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.files.line_file import LineFile
from mlx_drift.measure.acceptance.asking import Answer, Answers, Settings
from mlx_drift.measure.acceptance.questions import Question

FORMAT_VERSION = 1

MOST_TOKENS = 1 << 31
"""No prompt has more: positions are int32."""


@dataclass(frozen=True)
class Task:
    """One question to be asked, under one condition or several that share their prompt.

    Attributes:
        question: The question.
        name: What the task does with the question; unique among the question's tasks.
        gives: What it answers: by condition the names of the drafters, both in their order.
        ask: Does it.
    """

    question: Question
    name: str
    gives: Mapping[str, Iterable[str]]
    ask: Callable[[], Answers]


def describe(
    model: nn.Module, drafters: Mapping[str, Drafter], settings: Settings, **others: Any
) -> dict[str, Any]:
    """Returns all that answers depend on besides the question, as JSON has it.

    Args:
        model: The target.
        drafters: The drafters by name.
        settings: How answers are generated.
        others: Whatever else they depend on.
    """
    how = asdict(settings)
    if settings.tree is None:  # files of chains are as they were before there were trees
        del how["tree"]
    described = {
        **how,
        "target": fingerprint(model),
        "drafter_order": list(drafters),  # the first is the base
        "drafters": {
            name: {
                "weights": fingerprint(drafter.network),
                "config": _config_digest(drafter),
                "taps": list(drafter.taps),
                "window": getattr(drafter, "window", None),
                "sinks": getattr(drafter, "sinks", None),
                "shortest": getattr(drafter, "shortest", None),  # of prompt lookup
            }
            for name, drafter in drafters.items()
        },
        **others,
    }
    told: dict[str, Any] = json.loads(json.dumps(described))
    return told


class AnswerFile:
    """Answers that survive the run, one a line; a context manager. Without a path it keeps none.

    Args:
        path: The file; it goes on if it is there.
        settings: What the answers depend on: `describe`.

    Raises:
        DriftError: If the file is of other settings, damaged, no file of answers, in use by another
            run, or cannot be read and written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._known: dict[tuple[str, str], tuple[int, Answers]] = {}
        self._file: LineFile | None = None
        self._lock = None
        if path is None:
            return
        advice = "give another file to --save"
        self._most = settings["num_draft_tokens"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("ab")
            flock(self._lock, LOCK_EX | LOCK_NB)  # it goes with the process
            self._file = LineFile(path, "answers", FORMAT_VERSION, settings, self._take, advice)
        except DriftError:
            self._close()
            raise
        except BlockingIOError:
            self._close()
            raise DriftError(f"{path}: another run is writing to it; {advice}") from None
        except OSError as error:
            self._close()
            raise DriftError(f"{path}: cannot be written ({error.strerror})") from None

    def __enter__(self) -> "AnswerFile":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._close()

    def find(self, task: Task) -> Answers | None:
        """Returns the answers of a task, if they are there.

        Raises:
            DriftError: If they are not of the conditions and drafters that the task asks.
        """
        number, answers = self._known.get((_digest(task.question), task.name), (0, None))
        if answers is not None and _names(answers) != _names(task.gives):
            assert self._file is not None
            raise self._file.damaged(number)
        return answers

    def add(self, task: Task, answers: Answers) -> None:
        """Writes the answers of a task.

        Raises:
            DriftError: If the disk does not take them.
        """
        if self._file is None:
            return
        self._file.append(
            {
                "question": f"{task.question.source}/{task.question.id}",
                "fingerprint": _digest(task.question),
                "task": task.name,
                "answers": {
                    condition: {name: asdict(answer) for name, answer in by_drafter.items()}
                    for condition, by_drafter in answers.items()
                },
            }
        )

    def _close(self) -> None:
        """Gives the file, and its lock, back."""
        if self._lock is not None:
            self._lock.close()

    def _take(self, number: int, value: Any) -> None:
        answers = {
            condition: {name: _answer(answer, self._most) for name, answer in by_drafter.items()}
            for condition, by_drafter in value["answers"].items()
        }
        self._known[value["fingerprint"], value["task"]] = number, answers


def collect(
    tasks: Sequence[Task],
    file: AnswerFile,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Question, Answers]]:
    """Does all tasks, but those that a file has the answers of.

    Args:
        tasks: What is to be asked.
        file: Where answers come from and go to.
        progress: Told how many tasks are done, of how many.

    Raises:
        DriftError: If the file's answers are not those of the tasks, before any is done.
    """
    found = []
    known = [file.find(task) for task in tasks]
    progress(0, len(tasks))
    for done, (task, answers) in enumerate(zip(tasks, known, strict=True), 1):
        if answers is None:
            answers = task.ask()
            file.add(task, answers)
        found.append((task.question, answers))
        progress(done, len(tasks))
    return found


def _answer(value: dict[str, Any], most: int) -> Answer:
    """Reads an answer of a file.

    Args:
        value: What the file says.
        most: Drafts a round.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: If it is none.
    """
    rounds = tuple((int(tested), int(accepted)) for tested, accepted in value["rounds"])
    prompt_tokens = tuple(int(tokens) for tokens in value["prompt_tokens"])
    if not rounds or not all(0 <= accepted <= tested <= most for tested, accepted in rounds):
        raise ValueError
    if not prompt_tokens or not all(0 < tokens < MOST_TOKENS for tokens in prompt_tokens):
        raise ValueError
    ranks = tuple((int(a), int(b), int(c)) for a, b, c in value.get("ranks", ()))
    if not all(0 <= level < most and 0 <= rank <= most and n > 0 for level, rank, n in ranks):
        raise ValueError
    return Answer(prompt_tokens, rounds, ranks)


def _names(by_condition: Mapping[str, Iterable[str]]) -> list[tuple[str, list[str]]]:
    """Returns the conditions and the drafters of each, in order."""
    return [(condition, list(by_drafter)) for condition, by_drafter in by_condition.items()]


def _config_digest(drafter: Drafter) -> str | None:
    """Returns what tells apart drafters of the same weights; None if they have no config."""
    config = getattr(drafter, "config", None)
    if config is None:
        return None
    told = {k: v for k, v in config.to_dict().items() if k not in ("source", "provenance")}
    d2t = getattr(drafter, "_d2t", None)
    data = json.dumps([told, None if d2t is None else d2t.tolist()], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def _digest(question: Question) -> str:
    """Returns what tells a question from all others."""
    return hashlib.sha256(json.dumps(asdict(question)).encode()).hexdigest()[:16]
