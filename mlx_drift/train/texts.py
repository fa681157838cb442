"""Gathers what is learned from and what is measured on, asking the target for what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.train.answers import Answerer
from mlx_drift.train.conversations import Conversation
from mlx_drift.train.held_out import Held
from mlx_drift.train.layout import Text
from mlx_drift.train.questions import ask_oneself
from mlx_drift.train.repetition import varied
from mlx_drift.train.text_file import TextFile


class Gathering:
    """Texts of conversations, most of them said by the target.

    Args:
        answerer: The target, answering.
        file: Where its answers are kept.
        stop: Asked after each answer whether to stop; then no more are asked for.
        tell: Told of `answers`: how many there are, of how many.

    Attributes:
        stopped: It was cut short, and not all are there.
        notes: What was left out and why, a line each.
    """

    def __init__(
        self,
        answerer: Answerer,
        file: Path,
        stop: Callable[[], bool],
        tell: Callable[[str, dict[str, Any]], None],
    ):
        settings = {
            **asdict(answerer.asking),
            "wordings": [asdict(wording) for wording in answerer.layout.wordings],
            "target": fingerprint(answerer.model),
        }
        self.answerer, self.layout, self.stop, self.tell = answerer, answerer.layout, stop, tell
        self.file = TextFile(file, settings, Target(answerer.model, lazy=True).shape.vocab_size)
        self.stopped = False
        self.notes: list[str] = []

    def own_questions(self, count: int) -> list[Conversation]:
        """Returns questions that the target asks itself, each but once."""
        found: dict[str, Conversation] = {}
        for number in range(count):
            if self.stop():
                self.stopped = True
                break
            question = ask_oneself(self.answerer, number, self.file)
            if question is not None:
                found.setdefault(str(question.messages[0]["content"]), question)
            self._tell("questions of its own", number + 1, count)
        left_out = count - len(found) if not self.stopped else 0
        self._note(left_out, f"of {count} questions of its own come to no end, or twice")
        return [*found.values()]

    def to_learn(self, conversations: Sequence[Conversation], *, given: bool) -> list[Text]:
        """Returns the texts to learn from.

        Args:
            conversations: Where they are from.
            given: With the answers they came with; else the target answers.
        """
        if given:
            return self._given(conversations)
        found: list[Text] = []
        repeating = 0
        for texts in self._asked(conversations, "answers to learn from", None):
            if varied(texts):
                found += texts
            else:
                repeating += 1
        what = "conversations say the same again and again, and are left out"
        self._note(repeating, f"of {len(conversations)} {what}")
        return found

    def to_measure(self, conversations: Sequence[Conversation]) -> list[Held]:
        """Returns what the target answers greedily; what asks nothing is measured on as it is."""
        asked = [one for one in conversations if one.asks]
        answered = dict(
            zip(
                [one.digest for one in asked],
                self._asked(asked, "answers to measure on", 0.0),
                strict=False,  # it may have been stopped
            )
        )
        several = len(self.layout.wordings) > 1
        found, short = [], 0
        for one in conversations:
            texts = answered.get(one.digest, [])
            if not one.asks:
                texts = self._cut(self.layout.given(one))
                short += not texts
            if texts:
                named = several and one.text is None
                category = self.layout.wording(one).name if named else one.category
                found.append(Held(one.source, one.id, category, tuple(texts)))
        self._note(short, self._too_little(conversations))
        return found

    def check(self, found: Sequence[object], what: str) -> None:
        """Checks that something is left, unless it was cut short.

        Raises:
            DriftError: If nothing is, with what was left out.
        """
        if not found and not self.stopped:
            raise DriftError(f"nothing is left to {what}: {'; '.join(self.notes)}")

    def _asked(
        self, conversations: Sequence[Conversation], what: str, temp: float | None
    ) -> list[list[Text]]:
        """Returns the answers to each, asking for those that are not in the file."""
        found: list[list[Text]] = []
        empty = 0
        for number, one in enumerate(conversations):
            key = one.digest if temp is None else f"{one.digest}-{temp:g}"
            texts = self.file.find(key)
            if texts is None:
                if self.stopped or self.stop():
                    self.stopped = True
                    break
                texts = self.answerer.answer(one, temp)
                self.file.add(key, texts)
            found.append(texts)
            empty += not texts
            self._tell(what, number + 1, len(conversations))
        self._note(
            empty,
            f"of {len(conversations)} conversations leave no room for an answer in "
            f"{self.answerer.asking.max_seq_length} tokens",
        )
        return found

    def _given(self, conversations: Sequence[Conversation]) -> list[Text]:
        found = [self._cut(self.layout.given(one)) for one in conversations]
        self._note(sum(not texts for texts in found), self._too_little(conversations))
        return [text for texts in found for text in texts]

    def _too_little(self, conversations: Sequence[Conversation]) -> str:
        most = self.answerer.asking.max_seq_length
        return (
            f"of {len(conversations)} conversations say too little for a draft within {most} tokens"
        )

    def _cut(self, texts: Sequence[Text]) -> list[Text]:
        cut = [text.cut(self.answerer.asking.max_seq_length) for text in texts]
        return [text for text in cut if text.is_drafted]

    def _tell(self, what: str, done: int, of: int) -> None:
        self.tell("answers", {"what": what, "done": done, "of": of})

    def _note(self, count: int, what: str) -> None:
        if count:
            self.notes.append(f"{count} {what}")
