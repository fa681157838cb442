"""What every dialect does alike: from a request's fields to what the engine is asked."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from mlx_drift.decode.sampling import Sampling
from mlx_drift.errors import DriftError
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.serve.api.fields import BadRequest, Fields
from mlx_drift.serve.api.prompts import Prompt, check_length
from mlx_drift.serve.api.served import Served
from mlx_drift.serve.request import Ended, Piece, Request, Usage
from mlx_drift.serve.said import Block, Blocks, CallBegan, Reasoning, Speech, Text

MINUS_INFINITY = -9999.0
"""As OpenAI's API writes it: JSON has no infinity."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    pieces: Sequence[Piece]
    ended: Ended

    @property
    def blocks(self) -> list[Block]:
        """What it says, in stretches; of calls, those that are whole or that the limit cut."""
        blocks = Blocks()
        for piece in self.pieces:
            for said in piece.said:
                blocks.add(said)
        is_cut = self.ended.reason == "length"
        return [b for b in blocks.every if b.kind is not CallBegan or b.is_whole or is_cut]

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(block.text for block in self.blocks if block.kind is Text)

    @property
    def reasoning(self) -> str:
        """What came before it."""
        return "".join(block.text for block in self.blocks if block.kind is Reasoning)

    @property
    def calls(self) -> list[Block]:
        """Its calls."""
        return [block for block in self.blocks if block.kind is CallBegan]


class Reply(Protocol):
    """How a dialect writes its answers: whole, or as server-sent events.

    Attributes:
        keepalive: The event that says nothing.
    """

    keepalive: str

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Returns the body of a response."""

    def opening(self) -> str:
        """Returns the events that come first, before anything is known."""

    def piece(self, index: int, piece: Piece) -> str:
        """Returns the events of a piece of one of the answers."""

    def ended(self, index: int, ended: Ended) -> str:
        """Returns the events with which one of the answers ends."""

    def closing(self, ended: Sequence[Ended]) -> str:
        """Returns the events that come last."""

    def failed(self, error: BadRequest) -> str:
        """Returns the event that comes last if there will be no more of the answers."""


@dataclass(frozen=True)
class Asked:
    """What a request comes to.

    Attributes:
        requests: For the engine: an answer each.
        stream: Send the answers in pieces.
        reply: How they are written.
    """

    requests: list[Request]
    stream: bool
    reply: Reply


class Dialect(Protocol):
    """One endpoint that generates."""

    path: str
    fields: Fields

    def read(self, given: dict[str, Any], served: Served, name: str) -> Asked:
        """Reads the fields of a request; `name` is what it called the model.

        Raises:
            BadRequest: If they make no sense together.
        """

    def error(self, error: BadRequest) -> dict[str, Any]:
        """Returns the body of an error."""


def ask(
    given: dict[str, Any],
    served: Served,
    prompts: Sequence[Prompt],
    *,
    param: str,
    top_logprobs: int | None,
    speech: Speech | None = None,
    grammar: Grammar | None = None,
    expected: Sequence[int] = (),
) -> list[Request]:
    """Makes the engine's requests: `n` for every prompt.

    Args:
        given: The fields that all completions have in common.
        served: The model.
        prompts: What is to be answered.
        param: The field they came from.
        top_logprobs: How many of the likeliest tokens to tell; None for no log-probabilities.
        speech: How answers are told apart.
        grammar: What the answers must be (`mlx_drift.serve.api.formats`); None for anything.
        expected: Tokens that they may have.

    Raises:
        BadRequest: If a field is out of range for this model.
    """
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    if most != given.get("max_tokens", most):
        raise BadRequest(
            "max_tokens and max_completion_tokens differ; give one of them", "max_tokens"
        )
    defaults = served.defaults
    try:
        sampling = Sampling(
            temp=given.get("temperature", defaults.temperature),
            top_p=given.get("top_p", defaults.top_p),
            top_k=given.get("top_k", defaults.top_k),
            min_p=given.get("min_p", defaults.min_p),
            xtc_probability=given.get("xtc_probability", 0.0),
            xtc_threshold=given.get("xtc_threshold", 0.1),
            xtc_special_tokens=(
                *served.tokenizer.encode("\n"),
                *served.tokenizer.eos_token_ids,
            ),
        )
    except DriftError as error:  # the one that the fields' ranges leave
        raise BadRequest(f"temperature: {error}", "temperature") from None
    stop, tells = given.get("stop", []), given.get("speculative", {})
    requests = []
    for prompt in prompts:
        check_length(served, prompt.tokens, param)
        room = served.context - len(prompt.tokens)
        for choice in range(given.get("n", 1)):
            seed = given.get("seed")
            requests.append(
                Request(
                    tokens=prompt.tokens,
                    max_tokens=min(most or defaults.max_tokens, room),
                    sampling=sampling,
                    penalties=_penalties(given, served),
                    grammar=grammar,
                    seed=None if seed is None else seed + choice,
                    num_draft_tokens=given.get("num_draft_tokens"),
                    stop=tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s),
                    top_logprobs=top_logprobs,
                    marks=prompt.marks,
                    speech=speech,
                    tells_origins=bool(tells.get("tokens") or tells.get("drift")),
                    tells_drift=bool(tells.get("drift")),
                    expected=tuple(expected),
                )
            )
    return requests


def _penalties(given: dict[str, Any], served: Served) -> dict[str, Any]:
    """Returns keywords of mlx-lm's `make_logits_processors`; none where nothing is changed."""
    keywords: dict[str, Any] = {}
    for kind, neutral in (("repetition", 1), ("presence", 0), ("frequency", 0)):
        penalty = given.get(f"{kind}_penalty", neutral)
        if penalty != neutral:
            keywords[f"{kind}_penalty"] = float(penalty)
            keywords[f"{kind}_context_size"] = given.get(f"{kind}_context_size", 20)
    bias = {int(token): float(value) for token, value in given.get("logit_bias", {}).items()}
    if beyond := [token for token in bias if token >= served.vocab_size]:
        raise BadRequest(
            f"logit_bias: token {beyond[0]} is beyond the vocabulary of {served.vocab_size}",
            "logit_bias",
        )
    return keywords | ({"logit_bias": bias} if bias else {})


