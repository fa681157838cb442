"""Grammars of tool calls, for models that write them as JSON between two marks.

`<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>`, say: the form of mlx-lm's
`tool_parsers/json_tools.py`, which Qwen's and Hermes' templates teach.
"""

import json
from collections.abc import Mapping
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.grammar.grammar import Grammar
from mlx_drift.grammar.vocabulary import ON_ONE_LINE

ANY_TEXT = r"/(.|\n)*/"


def calls(
    tokenizer: TokenizerWrapper,
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    must_call: bool = False,
    otherwise: Grammar | None = None,
) -> Grammar:
    """Returns the grammar of answers that may call tools, or must.

    Args:
        tokenizer: The target's, whose calls are of this form.
        schemas: The tools that may be called, each with the JSON schema of its arguments.
        must_call: The answer is one or more calls; else text, in which there may be calls.
        otherwise: What an answer must be that is no call: JSON of a schema; None for any text.
    """
    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
    names = [f"tool_{i}" for i in range(len(schemas))]
    lines = [
        f"payload: {' | '.join(names)}",
        *(
            f"{rule}: {_said(_head(name))} {_json(schema)} {_said('}')}"
            for rule, (name, schema) in zip(names, schemas.items(), strict=True)
        ),
        f'rest: "\\n" payload "\\n" {_mark(tokenizer, end)}',
        f'calls: {_mark(tokenizer, start)} rest ("\\n" {_mark(tokenizer, start)} rest)*',
    ]
    if must_call:
        lines.insert(0, "start: calls")
    elif otherwise is not None:
        lines.insert(0, f"start: calls | {_json(json.loads(otherwise.source))}")
    else:  # a mark may be spelled out, and is one all the same
        lines[:0] = [
            "start: (opened rest)* TEXT",
            f"opened: spelled | TEXT {_mark(tokenizer, start)}",
            f"spelled[lazy]: TEXT {_said(start)}",
            f"TEXT: {ANY_TEXT}",
        ]
    return Grammar.lark("\n".join(lines))


def _head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


def _json(schema: Mapping[str, Any]) -> str:
    """Returns what stands for JSON of a schema, on one line unless that says otherwise."""
    own = schema.get("x-guidance")
    spaces = {**ON_ONE_LINE, **(own if isinstance(own, Mapping) else {})}
    return f"%json {json.dumps({**schema, 'x-guidance': spaces})}"


def _said(text: str) -> str:
    return json.dumps(text)


def _mark(tokenizer: TokenizerWrapper, text: str) -> str:
    """Returns what stands for a mark: a token of its own, or text."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) == 1 and tokens[0] in tokenizer.added_tokens_decoder:
        return f"<[{tokens[0]}]>"
    return _said(text)
