"""How a request's keys are read: honoured, accepted, or refused by name.

Honoured keys change the answer. Accepted ones are those without which the answer is the same, so
nothing is lost by reading over them. Every other key is refused by name: a key that is ignored in
silence is a wrong answer. Null stands for a key that is not there, as in OpenAI's own API.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_drift.errors import brief, printable
from mlx_drift.serve.api.kinds import Kind


class BadRequest(Exception):
    """A request that cannot be answered as it stands.

    Args:
        message: What was found, what was expected, and what to do.
        param: The field it is about.
        status: The HTTP status.
        code: A word for programs.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = printable(message)
        self.param = None if param is None else printable(param)[:200]
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True)
class Honoured:
    """A key that changes the answer: what it may hold, and what it does."""

    kind: Kind
    what: str
    required: bool = False


@dataclass(frozen=True)
class Accepted:
    """A key that is read over: what it may hold, and why the answer is the same without it."""

    kind: Kind
    why: str


@dataclass(frozen=True)
class Fields:
    """The keys of one endpoint.

    Attributes:
        path: The endpoint.
        honoured: Keys that change the answer.
        accepted: Keys without which it is the same.
        refused: Why some of the others are refused; all of them are.
    """

    path: str
    honoured: Mapping[str, Honoured]
    accepted: Mapping[str, Accepted]
    refused: Mapping[str, str] = field(default_factory=dict)

    def read(self, body: Any) -> dict[str, Any]:
        """Returns the honoured keys of a request's body that were given.

        Raises:
            BadRequest: Naming the first key that is unknown, missing, or holds something else.
        """
        if not isinstance(body, dict):
            raise BadRequest(f"the body is a JSON {type(body).__name__}; expected an object")
        given = {}
        for name, value in body.items():
            if value is None and (name in self.honoured or name in self.accepted):
                continue
            known = self.honoured.get(name) or self.accepted.get(name)
            if known is None:
                why = self.refused.get(name, "this server does not know it")
                shown = printable(name[:80])
                raise BadRequest(f"{shown}: {why}; leave it out", shown, code="unsupported")
            try:
                known.kind(value)
            except ValueError as error:
                raise BadRequest(f"{name} is {brief(value)}; {error}", name) from None
            if name in self.honoured:
                given[name] = value
        for name, honoured in self.honoured.items():
            if honoured.required and name not in given:
                raise BadRequest(f"{name} is missing; expected {honoured.kind.expected}", name)
        return given

    def tables(self) -> str:
        """Returns the three tables in Markdown, for the documentation."""
        rows = ["| honoured | holds | what it does |", "|---|---|---|"]
        rows += [f"| `{n}` | {f.kind.expected} | {f.what} |" for n, f in self.honoured.items()]
        if self.accepted:
            rows += ["", "| accepted | holds | why the answer is the same without it |"]
            rows += ["|---|---|---|"]
            rows += [f"| `{n}` | {f.kind.expected} | {f.why} |" for n, f in self.accepted.items()]
        rows += ["", "| refused | why |", "|---|---|"]
        rows += [f"| `{name}` | {why} |" for name, why in self.refused.items()]
        rows += ["| every other key | this server does not know it |"]
        return "\n".join(rows)
