"""Conversations of Anthropic's Messages API, as chat templates take them."""

import json
from collections.abc import Sequence
from typing import Any

from mlx_drift.errors import brief
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.history import (
    ID,
    Message,
    call,
    only_keys,
    said,
    texts_of,
    without_billing,
)
from mlx_drift.serve.api.kinds import boolean, choice, mapping
from mlx_drift.serve.api.tools import Tool, function

HINTS = {"cache_control"}
ROLES = ("user", "assistant", "system")
TOOL_KEYS = {
    "type",
    "name",
    "description",
    "input_schema",
    "strict",
    "eager_input_streaming",
    "allowed_callers",
    "defer_loading",
}


def read_system(system: Any) -> list[Message]:
    """Reads what the model is told first.

    Raises:
        BadRequest: If it is no text.
    """
    texts = [without_billing(block) for block in texts_of(system, "system")]
    whole = "\n".join(text for text in texts if text)
    return [{"role": "system", "content": whole}] if whole else []


def read_tools(given: Sequence[Any]) -> list[Tool]:
    """Reads tools.

    Raises:
        BadRequest: If one is no function of the client's.
    """
    tools = []
    for i, one in enumerate(given):
        at = f"tools[{i}]"
        kind = one.get("type", "custom")
        if kind not in ("custom", None):
            raise BadRequest(
                f"{at}.type is {brief(kind)}; this server knows custom tools alone: give it with "
                "a description and an input_schema",
                f"{at}.type",
                code="unsupported",
            )
        tool = only_keys(one, TOOL_KEYS | HINTS, at)
        said(tool.get("defer_loading", False), f"{at}.defer_loading", choice(False))
        said(tool.get("allowed_callers", ["direct"]), f"{at}.allowed_callers", choice(["direct"]))
        name, description, strict = (tool.get(key) for key in ("name", "description", "strict"))
        tools.append(function(name, description, _schema(tool, at), at, strict))
    return tools


def _schema(tool: dict[str, Any], at: str) -> Any:
    return said(tool.get("input_schema", {"type": "object"}), f"{at}.input_schema", mapping)


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Reads a conversation: results of tools become messages of their own.

    Raises:
        BadRequest: If a block is of another type than texts, thoughts and calls, naming where.
    """
    read: list[Message] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        given = only_keys(message, {"role", "content"}, at)
        role = given.get("role")
        if role not in ROLES:
            raise BadRequest(
                f"{at}.role is {brief(role)}; expected {', '.join(ROLES)}", f"{at}.role"
            )
        content = given.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if role == "assistant":
            read.append(_assistant(blocks, f"{at}.content", names))
        else:
            read += _user(blocks, f"{at}.content", role, names)
    return read


def _user(blocks: list[Any], at: str, role: str, names: dict[str, str]) -> list[Message]:
    results: list[Message] = []
    texts = []
    for i, block in enumerate(blocks):
        here = f"{at}[{i}]"
        kind = _kind(block, here)
        if kind == "tool_result" and role == "user":
            known = {"type", "tool_use_id", "content", "is_error", "toolset_name"}
            given = only_keys(block, known | HINTS, here)
            id = said(given.get("tool_use_id"), f"{here}.tool_use_id", ID)
            told = "".join(texts_of(given.get("content"), f"{here}.content"))
            failed = said(given.get("is_error", False), f"{here}.is_error", boolean)
            if failed and "error" not in told.lower():
                told = f"Error: {told}"  # chat templates have no other word for it
            results.append({"role": "tool", "content": told, "tool_call_id": id})
            if id in names:
                results[-1]["name"] = names[id]
        else:
            texts += [_text(block, kind, here)]
    if role == "system":
        texts = [without_billing(text) for text in texts]
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _assistant(blocks: list[Any], at: str, names: dict[str, str]) -> Message:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        here = f"{at}[{i}]"
        kind = _kind(block, here)
        if kind == "thinking":
            given = only_keys(block, {"type", "thinking", "signature"} | HINTS, here)
            thoughts.append(said(given.get("thinking"), f"{here}.thinking"))
        elif kind == "redacted_thinking":
            continue  # nobody but its author can read it
        elif kind == "tool_use":
            known = {"type", "id", "name", "input", "caller", "toolset_name"}
            given = only_keys(block, known | HINTS, here)
            id = said(given.get("id"), f"{here}.id", ID)
            names[id] = said(given.get("name"), f"{here}.name", ID)
            arguments = said(given.get("input", {}), f"{here}.input", mapping)
            calls.append(call(id, names[id], json.dumps(arguments)))
        else:
            texts.append(_text(block, kind, here))
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _kind(block: Any, at: str) -> Any:
    if not isinstance(block, dict):
        raise BadRequest(f"{at} is {brief(block)}; expected an object with a type", at)
    return block.get("type")


def _text(block: Any, kind: Any, at: str) -> str:
    if kind != "text":
        raise BadRequest(
            f"{at}.type is {brief(kind)}; this server reads text, thinking, tool_use and "
            "tool_result only",
            f"{at}.type",
        )
    given = only_keys(block, {"type", "text", "citations"} | HINTS, at)
    return str(said(given.get("text"), f"{at}.text"))
