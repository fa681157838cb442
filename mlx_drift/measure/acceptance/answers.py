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
from mlx_drift.errors import DriftError, brief
from mlx_drift.measure.acceptance.asking import Answer, Answers, Settings
from mlx_drift.measure.acceptance.questions import Question

FORMAT = "mlx_drift_answers"
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

    The first line says what the answers depend on. A last line that a killed run left unfinished is
    taken away: its question is asked again.

    Args:
        path: The file; it goes on if it is there.
        settings: What the answers depend on: `describe`.

    Raises:
        DriftError: If the file is of other settings, damaged, no file of answers, in use by another
            run, or cannot be read and written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        self._known: dict[tuple[str, str], tuple[int, Answers]] = {}
        self._stream = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b")
            self._go_on(settings)
        except DriftError:
            self._close()
            raise
        except BlockingIOError:
            self._close()
            raise DriftError(
                f"{path}: another run is writing to it; give another file to --save"
            ) from None
        except OSError as error:
            self._close()
            raise DriftError(f"{path}: cannot be written ({error.strerror})") from None

    def _go_on(self, settings: dict[str, Any]) -> None:
        """Takes what the file has, for this run alone; the lock goes with the process."""
        assert self._stream is not None
        flock(self._stream, LOCK_EX | LOCK_NB)
        self._stream.seek(0)
        data = self._stream.read()
        header = {FORMAT: FORMAT_VERSION, "settings": settings}
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and data and not json.dumps(header).encode().startswith(data):
            raise DriftError(f"{self.path} is not a file of answers; give another one to --save")
        for number, line in enumerate(whole.splitlines(), 1):
            self._take(line, number, settings)
        self._stream.truncate(len(whole))
        if not whole:
            self._write(header)

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
            raise self._damaged(number)
        return answers

    def add(self, task: Task, answers: Answers) -> None:
        """Writes the answers of a task.

        Raises:
            DriftError: If the disk does not take them.
        """
        if self._stream is None:
            return
        try:
            self._write(
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
        except OSError as error:
            raise DriftError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _close(self) -> None:
        """Gives the file, and its lock, back."""
        if self._stream is not None:
            self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _take(self, line: bytes, number: int, settings: dict[str, Any]) -> None:
        """Takes one line of the file."""
        try:
            read = json.loads(line)
            if number == 1:
                if read[FORMAT] != FORMAT_VERSION:
                    raise KeyError
                self._compare(read["settings"], settings)
                return
            most = settings["num_draft_tokens"]
            answers = {
                condition: {name: _answer(value, most) for name, value in by_drafter.items()}
                for condition, by_drafter in read["answers"].items()
            }
            self._known[read["fingerprint"], read["task"]] = number, answers
        except DriftError:  # a ValueError, but one that says what is wrong
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            raise self._damaged(number) from None

    def _damaged(self, number: int) -> DriftError:
        what = "is not a file of answers" if number == 1 else f"is damaged in line {number}"
        return DriftError(f"{self.path} {what}; give another one to --save")

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        """Checks that the file's answers are of the same settings."""
        if (found := _difference(theirs, ours)) is not None:
            where, was, now = found
            raise DriftError(
                f"{self.path} holds answers of other settings: {where} was {brief(was)}, not "
                f"{brief(now)}; give another file to --save"
            )


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


def _difference(theirs: Any, ours: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Finds the first place in which two objects differ, and what is there."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return None if theirs == ours else (where, theirs, ours)
    pairs = ((key, theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours}))
    found = (_difference(a, b, f"{where} {key}".strip()) for key, a, b in pairs)
    return next((one for one in found if one is not None), None)


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
