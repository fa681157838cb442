"""OpenAI's Responses API: `POST /v1/responses`."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_drift.serve.api.asking import Answer, Asked, ask, openai_error, speculative
from mlx_drift.serve.api.events import KEEPALIVE, event
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import text_format
from mlx_drift.serve.api.prompts import effort, lay_out
from mlx_drift.serve.api.responses_fields import RESPONSES
from mlx_drift.serve.api.responses_input import Origin, read_input, read_tools
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.api.tools import check_tools, held_to
from mlx_drift.serve.request import Ended, Piece, Request, Usage
from mlx_drift.serve.said import Block, Blocks, CallBegan, CallEnded, Reasoning, Said, Speech, Text


class Responses:
    """The endpoint."""

    path = "/v1/responses"
    fields = RESPONSES

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request."""
        tools, origins = read_tools(given.get("tools", []))
        choice = given.get("tool_choice", "auto")
        must_call = "" if choice == "required" else None
        if isinstance(choice, dict):
            must_call = choice["name"]
        offered = [] if choice == "none" else tools
        check_tools(served, offered, must_call)
        reasoning, form = given.get("reasoning") or {}, (given.get("text") or {}).get("format")
        grammar = held_to(text_format(form, served), offered, must_call, served, "text.format")
        keywords = effort(reasoning.get("effort")) | given.get("chat_template_kwargs", {})
        messages = read_input(given["input"], given.get("instructions"), origins)
        prompt = lay_out(served, messages, keywords, offered, param="input")
        speech = Speech(
            tools=offered,
            begins_in_reasoning=prompt.begins_in_reasoning,
            calls_once=not given.get("parallel_tool_calls", True),
            must_call=must_call,
            thinking_budget=given.get("thinking_budget"),
        )
        (request,) = ask(
            given | {"max_completion_tokens": given.get("max_output_tokens")},
            served,
            [prompt],
            param="input",
            top_logprobs=None,
            speech=speech,
            grammar=grammar,
        )
        reply = ResponsesReply(_told(given, request, name), origins)
        return Asked([request], given.get("stream", False), reply)

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""
        return openai_error(error)


