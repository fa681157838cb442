"""Calls of tools, read off what a model writes between its markers.

mlx-lm has a parser for each family's format, which takes a whole call. Where the arguments stand
there as JSON they are passed on as they come: the file that an agent writes is one long argument,
and clients do not wait for minutes without a word. What cannot be read is text.
"""

import json
import logging
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.serve.json_object import JsonObject
from mlx_drift.serve.said import CallArguments, CallBegan, CallEnded, Said, Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """How a family writes a call.

    Attributes:
        opening: What stands between the marker and the arguments of a tool called `{name}`.
        head: The same as it is read, with groups `name` and perhaps `id`, up to the arguments'
            `{`; None where they are no JSON.
    """

    opening: str
    head: re.Pattern[str] | None = None


JSON_STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'

FORMATS = {
    "json_tools": Format(
        '\n{"name": "{name}", "arguments": ',
        re.compile(
            r'\s*\{\s*"name"\s*:\s*(?P<name>' + JSON_STRING + r')\s*,\s*"arguments"\s*:\s*(?=\{)'
        ),
    ),
    "mistral": Format(
        "{name}[ARGS]",
        re.compile(r"(?:\s|\[TOOL_CALLS\])*(?P<name>[\w-]+)\s*\[ARGS\]\s*(?=\{)"),
    ),
    "kimi_k2": Format(
        "<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
        re.compile(
            r"(?:\s|<\|tool_call_end\|>)*<\|tool_call_begin\|>\s*"
            r"(?P<id>(?:functions\.)?(?P<name>[^\s:<]+):\d+)"
            r"\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
        ),
    ),
    "qwen3_coder": Format("\n<function={name}>\n"),
    "glm47": Format("{name}\n"),
    "laguna": Format("{name}\n"),
    "longcat": Format("{name}\n"),
    "minimax_m2": Format('\n<invoke name="{name}">\n'),
    "gemma4": Format("call:{name}{"),
    "function_gemma": Format("call:{name}{"),
    "pythonic": Format("[{name}("),
}
"""By the module of mlx-lm's parser."""

NO_FORMAT = Format("")
MISTRALS_ID = 9
"""Mistral's templates refuse ids of another length."""


def format_of(tokenizer: TokenizerWrapper) -> Format:
    """Returns how a tokenizer's model writes calls."""
    return FORMATS.get(_module(tokenizer), NO_FORMAT)


def _module(tokenizer: TokenizerWrapper) -> str:
    """Names the module of mlx-lm's parser for a tokenizer."""
    kept = getattr(tokenizer, "init_kwargs", None) or {}
    return str(kept.get("tool_parser_type") or tokenizer.tool_parser.__module__.rpartition(".")[2])


class Calls:
    """Reads the calls of one answer, a payload (what is between two markers) at a time.

    Args:
        tokenizer: The target's.
        tools: What may be called, each as chat/completions has it.
        once: The first call is all that is wanted.

    Attributes:
        count: Whole calls so far.
    """

    def __init__(self, tokenizer: TokenizerWrapper, tools: Sequence[dict[str, Any]], once: bool):
        self.count = 0
        self._once = once
        self._parse = tokenizer.tool_parser
        self._start, self._end = tokenizer.tool_call_start, tokenizer.tool_call_end
        self._head = format_of(tokenizer).head
        self._is_mistrals = _module(tokenizer) == "mistral"
        self._tools = list(tools)
        self._names = {tool["function"]["name"] for tool in tools}
        self._ids: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """A payload begins: its marker came."""
        self._payload = ""
        self._rest = ""  # of it, what is not told yet
        self._object: JsonObject | None = None
        self._told = False  # calls of it

    @property
    def is_in_string(self) -> bool:
        """Whether the payload is within a string of JSON, where a marker is no marker."""
        return self._object is not None and self._object.is_in_string

    def add(self, text: str) -> tuple[list[Said], bool]:
        """Takes a piece of a payload.

        Returns:
            What is certain by now; and whether the payload is no call after all, which ends it.
        """
        said: list[Said] = []
        self._payload += text
        self._rest += text
        while True:
            if self._object is None:
                head = self._head and self._head.match(self._rest)
                if not head:
                    return said, False
                name = head["name"]
                name = json.loads(name) if name.startswith('"') else name
                said.append(CallBegan(self._id(head.groupdict().get("id")), name))
                self._rest = self._rest[head.end() :]
                self._object, self._told = JsonObject(), True
            if certain := self._object.add(self._rest):
                said.append(CallArguments(certain))
            self._rest = ""
            if self._object.is_broken:
                raw = self._start + self._payload
                self._object = None
                return [*said, CallEnded(False), Text(raw)], True
            if not self._object.is_whole:
                return said, False
            said.append(CallEnded(True))
            self.count += 1
            self._rest, self._object = self._object.rest, None
            if self._once:
                return said, False

    def end(self, *, is_cut: bool, has_marker: bool) -> list[Said]:
        """Ends a payload.

        Args:
            is_cut: The answer was cut off within it.
            has_marker: The marker of its end came.
        """
        if self._object is not None:
            self._object = None
            raw = [] if is_cut else [Text(self._start + self._payload)]
            return [CallEnded(False), *raw]
        needs_marker = bool(self._end) and not has_marker
        calls = [] if is_cut and needs_marker else self._parsed()
        if self._told:
            return [] if calls or not self._rest.strip() else [Text(self._rest)]
        if not calls:
            return [Text(self._start + self._payload + (self._end if has_marker else ""))]
        said: list[Said] = []
        calls = calls[:1] if self._once else calls
        for id, name, arguments in calls:
            said += CallBegan(self._id(id), name), CallArguments(arguments), CallEnded(True)
        self.count += len(calls)
        return said

    def _parsed(self) -> list[tuple[str | None, str, str]]:
        """Returns the calls that mlx-lm's parser finds: id, name, arguments; none if any is bad."""
        try:
            parsed = self._parse(self._payload, self._tools)
            calls = []
            for call in parsed if isinstance(parsed, list) else [parsed]:
                name, arguments = call["name"], call["arguments"]
                if isinstance(arguments, str):  # some write their JSON once more as a string
                    arguments = json.loads(arguments)
                if not isinstance(name, str) or not isinstance(arguments, dict):
                    return []
                if name not in self._names and arguments.keys() == {"raw"}:
                    return []  # what the parser of GLM makes of any text
                id = call.get("id")
                written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                written.encode()  # no lone surrogates
                calls.append((id if isinstance(id, str) else None, name, written))
            return calls
        except Exception as error:  # a parser is given what a model wrote, and raises what it likes
            log.debug("a call cannot be read: %s", type(error).__name__)
            return []

    def _id(self, given: str | None) -> str:
        """Returns the id of a call: the model's own, or a new one."""
        new = uuid.uuid4().hex
        id = given or (new[:MISTRALS_ID] if self._is_mistrals else f"call_{new[:24]}")
        if id in self._ids:
            id = f"call_{new[:24]}"
        self._ids.add(id)
        return id
