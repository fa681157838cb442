"""From tokens to what is said: whole characters, told apart, nothing past a stop text.

Markers are matched on text, as mlx-lm does: a tokenizer may merge a marker's last letter with what
follows. White space between a marker and what is said is dropped.

Notable:
- A marker of calls within reasoning is part of the reasoning (mlx-lm #1262), and one within a
  string of a call's arguments part of that string.
- Texts to stop at end the answer in its text alone: neither reasoning nor arguments.
"""

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.serve.calls import Calls
from mlx_drift.serve.said import CallEnded, Reasoning, Said, Speech, Text, joined

TEXT, REASONING, CALL = "normal", "reasoning", "tool"
"""States, named as in the response formats of mlx-lm's tokenizers."""

STOPPED = "stopped "
"""What the names of the states after a stop text begin with."""


class Wording:
    """What one answer says, piece by piece.

    Args:
        tokenizer: The target's.
        stop: Texts before which the answer ends.
        speech: How it is told apart; None for text alone.

    Attributes:
        stopped: The one of `stop` that came.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, stop: Sequence[str], speech: Speech | None = None
    ):
        self.stopped: str | None = None
        self._detokenizer = tokenizer.detokenizer
        self._calls: Calls | None = None
        self._once = speech is not None and speech.calls_once
        edges: dict[str, list[tuple[str, str]]] = {TEXT: []}
        start = TEXT
        if speech is not None:
            if speech.tools:
                self._calls = Calls(tokenizer, speech.tools, speech.calls_once)
            edges |= _edges(tokenizer, has_calls=bool(speech.tools))
            start = tokenizer.response_initial_state or start
            start = REASONING if speech.begins_in_reasoning else start
        self._is_split = any(edges.values())
        stops = [text for text in stop if text]
        edges[TEXT] = edges[TEXT] + [(text, f"{STOPPED}{text}") for text in stops]
        edges |= {f"{STOPPED}{text}": [] for text in stops}
        self._end_marker = (tokenizer.tool_call_end or "") if self._calls is not None else ""
        self._machine = TextStateMachine(edges)
        self._state = self._machine.make_state(start)
        self._name = start
        self._space = ""  # at the end of what was said: dropped if a marker follows
        self._before = ""  # the same before the last marker of a call
        self._is_fresh = start != TEXT  # nothing was said since the last marker

    @property
    def calls(self) -> int:
        """Whole calls so far."""
        return 0 if self._calls is None else self._calls.count

    @property
    def is_reasoning(self) -> bool:
        """Whether it is within reasoning."""
        return self._name == REASONING

    @property
    def is_over(self) -> bool:
        """Whether nothing more is wanted."""
        return self.stopped is not None or (self._once and self.calls > 0)

    def add(self, token: int) -> list[Said]:
        """Takes a token; returns what is certain by now."""
        self._detokenizer.add_token(token)
        return joined(self._read(self._detokenizer.last_segment))

    def end(self, *, is_cut: bool) -> list[Said]:
        """Returns what was held back.

        Args:
            is_cut: The answer ends because nothing more may be said, not because it is whole.
        """
        self._detokenizer.finalize()
        said = self._read(self._detokenizer.last_segment)
        if self.is_over:
            return joined(said)
        self._state, held, _ = TextStateMachine.flush(self._state)
        said += self._say(self._name, held)
        if self._name == CALL and self._calls is not None:
            ended = self._calls.end(is_cut=is_cut, has_marker=False)
            said += self._no_call(ended) if any(isinstance(e, Text) for e in ended) else ended
        elif self._space and not self._is_fresh:
            said.append(Reasoning(self._space) if self._name == REASONING else Text(self._space))
        return joined(said)

    def _read(self, text: str) -> list[Said]:
        """Reads text; letter by letter where there are markers, as some are none after all."""
        if not self._is_split:
            return self._step(text)
        said: list[Said] = []
        for letter in text:
            said += self._step(letter)
        return said

    def _step(self, text: str) -> list[Said]:
        if self.is_over or not text:
            return []
        self._state, segments = TextStateMachine.split(self._state, text)
        said: list[Said] = []
        for i, (name, part) in enumerate(segments):
            if i:
                said += self._enter(name)
            said += self._say(name, part)
        return said

    def _enter(self, name: str) -> list[Said]:
        """A marker came: goes to the state that it leads to."""
        before, self._name = self._name, name
        if name.startswith(STOPPED):
            self.stopped = name.removeprefix(STOPPED)
            space, self._space = self._space, ""
            return [Text(space)] if space and not self._is_fresh else []
        said: list[Said] = []
        if before == CALL and self._calls is not None:
            if self._calls.is_in_string:
                self._goto(CALL)
                return self._say(CALL, self._end_marker)
            said = self._calls.end(is_cut=False, has_marker=True)
        if any(isinstance(one, Text) for one in said):
            return self._no_call(said)
        if name == CALL and self._calls is not None:
            self._calls.begin()
            self._before = "" if self._is_fresh else self._space
        self._space, self._is_fresh = "", True
        return said

    def _no_call(self, said: list[Said]) -> list[Said]:
        """Returns what is text after all, with the white space before the marker of its call."""
        self._space, self._is_fresh = "", False
        *others, text = said
        return [*others, Text(self._before), text] if self._before else said

    def _say(self, name: str, text: str) -> list[Said]:
        if not text:
            return []
        if name == CALL and self._calls is not None:
            said, is_no_call = self._calls.add(text)
            if CallEnded(True) in said:
                self._before = ""
            if is_no_call:
                held = self._state[3]  # what may have been the beginning of a marker
                self._goto(TEXT)
                said = self._no_call(said) + self._step(held)
            return said
        if name not in (TEXT, REASONING):
            return []  # a response format's own: headers
        if self._is_fresh:
            text = text.lstrip()
        if self._is_split:
            text = self._space + text
            self._space = text[len(text.rstrip()) :]
            text = text.rstrip()
        if not text:
            return []
        self._is_fresh = False
        return [Reasoning(text) if name == REASONING else Text(text)]

    def _goto(self, name: str) -> None:
        self._state, self._name = self._machine.make_state(name), name
        self._space, self._is_fresh = "", False


def _edges(tokenizer: TokenizerWrapper, *, has_calls: bool) -> dict[str, list[tuple[str, str]]]:
    """Returns what markers lead from each state to which, as `make_text_state_machine` has them."""
    edges: dict[str, list[tuple[str, str]]] = {TEXT: []}
    own: dict[str, list[Any]] = tokenizer.response_transitions
    if tokenizer.has_thinking:
        edges[TEXT].append((tokenizer.think_start, REASONING))
        edges[REASONING] = [(tokenizer.think_end, TEXT)]
    if has_calls:
        if not any(to == CALL for leading in own.values() for _, to in leading):
            edges[TEXT].append((tokenizer.tool_call_start, CALL))
        edges[CALL] = [(tokenizer.tool_call_end, TEXT)] if tokenizer.tool_call_end else []
    edges[TEXT] += [(marker, TEXT) for marker in tokenizer.structural_markers]
    for name, leading in own.items():
        kept = [(marker, to) for marker, to in leading if has_calls or to != CALL]
        edges[name] = edges.get(name, []) + kept
    return edges
