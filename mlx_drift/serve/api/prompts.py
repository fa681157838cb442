"""Messages and texts as token ids.

Notable:
- Claude Code opens its system text with a billing line that changes with every request; were it
  fed, no prefix would ever be met again (vllm-mlx #277). It is taken out of system messages.
- A template comes with the model, never with a request, and runs in transformers' sandbox.
"""

import contextlib
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_drift.errors import brief, printable
from mlx_drift.serve.api.fields import MOST_CHARACTERS, BadRequest
from mlx_drift.serve.api.kinds import text
from mlx_drift.serve.api.served import Served

BILLING = "x-anthropic-billing-header:"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles of messages, and what the template calls them."""

EMPTY: tuple[Any, ...] = (None, [], {}, "")
CONTENT = text(MOST_CHARACTERS)
TEXTS = ("name", "reasoning_content")
"""Keys of a message that are handed to the template."""

HOLLOW = "refusal annotations audio function_call tool_calls".split()
"""Keys that clients send back with an answer of this server, where they hold nothing."""

PART = {"type", "text", "annotations", "cache_control", "prompt_cache_breakpoint"}
"""Keys of a part of a message's content; the last two are hints about caches."""

RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""Keywords that a request may not give: among them templates and files."""


def lay_out(
    served: Served,
    messages: Sequence[dict[str, Any]],
    keywords: dict[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> tuple[list[int], tuple[int, ...]]:
    """Lays the model's chat template around messages.

    Args:
        served: The model.
        messages: As they came in.
        keywords: Keywords of the template.
        add_generation_prompt: End where the answer begins.

    Returns:
        Token ids, and after how many of them other prompts may branch off.

    Raises:
        BadRequest: If a message holds what it cannot, or the template refuses.
    """
    if not served.tokenizer.has_chat_template:
        raise BadRequest(
            f"{served.name} has no chat template; use /v1/completions", "model", code="unsupported"
        )
    if reserved := sorted(RESERVED & keywords.keys()):
        raise BadRequest(
            f"chat_template_kwargs.{reserved[0]} is not the template's to take; leave it out",
            f"chat_template_kwargs.{reserved[0]}",
        )
    keywords = served.defaults.chat_template_kwargs | keywords
    cleaned = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        tokens = _render(served, cleaned, keywords, add_generation_prompt)
    except Exception as error:  # a template is a program and raises what it likes
        raise BadRequest(
            f"the model's chat template refuses the messages ({brief(str(error))})", "messages"
        ) from None
    marks: set[int] = set()
    if served.branches and add_generation_prompt:
        system = [*takewhile(lambda message: message["role"] == "system", cleaned)]
        others = [[*cleaned, {"role": "assistant", "content": "."}]]  # the next turn's prompt
        if system:
            others.append([*system, {"role": "user", "content": "."}])
        for other in others:
            with contextlib.suppress(Exception):  # a template may have no such form
                marks.add(_shared(tokens, _render(served, other, keywords, False)))
    return tokens, tuple(sorted(mark for mark in marks if 1 < mark < len(tokens)))


def _render(
    served: Served, messages: list[dict[str, Any]], keywords: dict[str, Any], generation: bool
) -> list[int]:
    rendered = served.tokenizer.apply_chat_template(
        messages, **keywords, tokenize=False, add_generation_prompt=generation
    )
    return [*served.tokenizer.encode(rendered, add_special_tokens=False)]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def encode(served: Served, prompt: str | list[int], *, special: bool = True) -> list[int]:
    """Turns the prompt of a completion into token ids; BoS is added unless the text has it.

    Raises:
        BadRequest: If an id is beyond the vocabulary.
    """
    if isinstance(prompt, str):
        bos = served.tokenizer.bos_token
        special = special and not (bos is not None and prompt.startswith(bos))
        return [*served.tokenizer.encode(prompt, add_special_tokens=special)] if prompt else []
    if beyond := [token for token in prompt if token >= served.vocab_size]:
        raise BadRequest(
            f"prompt: token {beyond[0]} is beyond the vocabulary of {served.vocab_size}", "prompt"
        )
    return prompt


def check_length(served: Served, tokens: Sequence[int], param: str) -> None:
    """Checks that a prompt leaves room for an answer.

    Raises:
        BadRequest: If it is empty, or too long: saying by how much.
    """
    if not tokens:
        raise BadRequest(f"{param}: the prompt is empty; give some text", param)
    if len(tokens) >= served.context:
        over = len(tokens) - served.context + 1
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, {over} more than fit: {served.name} takes "
            f"{served.context} with at least one of an answer ({served.limited_by})",
            param,
            code="context_length_exceeded",
        )


def _message(message: dict[str, Any], at: str) -> dict[str, Any]:
    """Checks a message, and returns what the template is handed of it."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{at}.role is {brief(role)}; expected {', '.join(ROLES)}", f"{at}.role")
    cleaned = {"role": ROLES[role], "content": _content(message.get("content"), at)}
    for key, value in message.items():
        if key in ("role", "content") or (key in HOLLOW and value in EMPTY) or value is None:
            continue
        if key not in TEXTS:
            shown = printable(key[:80])
            raise BadRequest(f"{at}.{shown} is not supported; leave it out", f"{at}.{shown}")
        cleaned[key] = _text(value, f"{at}.{key}")
    if cleaned["role"] == "system":
        cleaned["content"] = "".join(_without_billing(block) for block in cleaned["content"])
    else:
        cleaned["content"] = "".join(cleaned["content"])
    return cleaned


def _content(content: Any, at: str) -> list[str]:
    """Returns the texts of a message's content.

    Raises:
        BadRequest: If there is something else, named by its type.
    """
    at = f"{at}.content"
    if content is None:
        return []
    if not isinstance(content, list):
        return [_text(content, at)]
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
        if unknown := sorted(part.keys() - PART):
            shown = printable(unknown[0][:80])
            raise BadRequest(f"{here}.{shown} is not supported; leave it out", f"{here}.{shown}")
        texts.append(_text(part.get("text"), f"{here}.text"))
    return texts


def _text(value: Any, at: str) -> str:
    try:
        return CONTENT(value)
    except ValueError as error:
        raise BadRequest(f"{at} is {brief(value)}; {error}", at) from None


def _without_billing(block: str) -> str:
    """Takes the billing line off a system text that starts with it."""
    return block.partition("\n")[2] if block.startswith(BILLING) else block
