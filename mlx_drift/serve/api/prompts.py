"""Messages and texts as token ids.

A template comes with the model, never with a request, and runs in transformers' sandbox.
"""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_drift.errors import brief
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.history import Message
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.api.tools import Tool

RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
"""Keywords that a request may not give: among them templates and files."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        tokens: Token ids.
        marks: After how many of them other prompts may branch off.
        begins_in_reasoning: It ends within reasoning.
    """

    tokens: list[int]
    marks: tuple[int, ...] = ()
    begins_in_reasoning: bool = False


def lay_out(
    served: Served,
    messages: Sequence[Message],
    keywords: dict[str, Any],
    tools: Sequence[Tool] = (),
    *,
    param: str = "messages",
    add_generation_prompt: bool = True,
    goes_on: bool = False,
) -> Prompt:
    """Lays the model's chat template around messages.

    Args:
        served: The model.
        messages: As templates take them.
        keywords: Keywords of the template.
        tools: What the model is told that it may call.
        param: The field that the messages came from.
        add_generation_prompt: End where the answer begins.
        goes_on: The last message is the beginning of the answer.

    Raises:
        BadRequest: If the template refuses.
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
    if tools:
        keywords |= {"tools": list(tools)}
    cleaned = list(messages)
    try:
        if goes_on:
            text = _render(served, cleaned, keywords | {"continue_final_message": True}, False)
        else:
            text = _render(served, cleaned, keywords, add_generation_prompt)
        tokens = _tokens(served, text)
    except Exception as error:  # a template is a program and raises what it likes
        raise BadRequest(
            f"{param}: the model's chat template refuses them ({brief(str(error))})", param
        ) from None
    marks: set[int] = set()
    if served.branches and add_generation_prompt and not goes_on:
        system = [*takewhile(lambda message: message["role"] == "system", cleaned)]
        others = [[*cleaned, {"role": "assistant", "content": "."}]]  # the next turn's prompt
        if system:
            others.append([*system, {"role": "user", "content": "."}])
        for other in others:
            with contextlib.suppress(Exception):  # a template may have no such form
                marks.add(_shared(tokens, _tokens(served, _render(served, other, keywords, False))))
    within = tuple(sorted(mark for mark in marks if 1 < mark < len(tokens)))
    start = served.tokenizer.think_start if served.tokenizer.has_thinking else None
    return Prompt(tokens, within, start is not None and text.rstrip().endswith(start))


def effort(asked: str | None) -> dict[str, Any]:
    """Returns the keywords of a template that an effort of reasoning comes to."""
    if asked is None:
        return {}
    return {"enable_thinking": False} if asked == "none" else {"reasoning_effort": asked}


def _render(
    served: Served, messages: list[Message], keywords: dict[str, Any], generation: bool
) -> str:
    return str(
        served.tokenizer.apply_chat_template(
            messages, **keywords, tokenize=False, add_generation_prompt=generation
        )
    )


def _tokens(served: Served, text: str) -> list[int]:
    return [*served.tokenizer.encode(text, add_special_tokens=False)]


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
