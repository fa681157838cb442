"""Messages of chat/completions, checked, as chat templates take them.

Notable:
- Claude Code opens its system text with a billing line that changes with every request; were it
  fed, no prefix would ever be met again (vllm-mlx #277). It is taken out of system messages.
- Templates write the arguments of calls themselves, so they are handed an object. What is none (a
  call that was cut, sent back by the client) is handed over as an object that holds the text: a
  conversation that once had such a call goes on.
"""

import json
from collections.abc import Sequence
from typing import Any

from mlx_drift.errors import brief, printable
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.kinds import Kind, text
from mlx_drift.serve.api.tables import MOST_CHARACTERS, MOST_TOOLS

BILLING = "x-anthropic-billing-header:"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""The roles of messages, and what the template calls them."""

EMPTY: tuple[Any, ...] = (None, [], {}, "")
CONTENT = text(MOST_CHARACTERS)
ID = text(512)

HOLLOW = "refusal annotations audio function_call".split()
"""Keys that clients send back with an answer of this server, where they hold nothing."""

PART = {"type", "text", "annotations", "logprobs", "cache_control", "prompt_cache_breakpoint"}
"""Keys of a part of a message's content; the last two are hints about caches."""

Message = dict[str, Any]


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Checks messages, and returns what the template is handed of them.

    Raises:
        BadRequest: If a message holds what it cannot, naming where.
    """
    names: dict[str, str] = {}  # of the tools that were called
    return [_message(message, f"messages[{i}]", names) for i, message in enumerate(messages)]


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """Returns a call of an earlier turn, as templates take it.

    Args:
        id: Its id.
        name: The tool's.
        arguments: JSON, as the client holds it.
    """
    given: Any = {}
    if arguments.strip():
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            given = None
        given = given if isinstance(given, dict) else {"arguments": arguments}
    return {"type": "function", "id": id, "function": {"name": name, "arguments": given}}


def said(value: Any, at: str, kind: Kind = CONTENT) -> Any:
    """Returns a value of some kind, a text if nothing else is said.

    Raises:
        BadRequest: If it is another.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise BadRequest(f"{at} is {brief(value)}; {error}", at) from None


def only_keys(value: Any, known: set[str], at: str) -> dict[str, Any]:
    """Returns an object that has no keys but known ones; null ones are left out.

    Raises:
        BadRequest: Naming the first other key, or what is no object.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"{at} is {brief(value)}; expected an object", at)
    given = {key: item for key, item in value.items() if item is not None}
    if unknown := sorted(given.keys() - known):
        shown = printable(unknown[0][:80])
        raise BadRequest(f"{at}.{shown} is not supported; leave it out", f"{at}.{shown}")
    return given


def without_billing(block: str) -> str:
    """Takes the billing line off a system text that starts with it."""
    return block.partition("\n")[2] if block.startswith(BILLING) else block


def _message(message: Any, at: str, names: dict[str, str]) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{at}.role is {brief(role)}; expected {', '.join(ROLES)}", f"{at}.role")
    texts = texts_of(message.get("content"), f"{at}.content")
    if ROLES[role] == "system":
        texts = [without_billing(block) for block in texts]
    cleaned: Message = {"role": ROLES[role], "content": "".join(texts)}
    for key, value in message.items():
        if key in ("role", "content") or (key in HOLLOW and value in EMPTY) or value is None:
            continue
        here = f"{at}.{key}"
        if key == "name":
            cleaned[key] = said(value, here, ID)
        elif key in ("reasoning_content", "reasoning") and role == "assistant":
            cleaned["reasoning_content"] = said(value, here)
        elif key == "tool_calls" and role == "assistant":
            if value:
                cleaned[key] = _calls(value, here, names)
        elif key == "tool_call_id" and role == "tool":
            cleaned[key] = said(value, here, ID)
            if value in names:
                cleaned.setdefault("name", names[value])
        else:
            shown = printable(key[:80])
            raise BadRequest(f"{at}.{shown} is not supported; leave it out", f"{at}.{shown}")
    if role == "tool" and "tool_call_id" not in cleaned:
        raise BadRequest(
            f"{at}.tool_call_id is missing; expected the id of a call", f"{at}.tool_call_id"
        )
    return cleaned


def _calls(value: Any, at: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise BadRequest(f"{at} is {brief(value)}; expected a list of calls", at)
    calls = []
    for i, one in enumerate(value):
        here = f"{at}[{i}]"
        given = only_keys(one, {"id", "type", "index", "function"}, here)
        if given.get("type", "function") != "function":
            raise BadRequest(
                f"{here}.type is {brief(given['type'])}; expected function", f"{here}.type"
            )
        function = only_keys(given.get("function"), {"name", "arguments"}, f"{here}.function")
        id = said(given.get("id"), f"{here}.id", ID)
        name = said(function.get("name"), f"{here}.function.name", ID)
        arguments = said(function.get("arguments", ""), f"{here}.function.arguments")
        names[id] = name
        calls.append(call(id, name, arguments))
    return calls


def texts_of(content: Any, at: str) -> list[str]:
    """Returns the texts of a message's content.

    Raises:
        BadRequest: If there is something else, named by its type.
    """
    if content is None:
        return []
    if not isinstance(content, list):
        return [said(content, at)]
    texts = []
    for i, part in enumerate(content):
        here = f"{at}[{i}]"
        if not isinstance(part, dict):
            raise BadRequest(f"{here} is {brief(part)}; expected an object with a type", here)
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text"):
            raise BadRequest(
                f"{here}.type is {brief(kind)}; this server reads text only", f"{here}.type"
            )
        texts.append(said(only_keys(part, PART, here).get("text"), f"{here}.text"))
    return texts
