"""Long contexts: acceptance by length, under the ways a drafter can see one.

A context of N tokens is a prompt of at most N − `max_tokens` tokens, as near to that as turns and
words allow, and the answer. The prompt is a conversation of many turns: before the question come
other questions of the set with the target's own greedy answers, the next question of the set
nearest, again and again if they run out; the oldest answer is cut to fit. Or it is the beginning of
a document with the question at its end.

What a drafter sees of it, the four of arXiv 2605.09992, §5.3, is among `ATTENTION`. The target
always sees everything.
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.drafters.head import LayersDrafter
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.files.text import read_text
from mlx_drift.measure.acceptance.answers import Task
from mlx_drift.measure.acceptance.asking import Answers, Settings, answer, question_seed
from mlx_drift.measure.acceptance.questions import Question
from mlx_drift.measure.acceptance.wording import Wording

ATTENTION = "full", "window", "window + first token", "window + system prompt"
"""What a drafter sees: all; the last tokens; those and the first one; those and all up to the
user's first words: BoS, what the template puts there, the system prompt."""

WINDOW = 1024
"""Tokens; a longer one gained nothing in the paper."""

One = TypeVar("One")


def parse_lengths(text: str) -> list[int]:
    """Parses lengths as in `512,1k,4k`; 1k is 1024.

    Raises:
        DriftError: If one is no such number.
    """
    lengths = []
    for part in text.lower().split(","):
        number = re.fullmatch(r"\s*(\d{1,9})(k?)\s*", part)
        if number is None or not int(number[1]):
            raise DriftError(f"the context {part.strip()!r} is no length; expected 512 or 4k, say")
        lengths.append(int(number[1]) * (1024 if number[2] else 1))
    return sorted(set(lengths))


def check_lengths(lengths: Sequence[int], max_tokens: int, config: Mapping[str, Any]) -> None:
    """Checks that contexts hold a prompt, and that the target has positions for them.

    Args:
        lengths: Tokens of the contexts.
        max_tokens: Of each, how many the answer may take.
        config: The target's `config.json`.

    Raises:
        DriftError: If one does not.
    """
    if min(lengths) <= max_tokens:
        raise DriftError(
            f"a context of {min(lengths)} tokens has no room for a prompt, with {max_tokens} of "
            "them for the answer (--max-tokens)"
        )
    text_config = config.get("text_config")
    configs = [config, text_config if isinstance(text_config, Mapping) else {}]
    limit = next((c["max_position_embeddings"] for c in configs if _is_limit(c)), None)
    if limit is not None and max(lengths) > limit:
        raise DriftError(
            f"a context of {max(lengths)} tokens is beyond the target's {limit} "
            "(max_position_embeddings); give shorter ones"
        )


def read_document(path: Path) -> str:
    """Reads a document.

    Raises:
        DriftError: If it cannot be read as text, is too large, or empty.
    """
    text = read_text(path)
    if not text.strip():
        raise DriftError(f"{path}: the document is empty; expected a text")
    return text