@dataclass(frozen=True)
class Head:
    """What every object of one response begins with."""

    id: str
    created: int
    model: str

    @classmethod
    def make(cls, prefix: str, model: str) -> "Head":
        """Makes one with a new id."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def of(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns an object of a kind with some choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"mlx-drift-{version('mlx-drift')}",
            "choices": choices,
        }


def usage(ended: Sequence[Ended], choices: int) -> dict[str, Any]:
    """Adds up the usage of answers; prompts that have several are counted once.

    Args:
        ended: How each answer ended.
        choices: Answers a prompt.
    """
    every: list[Usage] = [e.usage for e in ended]
    prompts = every[::choices]
    prompt_tokens = sum(u.prompt_tokens for u in prompts)
    completion_tokens = sum(u.completion_tokens for u in every)
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in every)},
        "speculative": speculative(every),
    }
    expected = [u.expected for u in every if u.expected is not None]
    if expected:
        came, rest = map(sum, zip(*expected, strict=True))
        found["completion_tokens_details"] |= {
            "accepted_prediction_tokens": came,
            "rejected_prediction_tokens": rest,
        }
    return found


def speculative(every: Sequence[Usage]) -> dict[str, Any]:
    """Tells what drafts came to."""
    tested, accepted = (
        _by_position([getattr(u, n) for u in every]) for n in ("tested", "accepted")
    )
    rounds = sum(u.rounds for u in every)
    return {
        "rounds": rounds,
        "tested_by_position": tested,
        "accepted_by_position": accepted,
        "acceptance_length": sum(accepted) / rounds if rounds else 0.0,
        "plain_tokens": sum(u.plain_tokens for u in every),
        "copied": _free("copy", every),
        "forced": _free("forced", every),
        "seconds": sum(u.seconds for u in every),
        "plain_step_seconds": every[-1].plain_step_seconds if every else None,
    }


def _free(source: str, every: Sequence[Usage]) -> dict[str, int]:
    """Returns the rounds whose drafts came from a source without a network, and those accepted."""
    found = [usage.free[source] for usage in every if source in usage.free]
    return {
        "rounds": sum(rounds for rounds, *_ in found),
        "accepted": sum(sum(accepted) for *_, accepted in found),
    }


def _by_position(counts: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, counts), default=0)
    return [sum(c[i] for c in counts if i < len(c)) for i in range(longest)]


def openai_error(error: BadRequest) -> dict[str, Any]:
    """Returns an error as OpenAI's API writes it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "")
    return {
        "error": {
            "message": error.message,
            "type": kind or "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }
