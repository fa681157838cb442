"""Conversations as tokens, and which of them the assistant says: in every turn, not only the last.

What a drafter is trained on should be what it meets: the prompt of a turn, as the chat template
lays it out, and the answer after it. A later turn goes on in the same text where its prompt begins
with what is there already; where a template rewrites what was said (Qwen3 drops earlier thinking),
it begins a text of its own.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.files.text import check_text
from mlx_drift.measure.acceptance.wording import Wording
from mlx_drift.train.conversations import Conversation

Span = tuple[int, int]


@dataclass
class Text:
    """Tokens, and the spans of them that the assistant says, each with what ends it."""

    tokens: list[int]
    said: list[Span] = field(default_factory=list)

    def cut(self, length: int) -> "Text":
        """Returns its first tokens."""
        said = [(start, min(stop, length)) for start, stop in self.said if start < length]
        return Text(self.tokens[:length], said)

    @property
    def is_drafted(self) -> bool:
        """Whether a head drafts any of what is said: its first row needs two tokens before it."""
        return any(max(start, 2) < stop for start, stop in self.said)

    @property
    def learned(self) -> list[bool]:
        """Of each token, whether the assistant says it."""
        marks = [False] * len(self.tokens)
        for start, stop in self.said:
            marks[start:stop] = [True] * (stop - start)
        return marks


class Texts:
    """Texts that grow turn by turn."""

    def __init__(self) -> None:
        self.found: list[Text] = []

    def add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Adds a turn: the tokens of its whole prompt, and those of its answer."""
        tokens = [*prompt, *answer]
        span = len(prompt), len(tokens)
        last = self.found[-1] if self.found else None
        if last is not None and tokens[: len(last.tokens)] == last.tokens:
            last.tokens = tokens
            last.said.append(span)
        else:
            self.found.append(Text(tokens, [span]))


class Layout:
    """How conversations become tokens, each by one of some wordings.

    Args:
        tokenizer: The target's.
        wordings: The wordings; every conversation draws one.
        seed: Says which.

    Raises:
        DriftError: If there is no chat template.
    """

    def __init__(self, tokenizer: TokenizerWrapper, wordings: Sequence[Wording], seed: int = 0):
        self.tokenizer, self.wordings, self.seed = tokenizer, list(wordings), seed
        self.stops = frozenset(tokenizer.eos_token_ids)

    def wording(self, conversation: Conversation) -> Wording:
        """Returns the wording that a conversation drew.

        Raises:
            DriftError: If it has no template to lay around it.
        """
        digest = int(conversation.digest, 16)
        drawn = np.random.default_rng([self.seed, 2, digest]).integers(len(self.wordings))
        wording = self.wordings[int(drawn)]
        if not (wording.chat_template or self.tokenizer.has_chat_template):
            raise DriftError(
                "the target's tokenizer has no chat template to lay around conversations; give "
                'one with --chat-template, or texts as they are ({"text": "…"} a line)'
            )
        return wording

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Returns the messages, with the wording's system prompt if it has one."""
        system = self.wording(conversation).system_prompt
        if system is None:
            return list(conversation.messages)
        rest = [m for m in conversation.messages if m["role"] != "system"]
        return [{"role": "system", "content": system}, *rest]

    def encode(
        self, conversation: Conversation, messages: Sequence[dict[str, Any]], *, to_answer: bool
    ) -> list[int]:
        """Lays out messages: as the prompt of an answer, or as they are."""
        wording = self.wording(conversation)
        more: dict[str, Any] = {"add_generation_prompt": to_answer}
        if conversation.tools:
            more["tools"] = list(conversation.tools)
        text = wording.lay_out(self.tokenizer, messages, **more)
        check_text(text, f"{conversation.place}: as it is laid out, it")
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise DriftError(
                f"{wording.name}: the chat template lays out nothing of a conversation"
            )
        return tokens

    def given(self, conversation: Conversation) -> list[Text]:
        """Returns a conversation with the answers that it came with."""
        if conversation.text is not None:
            tokens = self.tokenizer.encode(conversation.text)
            if tokens[-1:] != [self.tokenizer.eos_token_id]:  # as mlx-lm does
                tokens = [*tokens, self.tokenizer.eos_token_id]
            return [Text(tokens, [(1, len(tokens))])]
        texts, messages = Texts(), self.messages(conversation)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.encode(conversation, messages[:number], to_answer=True)
            whole = self.encode(conversation, messages[: number + 1], to_answer=False)
            same = itertools.takewhile(
                lambda both: both[0] == both[1], zip(prompt, whole, strict=False)
            )
            start = sum(1 for _ in same)
            texts.add(whole[:start], self._until_stop(whole[start:]))
        return texts.found

    def _until_stop(self, answer: list[int]) -> list[int]:
        """Leaves out what a template puts after the end of an answer."""
        stop = next((i for i, token in enumerate(answer) if token in self.stops), len(answer) - 1)
        return answer[: stop + 1]
