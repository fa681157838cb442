"""Prompts on the command line: where the text comes from, and how it becomes token ids."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text, read_stdin, read_text
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.grammar.vocabulary import load_llguidance

PLACE = "<query>"
"""Stands for a question, to find where a chat template puts it (as in mlx-lm)."""


def read_prompt(text: str | None, prompt: str | None, prompt_file: Path | None) -> str | None:
    """Returns the one prompt that was given, `-` read from stdin; None if none was.

    Raises:
        DriftError: If it is empty, no text, or a file cannot be read.
        typer.BadParameter: If more than one was given.
    """
    given = [value for value in (text, prompt, prompt_file) if value is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of PROMPT, --prompt and --prompt-file")
    if not given:
        return None
    if prompt_file is not None:
        content = read_text(prompt_file)
    else:
        content = read_stdin() if given == ["-"] else str(given[0])
    if not content.strip():
        raise DriftError("the prompt is empty; give some text")
    return check_text(content, "the prompt")


def read_grammar(
    json_schema: Path | None, regex: str | None, grammar: Path | None
) -> Grammar | None:
    """Returns what the answer must be; None if nothing was given.

    Raises:
        DriftError: If llguidance is not installed, or a file cannot be read or holds no schema.
        typer.BadParameter: If more than one was given.
    """
    given = [value for value in (json_schema, regex, grammar) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex and --grammar")
    load_llguidance()
    if regex is not None:
        return Grammar.regex(regex)
    if grammar is not None:
        return Grammar.lark(read_text(grammar))
    assert json_schema is not None
    text = read_text(json_schema)
    try:
        return Grammar.json_schema(text)
    except DriftError as error:
        raise DriftError(f"{json_schema}: {error}") from None


def parse_object(text: str | None, flag: str) -> dict[str, Any]:
    """Parses the JSON object that a flag was given.

    Raises:
        DriftError: If it is none.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise DriftError(f"{flag} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DriftError(f"{flag} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class LaidOut:
    """A prompt as text, and whether a chat template made it (then it has its special tokens)."""

    text: str
    by_template: bool

    def before_place(self) -> "LaidOut":
        """Returns what comes before `PLACE`."""
        return replace(self, text=self.text.partition(PLACE)[0])

    def after_place(self) -> str:
        """Returns the text that comes after `PLACE`."""
        return self.text.partition(PLACE)[2]


def apply_template(
    tokenizer: TokenizerWrapper,
    question: str,
    *,
    template_keywords: dict[str, Any],
    system_prompt: str | None = None,
    prefill_response: str | None = None,
    ignore: bool = False,
) -> LaidOut:
    """Lays the tokenizer's chat template, if it has one, around a question, as mlx-lm does.

    Args:
        tokenizer: The tokenizer.
        question: What the user says.
        template_keywords: Keywords of the template.
        system_prompt: The system's message, if there is one.
        prefill_response: How the response is to begin.
        ignore: Leave the question as it is.

    Raises:
        DriftError: If the template refuses.
    """
    if ignore or not tokenizer.has_chat_template:
        return LaidOut(question, by_template=False)
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if prefill_response is not None:
        messages.append({"role": "assistant", "content": prefill_response})
    keywords = {
        "continue_final_message": prefill_response is not None,
        "add_generation_prompt": prefill_response is None,
    }
    try:
        text = tokenizer.apply_chat_template(
            messages, **keywords | template_keywords | {"tokenize": False}
        )
    except Exception as error:  # a template is a program and raises what it likes
        raise DriftError(f"the tokenizer's chat template refuses the prompt ({error})") from error
    return LaidOut(text, by_template=True)


def encode(tokenizer: TokenizerWrapper, prompt: LaidOut) -> list[int]:
    """Turns a prompt into token ids; special tokens are added unless a template did.

    Raises:
        DriftError: If it is no text.
    """
    check_text(prompt.text, "the prompt, as it is laid out,")
    return tokenizer.encode(prompt.text, add_special_tokens=not prompt.by_template)