def _told(given: dict[str, Any], request: Request, name: str) -> dict[str, Any]:
    """Returns what a response tells of its request."""
    reasoning = given.get("reasoning") or {}
    return {
        "model": name,
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "store": False,
        "temperature": request.sampling.temp,
        "text": {"format": (given.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_p": request.sampling.top_p or 1.0,
        "truncation": "disabled",
        "metadata": {},
    }


class ResponsesReply:
    """Writes responses, whole and as events.

    Args:
        told: What a response tells of its request.
        origins: What the functions that the model is told of are in the request.
    """

    keepalive = KEEPALIVE

    def __init__(self, told: dict[str, Any], origins: Mapping[str, Origin]):
        self.id = f"resp_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.told = told
        self.origins = origins
        self.blocks = Blocks()
        self.items: list[dict[str, Any]] = []
        self._item_id = ""
        self._number = 0

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""
        (answer,) = answers
        blocks, is_cut = answer.blocks, answer.ended.reason == "length"
        for i, block in enumerate(blocks):
            self._name(block)
            self.items.append(self._item(block, _status(is_cut and i == len(blocks) - 1)))
        return self._ended(answer.ended)

    def opening(self) -> str:
        """Returns the events that name the response."""
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, index: int, piece: Piece) -> str:
        """Returns the events of a piece."""
        return "".join(map(self._events, piece.said))

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the events with which the response ends."""
        closing = self._close(is_cut=ended.reason == "length")
        response = self._ended(ended)
        return closing + self._event(f"response.{response['status']}", response=response)

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns nothing: the response has ended."""
        return ""

    def failed(self, error: BadRequest) -> str:
        """Returns the event of a response that failed."""
        response = self._response("failed", None)
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def _event(self, type: str, **keys: Any) -> str:
        self._number += 1
        return event(type, sequence_number=self._number - 1, **keys)

    def _of_item(self, type: str, **keys: Any) -> str:
        """Returns an event of the item under way."""
        return self._event(
            f"response.{type}", item_id=self._item_id, output_index=len(self.items), **keys
        )

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [*self.items],
            "usage": None if usage is None else _usage(usage),
            **self.told,
        }

    def _ended(self, ended: Ended) -> dict[str, Any]:
        is_cut = ended.reason == "length"
        response = self._response(_status(is_cut), ended.usage)
        details = {"reason": "max_output_tokens"} if is_cut else None
        return response | {"incomplete_details": details, "completed_at": int(time.time())}

    def _events(self, said: Said) -> str:
        closing = "" if self.blocks.fits(said) else self._close()
        count = len(self.blocks.every)
        block = self.blocks.add(said)
        if isinstance(said, CallEnded):
            return self._done(block, _status(not said.is_whole))
        begun = ""
        if len(self.blocks.every) > count:
            self._name(block)
            begun = self._begun(block)
        if isinstance(said, CallBegan):
            return closing + begun
        return closing + begun + self._delta(block, said.text)

    def _close(self, *, is_cut: bool = False) -> str:
        """Ends the open block, which is no call."""
        if not self.blocks.is_open:
            return ""
        self.blocks.is_open = False
        return self._done(self.blocks.every[-1], _status(is_cut))

    def _name(self, block: Block) -> None:
        """Gives the item of a block its id."""
        prefix = {Text: "msg", Reasoning: "rs"}.get(block.kind)
        if prefix is None:
            prefix = "ctc" if self._origin(block).is_custom else "fc"
        self._item_id = f"{prefix}_{uuid.uuid4().hex}"

    def _origin(self, block: Block) -> Origin:
        return self.origins.get(block.name) or Origin(block.name)

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        """Returns the item of a block as far as it has come."""
        item: dict[str, Any] = {"id": self._item_id, "status": status}
        has_begun = status != "in_progress"
        if block.kind is Text:
            content = [_part(block)] if has_begun else []
            return item | {"type": "message", "role": "assistant", "content": content}
        if block.kind is Reasoning:
            content = [_part(block)] if has_begun else []
            return item | {"type": "reasoning", "summary": [], "content": content}
        origin = self._origin(block)
        item |= {"call_id": block.id, "name": origin.name}
        if origin.namespace is not None:
            item["namespace"] = origin.namespace
        if origin.is_custom:
            return item | {"type": "custom_tool_call", "input": _input(block)}
        return item | {"type": "function_call", "arguments": block.text}

    def _begun(self, block: Block) -> str:
        added = self._event(
            "response.output_item.added",
            output_index=len(self.items),
            item=self._item(block, "in_progress"),
        )
        if block.kind is CallBegan:
            return added
        part = _part(Block(block.kind))
        return added + self._of_item("content_part.added", content_index=0, part=part)

    def _delta(self, block: Block, text: str) -> str:
        if block.kind is Text:
            return self._of_item("output_text.delta", content_index=0, delta=text, logprobs=[])
        if block.kind is Reasoning:
            return self._of_item("reasoning_text.delta", content_index=0, delta=text)
        if self._origin(block).is_custom:
            return ""  # its input is a text within the arguments: told when it is whole
        return self._of_item("function_call_arguments.delta", delta=text)

    def _done(self, block: Block, status: str) -> str:
        """Ends the item under way."""
        if block.kind is CallBegan:
            if self._origin(block).is_custom:
                text = _input(block)
                said = self._of_item("custom_tool_call_input.delta", delta=text)
                said += self._of_item("custom_tool_call_input.done", input=text)
            else:
                said = self._of_item(
                    "function_call_arguments.done",
                    name=self._origin(block).name,
                    arguments=block.text,
                )
        else:
            kind = "output_text" if block.kind is Text else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if block.kind is Text else {}
            said = self._of_item(f"{kind}.done", content_index=0, text=block.text, **more)
            said += self._of_item("content_part.done", content_index=0, part=_part(block))
        item = self._item(block, status)
        done = self._event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        return said + done


def _status(is_cut: bool) -> str:
    return "incomplete" if is_cut else "completed"


def _part(block: Block) -> dict[str, Any]:
    if block.kind is Reasoning:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _input(block: Block) -> str:
    """Returns the input of a custom tool; nothing of one that was cut."""
    if not block.is_whole:
        return ""
    arguments = json.loads(block.text)
    text = arguments.get("input")
    return text if isinstance(text, str) else block.text


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "speculative": speculative([usage]),
    }
