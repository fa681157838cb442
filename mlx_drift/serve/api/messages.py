"""Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from mlx_drift.serve.api.asking import Answer, Asked, ask, speculative
from mlx_drift.serve.api.events import event
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import text_format
from mlx_drift.serve.api.messages_fields import COUNT_TOKENS, MESSAGES
from mlx_drift.serve.api.messages_history import read_messages, read_system, read_tools
from mlx_drift.serve.api.prompts import Prompt, effort, lay_out
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.api.tools import check_tools, held_to
from mlx_drift.serve.request import Ended, Piece, Usage
from mlx_drift.serve.said import Block, Blocks, CallBegan, CallEnded, Reasoning, Said, Speech, Text

SIGNATURE = "mlx-drift"
"""Of thinking blocks: clients send it back, and nobody checks it."""

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Messages:
    """The endpoint."""

    path = "/v1/messages"
    fields = MESSAGES

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request."""
        prompt, speech = read_prompt(given, served)
        form = (given.get("output_config") or {}).get("format")
        grammar = text_format(form, served, "output_config.format")
        grammar = held_to(grammar, speech.tools, speech.must_call, served, "output_config.format")
        renamed = given | {"stop": given.get("stop_sequences", [])}
        requests = ask(
            renamed,
            served,
            [prompt],
            param="messages",
            top_logprobs=None,
            speech=speech,
            grammar=grammar,
        )
        reply = MessagesReply(name, len(prompt.tokens))
        return Asked(requests, given.get("stream", False), reply)

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""
        return anthropic_error(error)


class CountTokens:
    """The endpoint that counts a prompt's tokens."""

    path = "/v1/messages/count_tokens"
    fields = COUNT_TOKENS

    def count(self, given: dict[str, Any], served: Served) -> dict[str, Any]:
        """Returns the body of a response."""
        return {"input_tokens": len(read_prompt(given, served)[0].tokens)}

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""
        return anthropic_error(error)


def read_prompt(given: dict[str, Any], served: Served) -> tuple[Prompt, Speech]:
    """Reads what both endpoints have in common.

    Raises:
        BadRequest: If a field makes no sense.
    """
    choice = given.get("tool_choice") or {"type": "auto"}
    must_call = {"any": "", "tool": choice.get("name")}.get(choice["type"])
    tools = read_tools(given.get("tools", []))
    offered = [] if choice["type"] == "none" else tools
    check_tools(served, offered, must_call)
    thinking = given.get("thinking") or {"type": "adaptive"}
    keywords = effort((given.get("output_config") or {}).get("effort"))
    if thinking["type"] != "adaptive":
        keywords["enable_thinking"] = thinking["type"] == "enabled"
    keywords |= given.get("chat_template_kwargs", {})
    messages = read_messages(given["messages"])
    prompt = lay_out(
        served,
        read_system(given.get("system")) + messages,
        keywords,
        offered,
        goes_on=messages[-1]["role"] == "assistant",
    )
    speech = Speech(
        tools=offered,
        begins_in_reasoning=prompt.begins_in_reasoning,
        calls_once=bool(choice.get("disable_parallel_tool_use")),
        must_call=must_call,
        thinking_budget=thinking.get("budget_tokens"),
    )
    return prompt, speech


def anthropic_error(error: BadRequest) -> dict[str, Any]:
    """Returns an error as Anthropic's API writes it; a prompt too long is known by its words."""
    is_long = error.code == "context_length_exceeded"
    return {
        "type": "error",
        "error": {
            "type": KINDS.get(error.status, "invalid_request_error")
            if error.status < 500 or error.status in KINDS
            else "api_error",
            "message": f"prompt is too long: {error.message}" if is_long else error.message,
            "param": error.param,
            "code": error.code,
        },
    }


class MessagesReply:
    """Writes messages, whole and as events.

    Args:
        model: What the request called it.
        prompt_tokens: Of the prompt; how many of them are cached is known at the end.
    """

    keepalive = event("ping")

    def __init__(self, model: str, prompt_tokens: int):
        self.id = f"msg_{uuid.uuid4().hex}"
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.blocks = Blocks()

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""
        (answer,) = answers
        content = [_whole(block) for block in answer.blocks]
        return self._message(content) | _stop(answer.ended) | {"usage": _usage(answer.ended.usage)}

    def opening(self) -> str:
        """Returns the event that names the message."""
        return event("message_start", message=self._message([])) + self.keepalive

    def piece(self, index: int, piece: Piece) -> str:
        """Returns the events of a piece."""
        return "".join(map(self._events, piece.said))

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the events with which the message ends."""
        return (
            self._close()
            + event("message_delta", delta=_stop(ended), usage=_usage(ended.usage))
            + event("message_stop")
        )

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns nothing: the message has ended."""
        return ""

    def failed(self, error: BadRequest) -> str:
        """Returns the error."""
        return event(**anthropic_error(error))

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(self.prompt_tokens)),
        }

    def _events(self, said: Said) -> str:
        closing = "" if self.blocks.fits(said) else self._close()
        count = len(self.blocks.every)
        block = self.blocks.add(said)
        index = len(self.blocks.every) - 1
        if isinstance(said, CallEnded):
            return event("content_block_stop", index=index)
        begun = ""
        if len(self.blocks.every) > count:
            begun = event("content_block_start", index=index, content_block=_empty(block))
        if isinstance(said, CallBegan):
            return closing + begun
        kinds = {Text: ("text_delta", "text"), Reasoning: ("thinking_delta", "thinking")}
        kind, key = kinds.get(type(said), ("input_json_delta", "partial_json"))
        delta = {"type": kind, key: said.text}
        return closing + begun + event("content_block_delta", index=index, delta=delta)

    def _close(self) -> str:
        """Ends the open block."""
        if not self.blocks.is_open:
            return ""
        self.blocks.is_open = False
        index = len(self.blocks.every) - 1
        signed = ""
        if self.blocks.every[-1].kind is Reasoning:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signed = event("content_block_delta", index=index, delta=delta)
        return signed + event("content_block_stop", index=index)


def _empty(block: Block) -> dict[str, Any]:
    """Returns a block as it begins."""
    if block.kind is Text:
        return {"type": "text", "text": ""}
    if block.kind is Reasoning:
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}


def _whole(block: Block) -> dict[str, Any]:
    """Returns a block; a call that was cut has no input."""
    if block.kind is Text:
        return {"type": "text", "text": block.text}
    if block.kind is Reasoning:
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    return _empty(block) | {"input": json.loads(block.text) if block.is_whole else {}}


def _stop(ended: Ended) -> dict[str, Any]:
    reason = "stop_sequence" if ended.stop is not None else REASONS[ended.reason]
    return {"stop_reason": reason, "stop_sequence": ended.stop}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "speculative": speculative([usage]),
    }
