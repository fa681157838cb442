"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.serve.api.asking import (
    MINUS_INFINITY,
    Answer,
    Asked,
    Head,
    ask,
    openai_error,
    usage,
)
from mlx_drift.serve.api.events import DONE, KEEPALIVE, data
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.formats import response_format
from mlx_drift.serve.api.history import read_messages, texts_of
from mlx_drift.serve.api.prompts import effort, lay_out
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.api.tables import CHAT
from mlx_drift.serve.api.tools import check_tools, held_to, read_tools
from mlx_drift.serve.request import Drafted, Ended, Piece, Scored
from mlx_drift.serve.said import CallArguments, CallBegan, Reasoning, Said, Speech, Text

CHUNK = "chat.completion.chunk"


class Chat:
    """The endpoint."""

    path = "/v1/chat/completions"
    fields = CHAT

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request."""
        tools = read_tools(given.get("tools", []))
        choice = given.get("tool_choice", "auto")
        must_call = None
        if isinstance(choice, dict):
            must_call = choice["function"]["name"]
        elif choice == "required":
            must_call = ""
        offered = [] if choice == "none" else tools
        check_tools(served, offered, must_call)
        keywords = effort(given.get("reasoning_effort")) | given.get("chat_template_kwargs", {})
        prompt = lay_out(served, read_messages(given["messages"]), keywords, offered)
        speech = Speech(
            tools=offered,
            begins_in_reasoning=prompt.begins_in_reasoning,
            calls_once=not given.get("parallel_tool_calls", True),
            must_call=must_call,
            thinking_budget=given.get("thinking_budget"),
        )
        grammar = response_format(given.get("response_format"), served)
        grammar = held_to(grammar, offered, must_call, served, "response_format")
        wanted = given.get("logprobs", False)
        if "top_logprobs" in given and not wanted:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        top = given.get("top_logprobs", 0) if wanted else None
        requests = ask(
            given,
            served,
            [prompt],
            param="messages",
            top_logprobs=top,
            speech=speech,
            grammar=grammar,
            expected=_expected(given.get("prediction"), served),
        )
        options = given.get("stream_options") or {}
        reply = ChatReply(
            Head.make("chatcmpl", name),
            served.tokenizer,
            len(requests),
            include_usage=bool(options.get("include_usage")),
        )
        return Asked(requests, given.get("stream", False), reply)

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""
        return openai_error(error)


def _expected(prediction: dict[str, Any] | None, served: Served) -> list[int]:
    """Returns the tokens of a predicted output."""
    if prediction is None:
        return []
    text = "".join(texts_of(prediction["content"], "prediction.content"))
    return [*served.tokenizer.encode(text, add_special_tokens=False)] if text else []


class ChatReply:
    """Writes chat completions, and their chunks."""

    keepalive = KEEPALIVE

    def __init__(
        self, head: Head, tokenizer: TokenizerWrapper, choices: int, *, include_usage: bool
    ):
        self.head = head
        self.tokenizer = tokenizer
        self.choices = choices
        self.include_usage = include_usage
        self._calls = [-1] * choices  # index of the last call of each answer

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""
        choices = []
        for index, answer in enumerate(answers):
            scored = [token for piece in answer.pieces for token in piece.scored]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": answer.text,
                "refusal": None,
            }
            if answer.reasoning:
                message |= _reasoning(answer.reasoning)
            if answer.calls:
                message["content"] = answer.text or None
                message["tool_calls"] = [
                    _call(call.id, call.name, call.text) for call in answer.calls
                ]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(scored),
                    "finish_reason": answer.ended.reason,
                }
                | _speculative([p.drafted for p in answer.pieces if p.drafted is not None])
            )
        body = self.head.of("chat.completion", choices)
        return body | {"usage": usage([a.ended for a in answers], self.choices)}

    def opening(self) -> str:
        """Returns the chunks that name the role."""
        role = {"role": "assistant", "content": ""}
        return "".join(self._chunk(index, role, None, None) for index in range(self.choices))

    def piece(self, index: int, piece: Piece) -> str:
        """Returns the chunks of a piece; the first of them has what is told of its tokens."""
        deltas = [delta for said in piece.said if (delta := self._delta(index, said))]
        if (piece.scored or piece.drafted) and not deltas:
            deltas = [{"content": ""}]
        logprobs = self._logprobs(piece.scored)
        further = _speculative([piece.drafted] if piece.drafted else [])
        return "".join(
            self._chunk(index, delta, None, None)
            if i
            else self._chunk(index, delta, logprobs, None, further)
            for i, delta in enumerate(deltas)
        )

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the chunk with which an answer ends."""
        return self._chunk(index, {}, None, ended.reason)

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns the usage, if it was asked for, and the end."""
        if not self.include_usage:
            return DONE
        return data(self.head.of(CHUNK, []) | {"usage": usage(ended, self.choices)}) + DONE

    def failed(self, error: BadRequest) -> str:
        """Returns the error."""
        return data(openai_error(error))

    def _delta(self, index: int, said: Said) -> dict[str, Any] | None:
        """Returns what a piece changes of the message; None for nothing."""
        if isinstance(said, Text):
            return {"content": said.text}
        if isinstance(said, Reasoning):
            return _reasoning(said.text)
        if isinstance(said, CallBegan):
            self._calls[index] += 1
            return {"tool_calls": [{"index": self._calls[index]} | _call(said.id, said.name, "")]}
        if isinstance(said, CallArguments):
            call = {"index": self._calls[index], "function": {"arguments": said.text}}
            return {"tool_calls": [call]}
        return None

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
        further: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self.head.of(CHUNK, [choice | (further or {})])
        return data(chunk | {"usage": None} if self.include_usage else chunk)

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not scored:
            return None
        return {
            "content": [
                self._token(s.token, s.log_probability)
                | {"top_logprobs": [self._token(*pair) for pair in s.top]}
                for s in scored
            ],
            "refusal": None,
        }

    def _token(self, token: int, log_probability: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {
            "token": text,
            "logprob": max(log_probability, MINUS_INFINITY),
            "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()],
        }


def _reasoning(text: str) -> dict[str, str]:
    """Returns reasoning under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _speculative(rounds: Sequence[Drafted]) -> dict[str, Any]:
    """Writes who said what in rounds; nothing if there are none."""
    if not rounds:
        return {}
    return {
        "speculative": [
            {
                "tested": round.tested,
                "seconds": round.seconds,
                "tokens": [
                    {
                        "text": _joined(told.said, Text),
                        "reasoning": _joined(told.said, Reasoning),
                        "token": told.token,
                        **asdict(told.origin),
                    }
                    for told in round.tokens
                ],
            }
            | ({} if round.drift is None else {"drift": asdict(round.drift)})
            for round in rounds
        ]
    }


def _joined(said: Sequence[Said], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(one.text for one in said if isinstance(one, kind))
