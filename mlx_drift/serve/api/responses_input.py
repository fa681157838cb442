"""Conversations and tools of OpenAI's Responses API, as chat templates take them.

Notable:
- A custom tool's input is a text. The model is told of a function with one argument, `input`.
- Codex groups tools in namespaces, which other servers discard (oMLX #3371). The model is told of
  functions called `namespace__name`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_drift.errors import brief
from mlx_drift.serve.api.events import dumps
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.history import (
    CONTENT,
    ID,
    Message,
    call,
    only_keys,
    said,
    texts_of,
    without_billing,
)
from mlx_drift.serve.api.tables import MOST_TOOLS
from mlx_drift.serve.api.tools import TOOL_NAME, Tool, function

READ_OVER = ("web_search", "web_search_2025_08_26", "web_search_preview")
"""Tools of OpenAI's own servers that clients offer unasked: Codex does."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
OWN = {"id", "status"}
"""Keys of items that say nothing to a model; `phase`, `caller` and `async` of some as well."""


@dataclass(frozen=True)
class Origin:
    """What a function that the model is told of is in the request."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def read_tools(given: Sequence[Any]) -> tuple[list[Tool], dict[str, Origin]]:
    """Reads tools.

    Returns:
        What the model is told of, and by that name what each is in the request.

    Raises:
        BadRequest: If one is neither the client's own nor read over.
    """
    tools: list[Tool] = []
    origins: dict[str, Origin] = {}
    for i, one in enumerate(given):
        at = f"tools[{i}]"
        if one.get("type") == "namespace":
            group = only_keys(one, {"type", "name", "description", "tools"}, at)
            name = said(group.get("name"), f"{at}.name", TOOL_NAME)
            inner = group.get("tools")
            if not isinstance(inner, list) or len(inner) > MOST_TOOLS:
                raise BadRequest(f"{at}.tools is {brief(inner)}; expected a list", f"{at}.tools")
            for k, tool in enumerate(inner):
                _add(tool, f"{at}.tools[{k}]", name, tools, origins)
        elif one.get("type") not in READ_OVER:
            _add(one, at, None, tools, origins)
    return tools, origins


def _add(
    given: Any, at: str, namespace: str | None, tools: list[Tool], origins: dict[str, Origin]
) -> None:
    kind = given.get("type") if isinstance(given, dict) else given
    own = {"type", "name", "description", "defer_loading", "allowed_callers", "async"}
    if kind == "function":
        tool = only_keys(given, own | {"parameters", "strict", "output_schema"}, at)
        parameters = tool.get("parameters")
    elif kind == "custom":
        tool = only_keys(given, own | {"format"}, at)
        parameters = {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        }
    else:
        raise BadRequest(
            f"{at}.type is {brief(kind)}; this server knows function, custom and namespace",
            f"{at}.type",
            code="unsupported",
        )
    name = said(tool.get("name"), f"{at}.name", TOOL_NAME)
    told = name if namespace is None else f"{namespace}__{name}"
    description = tool.get("description")
    if kind == "custom":
        description = f"{description or ''}{_form(tool.get('format'), f'{at}.format')}" or None
    tools.append(function(told, description, parameters, at, tool.get("strict")))
    origins[told] = Origin(name, namespace, kind == "custom")


def _form(form: Any, at: str) -> str:
    """Tells a model what the input of a custom tool must be."""
    if form is None:
        return ""
    given = only_keys(form, {"type", "syntax", "definition"}, at)
    if given.get("type") == "text":
        return ""
    definition = said(given.get("definition"), f"{at}.definition", CONTENT)
    return f"\n\nThe input follows this {brief(given.get('syntax', ''))} grammar:\n{definition}"


def read_input(
    given: str | Sequence[Any], instructions: str | None, origins: Mapping[str, Origin]
) -> list[Message]:
    """Reads a conversation. What an assistant said and called in a row is one message.

    Raises:
        BadRequest: If an item is none of texts, reasoning, calls and their outputs, naming where.
    """
    messages: list[Message] = []
    if instructions:
        messages.append({"role": "system", "content": without_billing(instructions)})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    told = {(o.namespace, o.name): name for name, o in origins.items()}
    names: dict[str, str] = {}
    for i, item in enumerate(given):
        at = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(messages, item, at)
        elif kind == "reasoning":
            known = {"type", "summary", "content", "encrypted_content"} | OWN
            thought = only_keys(item, known, at).get("content")
            if thought:
                _thinks(messages, _thought(thought, f"{at}.content"))
        elif kind in ("function_call", "custom_tool_call"):
            _add_call(messages, item, at, kind, told, names)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = only_keys(item, {"type", "call_id", "output", "name", "caller"} | OWN, at)
            id = said(output.get("call_id"), f"{at}.call_id", ID)
            content = "".join(texts_of(output.get("output"), f"{at}.output"))
            messages.append({"role": "tool", "content": content, "tool_call_id": id})
            if id in names:
                messages[-1]["name"] = names[id]
        else:
            raise BadRequest(
                f"{at}.type is {brief(kind)}; this server reads message, reasoning, function_call, "
                "custom_tool_call and their outputs",
                f"{at}.type",
            )
    return messages


def _add_message(messages: list[Message], item: Any, at: str) -> None:
    given = only_keys(item, {"type", "role", "content", "phase"} | OWN, at)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{at}.role is {brief(role)}; expected {', '.join(ROLES)}", f"{at}.role")
    texts = texts_of(given.get("content"), f"{at}.content")
    if ROLES[role] == "assistant":
        _assistant(messages)["content"] += "".join(texts)
        return
    content = "\n".join(map(without_billing, texts) if ROLES[role] == "system" else texts)
    if ROLES[role] == "system" and messages and messages[-1]["role"] == "system":
        messages[-1]["content"] += f"\n\n{content}"  # templates take one, at the beginning
    else:
        messages.append({"role": ROLES[role], "content": content})


def _add_call(
    messages: list[Message],
    item: Any,
    at: str,
    kind: str,
    told: Mapping[tuple[str | None, str], str],
    names: dict[str, str],
) -> None:
    key = "input" if kind == "custom_tool_call" else "arguments"
    known = {"type", "call_id", "name", "namespace", "caller", "async", key} | OWN
    given = only_keys(item, known, at)
    id = said(given.get("call_id"), f"{at}.call_id", ID)
    name = said(given.get("name"), f"{at}.name", ID)
    namespace = given.get("namespace")
    if namespace is not None:
        said(namespace, f"{at}.namespace", ID)
    unknown = name if namespace is None else f"{namespace}__{name}"
    names[id] = told.get((namespace, name), unknown)
    text = said(given.get(key), f"{at}.{key}")
    arguments = dumps({"input": text}) if key == "input" else text
    _assistant(messages).setdefault("tool_calls", []).append(call(id, names[id], arguments))


def _assistant(messages: list[Message]) -> Message:
    """Returns the assistant's message that is under way; a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _thinks(messages: list[Message], thought: str) -> None:
    message = _assistant(messages)
    if message["content"] or "tool_calls" in message:  # it thinks anew
        message = {"role": "assistant", "content": ""}
        messages.append(message)
    message["reasoning_content"] = message.get("reasoning_content", "") + thought


def _thought(content: Any, at: str) -> str:
    if not isinstance(content, list):
        raise BadRequest(f"{at} is {brief(content)}; expected a list", at)
    texts = []
    for i, part in enumerate(content):
        given = only_keys(part, {"type", "text"}, f"{at}[{i}]")
        texts.append(said(given.get("text"), f"{at}[{i}].text"))
    return "".join(texts)
