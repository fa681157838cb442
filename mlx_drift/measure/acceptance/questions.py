"""Question sets: what is asked, whatever the record it comes in.

A file holds JSON records, one a line or all in one list, a CSV table, or plain text, one question a
line. It is local or a data set's on the Hub. What a record is, its fields tell:

- `turns`: FastChat and EAGLE (`question.jsonl`): what the user says, turn by turn
- `messages`: OpenAI chat. The user's are the turns and the system's the system prompt; the
  assistant's are left out, as the target answers for itself
- `question_content`: LiveCodeBench, with its `starter_code` if there is any
- `Question`: GPQA, with its four answers in alphabetical order, so that their places tell nothing
- `problem`: MATH-500
- `instruction`: Alpaca, with its `input` if there is any
- `question`: GSM8K
- `prompt`: HumanEval, and whatever else says so

Other fields (answers, tests) are not looked at, and nothing is ever executed.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_drift.errors import DriftError, brief
from mlx_drift.files.hub import dataset_file
from mlx_drift.files.paths import existing
from mlx_drift.files.text import decode, lone_surrogate

SUFFIXES = ".jsonl", ".ndjson", ".json", ".csv", ".txt"
MOST_BYTES = 4 << 30
"""Of a file that is read line by line: LiveCodeBench's tests weigh more than a gigabyte."""

MOST_AT_ONCE = 64 << 20
"""Bytes of what is read at once: a JSON list, a line."""

CHOICES = "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"
IDS = "question_id", "task_id", "unique_id", "Record ID", "id"

_ON_HUB = re.compile(r"(?:hf://datasets/)?([^/:@]+/[^/:@]+)(?:@([^/:]+))?[:/](.+)")


@dataclass(frozen=True)
class Question:
    """What the user says in one conversation.

    Attributes:
        id: The record's own id, or its line in the file; unique within its source.
        source: The name of the file, or of the data set it is in.
        category: The record's own `category`; else what kind of record it is.
        turns: What the user says, turn by turn.
        system_prompt: What the record says as the system; None if nothing.
    """

    id: str
    source: str
    category: str
    turns: tuple[str, ...]
    system_prompt: str | None = None


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Reads the questions of one file.

    Args:
        path: A local file; or one of a data set on the Hub, as `hf://datasets/owner/name/path` or
            `owner/name:path`, either with `@revision` after the name.
        limit: So many of the first ones; None for all.

    Raises:
        DriftError: If there is no such file, it is too large, or a record is none that is known.
            The message names the file, the line and the field.
    """
    file, source = find_file(str(path))
    found = []
    seen: dict[str, int] = {}
    for place, record in itertools.islice(records(file), limit):
        try:
            question = as_question(record, place.rpartition(" ")[2], source)
        except ValueError as error:
            raise DriftError(f"{path}, {place}: {error}") from None
        count = seen[question.id] = seen.get(question.id, 0) + 1
        found.append(question if count == 1 else replace(question, id=f"{question.id}#{count}"))
    if not found:
        raise DriftError(f"{path}: there are no questions in it")
    return found


def read_question_files(paths: Sequence[str | Path], limit: int | None = None) -> list[Question]:
    """Reads the questions of several files, in turn; sources of the same name get numbers.

    Args:
        paths: As in `read_questions`.
        limit: So many of the first ones of each file; None for all.

    Raises:
        DriftError: As in `read_questions`.
    """
    questions: list[Question] = []
    sources: dict[str, int] = {}
    for path in paths:
        read = read_questions(path, limit)
        source = read[0].source
        count = sources[source] = sources.get(source, 0) + 1
        if count > 1:
            read = [replace(question, source=f"{source}-{count}") for question in read]
        questions += read
    return questions


def find_file(text: str) -> tuple[Path, str]:
    """Returns the local file of a path or data set, and what to call it."""
    path = existing(text)
    if path is None and (match := _ON_HUB.fullmatch(text)) and _names_the_hub(text):
        repo, revision, name = match.groups()
        path, source = dataset_file(repo, name, revision, MOST_BYTES), repo.partition("/")[2]
    elif path is None:
        raise DriftError(
            f"{text}: no such file here. Expected a file of questions, or a data set's on the Hub "
            "as hf://datasets/owner/name/path or owner/name:path"
        )
    else:
        source = path.stem
    if not path.is_file():
        raise DriftError(f"{text}: not a file; expected a file of questions")
    if path.stat().st_size > MOST_BYTES:
        raise DriftError(f"{text}: larger than {MOST_BYTES >> 30} GiB; give a part of it")
    return path, source


def _names_the_hub(text: str) -> bool:
    return text.startswith("hf://datasets/") or ":" in text


def records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields what a file holds, each with the place it is at: JSON values, or text."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".csv":
            yield from _rows(file)
        elif suffix != ".txt" and _is_list(file):
            yield from _elements(file)
        elif suffix in (*SUFFIXES, ""):
            yield from _lines(file, as_json=suffix != ".txt")
        else:
            raise DriftError(
                f"{file}: questions are read from .jsonl, .json, .csv and .txt files, not "
                f"from {suffix}"
            )
    except OSError as error:
        raise DriftError(f"{file}: cannot be read ({error.strerror})") from None


def _lines(file: Path, as_json: bool) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        for number in itertools.count(1):
            line = stream.readline(MOST_AT_ONCE + 1)
            place = f"line {number}"
            if len(line) > MOST_AT_ONCE:
                raise DriftError(f"{file}, {place}: longer than {MOST_AT_ONCE >> 20} MiB")
            if not line:
                return
            text = decode(line, f"{file}, {place}").strip()
            if text:
                yield place, _parse(text, f"{file}, {place}") if as_json else text


def _elements(file: Path) -> Iterator[tuple[str, Any]]:
    text = decode(_whole(file), str(file))
    for number, record in enumerate(_parse(text, str(file)), 1):
        yield f"record {number}", record


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = decode(_whole(file), str(file))
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for number, row in enumerate(reader, 1):
            yield f"record {number}", {name: value for name, value in row.items() if value}
    except csv.Error as error:
        raise DriftError(f"{file}, line {reader.line_num}: not a CSV table ({error})") from None


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _whole(file: Path) -> bytes:
    if file.stat().st_size > MOST_AT_ONCE:
        raise DriftError(
            f"{file}: larger than {MOST_AT_ONCE >> 20} MiB; give one JSON record a line (.jsonl), "
            "which is read line by line"
        )
    return file.read_bytes()


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DriftError(f"{where}: not valid JSON ({error.msg}, character {error.pos})") from None
    except (ValueError, RecursionError):  # a number of too many digits, nested too deeply
        raise DriftError(f"{where}: not valid JSON that can be read") from None


def as_question(record: Any, number: str, source: str) -> Question:
    """Turns a record into a question.

    Raises:
        ValueError: If it is none that is known; the message names the field.
    """
    if isinstance(record, str):
        return Question(number, source, "text", (record,))
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; expected an object")
    kind = next((kind for field, kind in KINDS.items() if field in record), None)
    if kind is None:
        raise ValueError(f"none of the fields {', '.join(KINDS)} is in the record")
    default, read = kind
    category = record.get("category")
    if not isinstance(category, str) or not category.strip():
        category = default
    field = next((field for field in IDS if isinstance(record.get(field), str | int)), None)
    own = number if field is None else _encodable(str(record[field]), field)
    turns, system_prompt = read(record)
    return Question(own, source, _encodable(category, "category"), turns, system_prompt)


Said = tuple[tuple[str, ...], str | None]
"""What the user says in turn, and the system."""


def _turns(record: dict[str, Any]) -> Said:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns is {brief(turns)}; expected a list of texts")
    return tuple(checked_text(turn, f"turns[{i}]") for i, turn in enumerate(turns)), None


def _messages(record: dict[str, Any]) -> Said:
    messages = record["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"messages is {brief(messages)}; expected a list of objects")
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] is {brief(message)}; expected an object")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"messages[{i}].role is {brief(role)}; expected system, user or assistant"
            )
        if role != "assistant":
            said[role].append(content_text(message.get("content"), f"messages[{i}].content"))
    if not said["user"]:
        raise ValueError("messages has none of the user's")
    return tuple(said["user"]), "\n\n".join(said["system"]) or None


def content_text(content: Any, field: str) -> str:
    """Returns the text of a message, which may be in parts.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(content, list):
        return checked_text(content, field)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"{field}[{i}] is {brief(part)}; expected a part of type text")
        texts.append(checked_text(part.get("text"), f"{field}[{i}].text"))
    return checked_text("".join(texts), field)


def _live_code_bench(record: dict[str, Any]) -> Said:
    text = checked_text(record["question_content"], "question_content")
    if starter := _optional(record, "starter_code"):
        text += f"\n\nStart from this code:\n\n```python\n{starter}\n```"
    return (text,), None


def _gpqa(record: dict[str, Any]) -> Said:
    text = checked_text(record["Question"], "Question")
    choices = sorted(checked_text(record.get(field), field) for field in CHOICES)
    listed = (f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return ("\n".join([text, "", *listed]),), None


def _alpaca(record: dict[str, Any]) -> Said:
    text = checked_text(record["instruction"], "instruction")
    given = _optional(record, "input")
    return (f"{text}\n\n{given}" if given else text,), None


def _one(field: str) -> Callable[[dict[str, Any]], Said]:
    return lambda record: ((checked_text(record[field], field),), None)


KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], Said]]] = {
    "turns": ("turns", _turns),
    "messages": ("messages", _messages),
    "question_content": ("livecodebench", _live_code_bench),
    "Question": ("gpqa", _gpqa),
    "problem": ("math-500", _one("problem")),
    "instruction": ("alpaca", _alpaca),
    "question": ("gsm8k", _one("question")),
    "prompt": ("humaneval", _one("prompt")),
}
"""By the field that tells what a record is: the category if it names none, and how it is read."""


def checked_text(value: Any, field: str) -> str:
    """Returns a field that is a text.

    Raises:
        ValueError: If it is none, or empty.
    """
    if not isinstance(value, str):
        raise ValueError(f"{field} is {brief(value)}; expected a text")
    if not value.strip():
        raise ValueError(f"{field} is empty; expected a text")
    return _encodable(value, field)


def _encodable(text: str, field: str) -> str:
    """Returns the text; a ValueError if it has half a surrogate pair, as JSON's escapes can."""
    if half := lone_surrogate(text):
        raise ValueError(f"{field} has {half}")
    return text


def _optional(record: dict[str, Any], field: str) -> str | None:
    value = record.get(field)
    return None if value is None or value == "" else checked_text(value, field)
