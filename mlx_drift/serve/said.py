"""What an answer says, told apart: text, reasoning, and calls of tools.

Every dialect words this one stream. Between a `CallBegan` and its `CallEnded` there are only
`CallArguments`, and joined they are the beginning of a JSON object, all of it if the call is whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegan:
    """A call of a tool begins."""

    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments: JSON."""

    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call ends; not whole if the answer was cut off within it, or it went on as no JSON does."""

    is_whole: bool


Said = Text | Reasoning | CallBegan | CallArguments | CallEnded


@dataclass(frozen=True)
class Speech:
    """How an answer is to be told apart.

    Attributes:
        tools: What may be called, each as chat/completions has it; without any, calls are text.
        begins_in_reasoning: The prompt ends within reasoning.
        calls_once: The answer ends after its first call.
        must_call: The answer has to call: any tool for "", else the one of this name.
        thinking_budget: Tokens of reasoning at most; None for no such limit.
    """

    tools: Sequence[dict[str, Any]] = ()
    begins_in_reasoning: bool = False
    calls_once: bool = False
    must_call: str | None = None
    thinking_budget: int | None = None


@dataclass
class Block:
    """A stretch of an answer that is all of one kind.

    Attributes:
        kind: `Text`, `Reasoning`, or `CallBegan` for a call.
        text: Its text; a call's arguments.
        id: A call's id.
        name: A call's tool.
        is_whole: A call's arguments are all there.
    """

    kind: type[Said]
    text: str = ""
    id: str = ""
    name: str = ""
    is_whole: bool = False


@dataclass
class Blocks:
    """The stretches of one answer, as it comes.

    Attributes:
        every: Those there are, the last one open unless `is_open` is false.
        is_open: The last one may go on.
    """

    every: list[Block] = field(default_factory=list)
    is_open: bool = False

    def fits(self, said: Said) -> bool:
        """Tells whether a piece goes on with the open block."""
        if not self.is_open or isinstance(said, CallBegan):
            return False
        return isinstance(said, CallArguments | CallEnded) or self.every[-1].kind is type(said)

    def add(self, said: Said) -> Block:
        """Adds a piece; returns the block that it belongs to."""
        if not self.fits(said):
            self.every.append(Block(type(said)))
            self.is_open = True
        block = self.every[-1]
        if isinstance(said, CallBegan):
            block.id, block.name = said.id, said.name
        elif isinstance(said, CallEnded):
            block.is_whole = said.is_whole
            self.is_open = False
        else:
            block.text += said.text
        return block


def joined(said: Iterable[Said]) -> list[Said]:
    """Joins pieces of one kind that follow each other."""
    whole: list[Said] = []
    for one in said:
        last = whole[-1] if whole else None
        if isinstance(one, Text | Reasoning | CallArguments) and type(last) is type(one):
            whole[-1] = type(one)(last.text + one.text)
        else:
            whole.append(one)
    return whole
