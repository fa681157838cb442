"""Tools that a request offers, and whether one must be called."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_drift.errors import brief
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.grammar.tools import calls
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import checked, held_to_schema
from mlx_drift.serve.api.history import only_keys, said
from mlx_drift.serve.api.kinds import Kind, boolean, mapping
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.calls import FORMATS, format_of

NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,256}")
TOOL_NAME = Kind(
    "a name of 1 to 256 letters, digits and _.:/-",
    lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None,
)

Tool = dict[str, Any]
"""As chat/completions has it: what templates and mlx-lm's parsers take."""


def function(name: Any, description: Any, parameters: Any, at: str, strict: Any = None) -> Tool:
    """Returns a tool.

    Args:
        name: Its name.
        description: What it does; None for nothing said.
        parameters: The JSON schema of its arguments; None for no arguments.
        at: Where it stands in the request.
        strict: Whether its arguments are held to that; None for no.

    Raises:
        BadRequest: If one of them is something else.
    """
    said(name, f"{at}.name", TOOL_NAME)
    described: dict[str, Any] = {"name": name}
    if description is not None:
        described["description"] = said(description, f"{at}.description")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    described["parameters"] = said(parameters, f"{at}.parameters", mapping)
    if strict is not None and said(strict, f"{at}.strict", boolean):
        described["strict"] = True
    return {"type": "function", "function": described}


def read_tools(given: Sequence[Any]) -> list[Tool]:
    """Reads the tools of chat/completions.

    Raises:
        BadRequest: If one is no function.
    """
    tools = []
    for i, one in enumerate(given):
        at = f"tools[{i}]"
        tool = only_keys(one, {"type", "function", "cache_control"}, at)
        if tool.get("type") != "function":
            raise BadRequest(
                f"{at}.type is {brief(tool.get('type'))}; expected function", f"{at}.type"
            )
        at = f"{at}.function"
        known = {"name", "description", "parameters", "strict"}
        inner = only_keys(tool.get("function"), known, at)
        name, description, strict = (inner.get(key) for key in ("name", "description", "strict"))
        tools.append(function(name, description, inner.get("parameters"), at, strict))
    return tools


def held_to(
    grammar: Grammar | None,
    tools: Sequence[Tool],
    must_call: str | None,
    served: Served,
    at: str,
) -> Grammar | None:
    """Returns what an answer must be that may call tools, or must; None for anything.

    Args:
        grammar: What it must be if it is no call.
        tools: What may be called.
        must_call: As in `Speech`.
        served: The model.
        at: Where the grammar stands in the request.

    Raises:
        BadRequest: If that cannot be, or no answer can be held to it.
    """
    if grammar is not None and must_call is not None:
        raise BadRequest(
            f"{at} and tool_choice contradict each other: one asks for a text, one for a call", at
        )
    offered = [tool["function"] for tool in tools]
    strict = [i for i, tool in enumerate(offered) if tool.get("strict")]
    if not offered or (grammar is None and not strict):
        return grammar
    why = f"tools[{strict[0]}]" if grammar is None else at
    if format_of(served.tokenizer) is not FORMATS["json_tools"]:
        raise BadRequest(
            f"{why}: the calls of {served.name} are not JSON between marks, and cannot be held to "
            "a schema; leave that out",
            why,
            code="unsupported",
        )
    if grammar is not None and grammar.kind != "JSON schema":
        raise BadRequest(f"{at}: beside tools an answer may be held to JSON alone", at)
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(offered):
        if i in strict:
            held_to_schema(tool["parameters"], served, f"tools[{i}]")
        if tool["name"] == (must_call or tool["name"]):
            schemas[tool["name"]] = tool["parameters"] if i in strict else {"type": "object"}
    held = calls(served.tokenizer, schemas, must_call=must_call is not None, otherwise=grammar)
    return checked(held, served, why)


def check_tools(served: Served, tools: Sequence[Tool], must_call: str | None) -> None:
    """Checks that a model can call tools at all, and the one that it must.

    Args:
        served: The model.
        tools: What it is offered.
        must_call: As in `Speech`.

    Raises:
        BadRequest: If it cannot.
    """
    names = [tool["function"]["name"] for tool in tools]
    if doubled := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise BadRequest(f"tools: two are called {doubled}; give each a name of its own", "tools")
    if tools and not served.tokenizer.has_tool_calling:
        raise BadRequest(
            f"tools: {served.name} calls none (its chat template is of no family whose calls are "
            'known); leave them out, or set tool_choice to "none"',
            "tools",
            code="unsupported",
        )
    if must_call is None:
        return
    if not tools:
        raise BadRequest("tool_choice asks for a call, and there are no tools", "tool_choice")
    if must_call and must_call not in names:
        raise BadRequest(f"tool_choice: no tool is called {brief(must_call)}", "tool_choice")
    if must_call and not format_of(served.tokenizer).opening:
        raise BadRequest(
            f"tool_choice: {served.name} cannot be held to one tool, for want of its format; "
            'offer that tool alone, with "required"',
            "tool_choice",
            code="unsupported",
        )