class Contexts:
    """Asks questions at the end of long prompts.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        drafters: Drafters loaded for it, by name.
        questions: The questions, of which the first turns are asked.
        wording: How conversations are laid out.
        settings: How answers are generated.
        window: How many tokens back a drafter with a window sees.
        document: What the questions are about; None for a conversation of many turns.

    Raises:
        DriftError: If there is neither a document nor another question to come before one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        drafters: Mapping[str, Drafter],
        questions: Sequence[Question],
        wording: Wording,
        settings: Settings,
        *,
        window: int,
        document: str | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.drafters = drafters
        self.questions = questions
        self.wording = wording
        self.settings = settings
        self.window = window
        if document is None and len(questions) == 1:
            raise DriftError(
                "a long conversation is made of the other questions, and there is but one; give "
                "more questions, or a --document"
            )
        self._document = None if document is None else self._encode(document)
        self._own_answer = functools.cache(self._answer_alone)

    def tasks(self, lengths: Sequence[int]) -> list[Task]:
        """Returns the tasks of asking all questions in contexts of some lengths."""
        views = {length: _by_condition(self._views(length, 0)) for length in lengths}
        return [
            Task(question, str(length), views[length], functools.partial(self.ask, number, length))
            for length in lengths
            for number, question in enumerate(self.questions)
        ]

    def ask(self, number: int, length: int) -> Answers:
        """Asks one question in a context of some length, under all kinds of attention.

        Args:
            number: Which question.
            length: Tokens of the context.

        Raises:
            DriftError: If the document is too short, or the question too long.
        """
        question = self.questions[number]
        prompt = self.prompt(number, length)
        head = self.wording.head(self.tokenizer, question.system_prompt)
        views = self._views(length, head)
        seed = question_seed(self.settings.seed, question, 0)
        _, found = answer(self.model, self.tokenizer, views, prompt, self.settings, seed)
        return _by_condition(found)

    def prompt(self, number: int, length: int) -> list[int]:
        """Returns the token ids of the prompt that asks a question in a context of some length.

        Raises:
            DriftError: If the document is too short, or the question too long.
        """
        room = length - self.settings.max_tokens
        question = self.questions[number]
        if len(self._lay_out(question, [])) > room:
            raise DriftError(
                f"question {question.id} alone does not fit a context of {length} tokens; give "
                "longer ones, or a smaller --max-tokens"
            )
        if self._document is not None:
            return self._at_end(number, room, self._document)
        return self._in_dialogue(number, room)

    def _views(self, length: int, head: int) -> dict[tuple[str, str], Drafter]:
        """Returns the drafters by condition and name."""
        return {
            (condition(length, attention), name): view
            for name, drafter in self.drafters.items()
            for attention, view in windows(drafter, self.window, head).items()
        }

    def _in_dialogue(self, number: int, room: int) -> list[int]:
        question = self.questions[number]
        earlier: list[tuple[str, str]] = []  # the newest first
        said = 0
        count = len(self.questions)
        others = [(number + i) % count for i in range(1, count)]
        for other in itertools.cycle(others):
            if said >= room:
                break
            earlier.append((self.questions[other].turns[0], self._own_answer(other)))
            said += sum(len(self._encode(text)) for text in earlier[-1]) + 1
        while (excess := len(prompt := self._lay_out(question, earlier)) - room) > 0:
            asked, answered = earlier.pop()
            kept = self._encode(answered)[:-excess]
            if kept:
                earlier.append((asked, self.tokenizer.decode(kept).rstrip("�")))
        return prompt

    def _at_end(self, number: int, room: int, document: list[int]) -> list[int]:
        question = self.questions[number]
        kept = document[:room]
        while (excess := len(prompt := self._lay_out(question, [], kept)) - room) > 0:
            kept = kept[:-excess]
        if len(kept) == len(document):
            raise DriftError(
                f"the document has {len(kept)} tokens, too few for a prompt of {room}; give a "
                "longer one, or shorter contexts"
            )
        return prompt

    def _lay_out(
        self,
        question: Question,
        earlier: Sequence[tuple[str, str]],
        document: Sequence[int] = (),
    ) -> list[int]:
        """Returns the prompt after earlier questions and answers, the newest of them first."""
        asked = question.turns[0]
        if document:
            asked = f"{self.tokenizer.decode(list(document))}\n\n{asked}"
        texts = [text for exchange in reversed(earlier) for text in exchange]
        return self.wording.encode(self.tokenizer, [*texts, asked], question.system_prompt)

    def _answer_alone(self, number: int) -> str:
        """Returns what the target answers greedily to a question alone."""
        question = self.questions[number]
        name, drafter = next(iter(self.drafters.items()))
        greedy = Settings(self.settings.num_draft_tokens, self.settings.max_tokens)
        prompt = self._lay_out(question, [])
        return answer(self.model, self.tokenizer, {name: drafter}, prompt, greedy)[0]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def condition(length: int, attention: str) -> str:
    """Names a length and what the drafter sees of it; `parse_condition` takes it apart."""
    return f"{length} tokens, {attention}"


def parse_condition(name: str) -> tuple[int, str]:
    """Returns the length and what the drafter sees of it."""
    length, _, attention = name.partition(" tokens, ")
    return int(length), attention


def windows(drafter: Drafter, window: int, head: int) -> dict[str, Drafter]:
    """Returns a drafter as often as there are ways to see a long context.

    Args:
        drafter: The drafter; one that is no EAGLE head has but one way, its own.
        window: Tokens back that it sees, in those with a window.
        head: How many tokens come before the user's first words.

    Returns:
        By name, of `ATTENTION`.

    Raises:
        DriftError: If the window is less than 1.
    """
    if not isinstance(drafter, LayersDrafter):
        return {"full": drafter}
    sizes: list[tuple[int | None, int]] = [(None, 0), (window, 0), (window, 1), (window, head)]
    return {
        attention: drafter.windowed(*size) for attention, size in zip(ATTENTION, sizes, strict=True)
    }


def _by_condition(by_view: Mapping[tuple[str, str], One]) -> dict[str, dict[str, One]]:
    """Sorts figures by condition, then by drafter."""
    sorted_out: dict[str, dict[str, One]] = {}
    for (seen, name), one in by_view.items():
        sorted_out.setdefault(seen, {})[name] = one
    return sorted_out


def _is_limit(config: Mapping[str, Any]) -> bool:
    limit = config.get("max_position_embeddings")
    return isinstance(limit, int) and limit > 0
