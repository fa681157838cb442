"""What the engine is asked, and what it tells meanwhile. Nothing here is of an API or of HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.text import Origin
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.serve.said import Said, Speech, Text
from mlx_drift.serve.watching import Drift


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
        tokens: Token ids of the whole conversation.
        max_tokens: Tokens of the answer at most.
        sampling: What tokens are drawn from, but for the logits processors.
        penalties: Keywords of mlx-lm's `make_logits_processors`.
        grammar: What the answer must be; None for anything.
        seed: Makes what is drawn reproducible.
        num_draft_tokens: Drafts a round; None for the server's.
        stop: Texts before which the answer ends.
        top_logprobs: How many of the likeliest tokens to tell with each token; None for not even
            its own log-probability.
        marks: Numbers of tokens after which other prompts may branch off: the system prompt's.
        speech: How the answer is told apart; None for text alone.
        tells_origins: Tell of every round who said its tokens.
        tells_drift: And what its drafter's chain did.
        expected: Tokens that the answer may have, to draft from.
    """

    tokens: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    penalties: Mapping[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None
    seed: int | None = None
    num_draft_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    marks: tuple[int, ...] = ()
    speech: Speech | None = None
    tells_origins: bool = False
    tells_drift: bool = False
    expected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability, and the likeliest ones in its place with theirs."""

    token: int
    log_probability: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Reading:
    """So many of the prompt's tokens are processed."""

    done: int
    total: int


class Told(NamedTuple):
    """A token: who said it, and what it made certain."""

    token: int
    origin: Origin
    said: list[Said]


@dataclass(frozen=True)
class Drafted:
    """Who said what in a round.

    Attributes:
        tokens: Those that the answer has of it.
        tested: Drafts that were tested.
        seconds: What it took.
        drift: What the drafter's chain did, where that was asked for and there was one.
    """

    tokens: list[Told]
    tested: int
    seconds: float
    drift: Drift | None = None


@dataclass(frozen=True)
class Piece:
    """What a round added to the answer.

    Attributes:
        said: What is certain of it; what may be the start of a stop text or marker is held back.
        scored: Its tokens, where log-probabilities were asked for.
        drafted: Who said what, where that was asked for.
    """

    said: list[Said]
    scored: list[Scored]
    drafted: Drafted | None = None

    @property
    def text(self) -> str:
        """Its text: neither reasoning nor calls."""
        return "".join(one.text for one in self.said if isinstance(one, Text))


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Of the prompt.
        cached_tokens: Those of them that were in a cache.
        completion_tokens: Of the answer, an end-of-text token included.
        reasoning_tokens: Those of them that are reasoning.
        rounds: Rounds with drafts.
        tested: Drafts that were tested, by their position in a round.
        accepted: Drafts that were accepted, likewise.
        free: Of the rounds whose drafts no network made, by where they came from: how many, and
            the drafts tested and accepted by their position.
        expected: Tokens that came of what the answer was expected to be, and that did not.
        plain_tokens: Tokens of plain decoding, between the rounds.
        seconds: What all rounds and tokens of plain decoding took.
        plain_step_seconds: What a token of plain decoding takes here; None if it was not timed.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    rounds: int = 0
    tested: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    free: Mapping[str, tuple[int, Sequence[int], Sequence[int]]] = field(default_factory=dict)
    expected: tuple[int, int] | None = None
    plain_tokens: int = 0
    seconds: float = 0.0
    plain_step_seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """There is nothing more to the answer.

    Attributes:
        reason: A stop token or text came; so it did after whole calls of tools; or `max_tokens`.
        usage: What it took.
        stop: The stop text that came.
    """

    reason: Literal["stop", "tool_calls", "length"]
    usage: Usage
    stop: str | None = None


@dataclass(frozen=True)
class Failed:
    """There will be no more of the answer.

    Attributes:
        kind: What ended it.
        message: What happened, and what to do.
    """

    kind: Literal["timeout", "shutdown", "refused", "error", "cancelled"]
    message: str


Event = Reading | Piece | Ended | Failed


class Busy(Exception):
    """Nothing more is taken on.

    Args:
        message: Why, and what to do.
        retry_after: Seconds after which to try again.
        is_closing: The engine is closing; else the queue is full.
    """

    def __init__(self, message: str, retry_after: int, is_closing: bool = False):
        super().__init__(message)
        self.retry_after = retry_after
        self.is_closing = is_closing
