"""What a head is adapted on: conversations, in the forms that `mlx_lm.lora` reads, or questions.

A record is what its fields tell:

- `messages`, with `tools` if there are any: a chat
- `prompt` and `completion`: a question and its answer
- `text` alone: a text as it is
- anything else: a question, as `mlx-drift measure` reads it

A folder, or a data set on the Hub by its name, holds `train.jsonl` and perhaps `valid.jsonl` and
`test.jsonl`; of a single file some conversations are held out.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from mlx_drift.errors import DriftError, brief
from mlx_drift.files.hub import dataset_file, is_repository
from mlx_drift.files.hub_errors import one_line
from mlx_drift.files.paths import existing
from mlx_drift.measure.acceptance.questions import (
    MOST_BYTES,
    SUFFIXES,
    as_question,
    checked_text,
    content_text,
    find_file,
    records,
)

ROLES = "system", "user", "assistant", "tool"
PARTS = "train", "valid", "test"
HELD_OUT, MOST_HELD_OUT = 10, 64
"""Of a single file one conversation in so many is held out, and so many at most."""


@dataclass(frozen=True)
class Conversation:
    """One conversation, or a text.

    Attributes:
        id: The record's own id, or its place in the file.
        source: The name of its file.
        category: The record's own, or what kind of record it is.
        messages: Chat messages as templates take them; none in a text.
        tools: What the assistant may call.
        text: The text, in place of messages.
    """

    id: str
    source: str
    category: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None

    @property
    def digest(self) -> str:
        """What tells it from all others."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.source}, conversation {self.id}"

    @property
    def said(self) -> str:
        """All that is said in it, as JSON."""
        return json.dumps([self.messages, self.text])

    @property
    def calls_tools(self) -> bool:
        """Whether what comes later answers what the assistant called."""
        return any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)

    @property
    def has_answers(self) -> bool:
        """Whether there is something of the assistant's."""
        return self.text is not None or any(m["role"] == "assistant" for m in self.messages)

    @property
    def asks(self) -> bool:
        """Whether there is something of the user's to answer."""
        return any(m["role"] == "user" for m in self.messages)


@dataclass(frozen=True)
class Data:
    """The conversations to learn from, and those to measure on while learning and at the end."""

    train: list[Conversation]
    valid: list[Conversation]
    test: list[Conversation] = field(default_factory=list)


def read_data(path: str, limit: int | None = None, seed: int = 0) -> Data:
    """Reads a folder, a file, or a data set on the Hub.

    Args:
        path: A folder with `train.jsonl`, a file, or on the Hub `owner/name` or `owner/name:file`.
        limit: So many of the first conversations of each file; None for all.
        seed: Says which are held out, where no file of their own says it.

    Raises:
        DriftError: If there is no such thing, or it holds nothing to learn from. The message names
            the file, the line and the field.
    """
    parts = {name: read_conversations(file, limit) for name, file in _files(path).items() if file}
    train, valid = parts["train"], parts.get("valid")
    if valid is None:
        train, valid = hold_out(train, path, seed)
    return Data(train, valid, parts.get("test", []))


def read_conversations(path: str, limit: int | None = None) -> list[Conversation]:
    """Reads the conversations of one file.

    Args:
        path: The file, as for `read_questions`.
        limit: So many of the first ones; None for all.

    Raises:
        DriftError: As `read_questions`.
    """
    file, source = find_file(path)
    found = []
    for place, record in itertools.islice(records(file), limit):
        try:
            found.append(_conversation(record, place.rpartition(" ")[2], source))
        except ValueError as error:
            raise DriftError(f"{path}, {place}: {error}") from None
    if not found:
        raise DriftError(f"{path}: there are no conversations in it")
    return found


def _files(path: str) -> dict[str, str | None]:
    """Finds the files of each part; None where there is none."""
    folder = existing(path)
    if folder is not None and folder.is_dir():
        files = {name: folder / f"{name}.jsonl" for name in PARTS}
        if not files["train"].is_file():
            raise DriftError(f"{path}: has no train.jsonl; expected one, as for mlx_lm.lora")
        return {name: str(file) if file.is_file() else None for name, file in files.items()}
    if folder is None and is_repository(path) and Path(path).suffix not in SUFFIXES:
        return _files_on_hub(path)
    return {"train": path}


def _files_on_hub(repo: str) -> dict[str, str | None]:
    train = str(dataset_file(repo, "train.jsonl", None, MOST_BYTES))
    found: dict[str, str | None] = {"train": train}
    for name in PARTS[1:]:
        beside = Path(train).with_name(f"{name}.jsonl")  # in the cache, if there is no network
        if beside.is_file():
            found[name] = str(beside)
            continue
        with one_line(repo, repo):
            there = HfApi().file_exists(repo, f"{name}.jsonl", repo_type="dataset")
        if there:
            found[name] = str(dataset_file(repo, f"{name}.jsonl", None, MOST_BYTES))
    return found


def check_conversations(conversations: Sequence[Conversation], *, given: bool) -> None:
    """Checks that there is something to learn from in each, before anything is computed.

    Args:
        conversations: All that are learned from.
        given: It is their own answers that are.

    Raises:
        DriftError: If there is nothing in one.
    """
    for one in conversations:
        if given and not one.has_answers:
            raise DriftError(
                f"{one.place}: there is no assistant's message to learn from; let the target "
                "answer with --answers self"
            )
        if not given and not one.asks:
            what = "a text" if one.text is not None else "no message of the user's"
            raise DriftError(
                f"{one.place}: {what}, so there is nothing to answer; learn from what it says "
                "with --answers given"
            )


def hold_out(
    conversations: Sequence[Conversation], path: str, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Draws what is held out of conversations that are all of one file.

    Args:
        conversations: All of them.
        path: What the file is called, for the message.
        seed: Says which are held out.

    Returns:
        What is learned from, without what says the same as something held out; what is held out.

    Raises:
        DriftError: If there are not enough of them.
    """
    if len(conversations) < 2:
        raise DriftError(
            f"{path}: one conversation; expected at least two, of which one is held out"
        )
    count = min(MOST_HELD_OUT, max(1, len(conversations) // HELD_OUT))
    drawn = np.random.default_rng([seed, 1]).permutation(len(conversations))[:count]
    held = [conversations[i] for i in sorted(drawn)]
    seen = {one.said for one in held}
    learned = [one for one in conversations if one.said not in seen]
    if not learned:
        raise DriftError(f"{path}: all conversations say the same; expected at least one other")
    return learned, held


def _conversation(record: Any, number: str, source: str) -> Conversation:
    """Turns a record into a conversation.

    Raises:
        ValueError: If it is none; the message names the field.
    """
    if isinstance(record, dict) and "messages" in record:
        messages, tools = _messages(record["messages"]), _tools(record.get("tools"))
        category = record.get("category")
        category = category if isinstance(category, str) and category.strip() else "chat"
        return Conversation(number, source, category, messages, tools)
    if isinstance(record, dict) and {"prompt", "completion"} <= record.keys():
        messages = tuple(
            {"role": role, "content": checked_text(record[field], field)}
            for role, field in (("user", "prompt"), ("assistant", "completion"))
        )
        return Conversation(number, source, "completion", messages, _tools(record.get("tools")))
    if isinstance(record, dict) and record.keys() == {"text"}:
        return Conversation(number, source, "text", text=checked_text(record["text"], "text"))
    question = as_question(record, number, source)
    said = [("user", turn) for turn in question.turns]
    if question.system_prompt is not None:
        said.insert(0, ("system", question.system_prompt))
    messages = tuple({"role": role, "content": text} for role, text in said)
    return Conversation(question.id, source, question.category, messages)


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {brief(messages)}; expected a list of objects")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] is {brief(message)}; expected an object")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role is {brief(role)}; expected {', '.join(ROLES)}")
        content = message.get("content")
        if not (content in (None, "") and message.get("tool_calls")):  # a call need say nothing
            content = content_text(content, f"messages[{i}].content")
        found.append({**message, "role": role, "content": content})
    if all(message["role"] in ("system", "tool") for message in found):
        raise ValueError("messages has none of the user's and none of the assistant's")
    return tuple(found)


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {brief(tools)}; expected a list of objects")
    return tuple(tools)
