"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
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
from mlx_drift.serve.api.events import DONE, data
from mlx_drift.serve.api.fields import CHAT, BadRequest
from mlx_drift.serve.api.formats import response_format
from mlx_drift.serve.api.prompts import lay_out
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.request import Ended, Piece, Scored

CHUNK = "chat.completion.chunk"


class Chat:
    """The endpoint."""

    path = "/v1/chat/completions"
    fields = CHAT

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request."""
        prompt = lay_out(served, given["messages"], given.get("chat_template_kwargs", {}))
        wanted = given.get("logprobs", False)
        if "top_logprobs" in given and not wanted:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        top = given.get("top_logprobs", 0) if wanted else None
        grammar = response_format(given.get("response_format"), served)
        requests = ask(given, served, [prompt], param="messages", top_logprobs=top, grammar=grammar)
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


class ChatReply:
    """Writes chat completions, and their chunks."""

    def __init__(
        self, head: Head, tokenizer: TokenizerWrapper, choices: int, *, include_usage: bool
    ):
        self.head = head
        self.tokenizer = tokenizer
        self.choices = choices
        self.include_usage = include_usage

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""
        choices = []
        for index, answer in enumerate(answers):
            scored = [token for piece in answer.pieces for token in piece.scored]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self._logprobs(scored),
                    "finish_reason": answer.ended.reason,
                }
            )
        body = self.head.of("chat.completion", choices)
        return body | {"usage": usage([a.ended for a in answers], self.choices)}

    def opening(self) -> str:
        """Returns the chunks that name the role."""
        role = {"role": "assistant", "content": ""}
        return "".join(self._chunk(index, role, None, None) for index in range(self.choices))

    def piece(self, index: int, piece: Piece) -> str:
        """Returns the chunk of a piece."""
        return self._chunk(index, {"content": piece.text}, self._logprobs(piece.scored), None)

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the chunk with which an answer ends."""
        return self._chunk(index, {}, None, ended.reason)

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns the usage, if it was asked for, and the end."""
        if not self.include_usage:
            return DONE
        return data(self.head.of(CHUNK, []) | {"usage": usage(ended, self.choices)}) + DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self.head.of(CHUNK, [choice])
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
