"""`POST /v1/completions`."""

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
from mlx_drift.serve.api.events import DONE, KEEPALIVE, data
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.api.prompts import Prompt, encode
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.api.tables import COMPLETIONS, MOST_CHOICES
from mlx_drift.serve.request import Ended, Piece, Scored

KIND = "text_completion"


class Completions:
    """The endpoint."""

    path = "/v1/completions"
    fields = COMPLETIONS

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request."""
        prompt = given["prompt"]
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        prompts = [Prompt(encode(served, one)) for one in ([prompt] if single else prompt)]
        choices = given.get("n", 1)
        if len(prompts) * choices > MOST_CHOICES:
            raise BadRequest(
                f"{len(prompts)} prompts with n = {choices} are more than {MOST_CHOICES} answers",
                "n",
            )
        requests = ask(given, served, prompts, param="prompt", top_logprobs=given.get("logprobs"))
        options = given.get("stream_options") or {}
        reply = CompletionReply(
            Head.make("cmpl", name),
            served.tokenizer,
            choices,
            include_usage=bool(options.get("include_usage")),
        )
        return Asked(requests, given.get("stream", False), reply)

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""
        return openai_error(error)


class CompletionReply:
    """Writes completions, whole and in pieces: objects of one kind."""

    keepalive = KEEPALIVE

    def __init__(
        self, head: Head, tokenizer: TokenizerWrapper, choices: int, *, include_usage: bool
    ):
        self.head = head
        self.tokenizer = tokenizer
        self.choices = choices
        self.include_usage = include_usage
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""
        choices = []
        for index, answer in enumerate(answers):
            scored = [token for piece in answer.pieces for token in piece.scored]
            choices.append(self._choice(index, answer.text, scored, answer.ended.reason))
        body = self.head.of(KIND, choices)
        return body | {"usage": usage([a.ended for a in answers], self.choices)}

    def opening(self) -> str:
        """Returns nothing: there is no role to name."""
        return ""

    def piece(self, index: int, piece: Piece) -> str:
        """Returns a piece."""
        return self._chunk([self._choice(index, piece.text, piece.scored, None)])

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the piece with which an answer ends."""
        return self._chunk([self._choice(index, "", [], ended.reason)])

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns the usage, if it was asked for, and the end."""
        if not self.include_usage:
            return DONE
        return data(self.head.of(KIND, []) | {"usage": usage(ended, self.choices)}) + DONE

    def failed(self, error: BadRequest) -> str:
        """Returns the error."""
        return data(openai_error(error))

    def _chunk(self, choices: list[dict[str, Any]]) -> str:
        chunk = self.head.of(KIND, choices)
        return data(chunk | {"usage": None} if self.include_usage else chunk)

    def _choice(
        self, index: int, text: str, scored: Sequence[Scored], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not scored:
            return None
        texts = [self.tokenizer.decode([s.token]) for s in scored]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(s.log_probability, MINUS_INFINITY) for s in scored],
            "top_logprobs": [
                {self.tokenizer.decode([t]): max(value, MINUS_INFINITY) for t, value in s.top}
                for s in scored
            ],
            "text_offset": offsets,
        }
