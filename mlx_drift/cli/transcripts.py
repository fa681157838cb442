"""Recorded conversations in a file, for `mlx-drift bench --replay`.

JSON lines: `{"messages": [{"role": …, "content": …}, …]}`, of which every assistant's message is an
answer, or `{"prompt": …, "text": …}`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.measure.speed.recording import Recorded

EXPECTED = (
    'expected {"messages": [{"role": …, "content": …}, …]} with an answer of the assistant\'s, or '
    '{"prompt": …, "text": …}'
)


def read_transcripts(
    path: Path, tokenizer: TokenizerWrapper, template_keywords: dict[str, Any]
) -> list[Recorded]:
    """Reads a file's answers and what comes before each.

    Args:
        path: The file.
        tokenizer: The target's.
        template_keywords: Keywords of its chat template.

    Raises:
        DriftError: If the file cannot be read, or a line is no conversation.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DriftError(f"{path}: cannot be read as text ({error})") from None
    found: list[Recorded] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = messages_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DriftError(f"{path}, line {number}: {error}; {EXPECTED}") from None
        try:
            turns = list(_turns(messages, tokenizer, template_keywords))
        except Exception as error:  # a template is a program and raises what it likes
            raise DriftError(
                f"{path}, line {number}: the tokenizer's chat template refuses it ({error})"
            ) from error
        found += [Recorded(prompt, answer, number) for prompt, answer in turns if answer]
    if not found:
        raise DriftError(f"{path} holds no answer; {EXPECTED}")
    return found


def messages_of(line: Any) -> list[dict[str, str]]:
    """Returns the messages of a line that was read as JSON.

    Raises:
        ValueError: If it is no conversation.
    """
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    if "messages" not in line:
        line = {
            "messages": [
                {"role": "user", "content": line.get("prompt")},
                {"role": "assistant", "content": line.get("text")},
            ]
        }
    messages = line["messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages is no list of objects")
    for one in messages:
        if not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise ValueError("a message lacks its role or its content, a text")
    return messages


def _turns(
    messages: list[dict[str, str]], tokenizer: TokenizerWrapper, keywords: dict[str, Any]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields each answer's prompt and itself, token ids."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:
            continue
        before = messages[:number]
        if tokenizer.has_chat_template:
            settings = keywords | {"tokenize": False, "add_generation_prompt": True}
            text = tokenizer.apply_chat_template(before, **settings)
        else:
            text = "\n".join(one["content"] for one in before)
        special = not tokenizer.has_chat_template
        yield (
            tokenizer.encode(text, add_special_tokens=special),
            tokenizer.encode(message["content"], add_special_tokens=False),
        )
