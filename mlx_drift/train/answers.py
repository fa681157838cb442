"""What the target answers, itself: the text that a drafter has to predict.

Notable:
- Each answer has its own seed, so an answer is the same whichever others are asked for, and a run
  that was cut short goes on with the same text.
- They are decoded plainly, or through the head as it was before any training, with a fixed K.
- Where the assistant calls tools, what comes later answers the file's own calls: each turn is
  answered after what the file has before it, and none is carried on.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.sampling import Sampling
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Drafter
from mlx_drift.generate import stream_generate
from mlx_drift.train.conversations import Conversation
from mlx_drift.train.layout import Layout, Text, Texts
from mlx_drift.train.ranges import Range, check_numbers

LEAST_ROOM = 16
"""Tokens that an answer must have room for, or it is not asked for."""

RANGES = {
    "max_tokens": Range(2),
    "sampled": Range(0, 1),
    "temp": Range(0),
    "num_draft_tokens": Range(0, MAX_DRAFT_TOKENS),
    "max_seq_length": Range(8),
    "seed": Range(0),
}
"""Of the numbers of an `Asking`."""


@dataclass(frozen=True)
class Asking:
    """How the target answers.

    Attributes:
        max_tokens: Of an answer, at most.
        sampled: The share of conversations whose answers are drawn; the others are greedy.
        temp: At which temperature they are.
        num_draft_tokens: Drafts a round; 0 to decode plainly.
        max_seq_length: Tokens of a whole conversation, at most.
        seed: Of what is drawn.
    """

    max_tokens: int = 256
    sampled: float = 0.5
    temp: float = 0.7
    num_draft_tokens: int = 0
    max_seq_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        check_numbers(self, RANGES)
        Sampling(temp=self.temp)  # refuses what nothing can be drawn at

    def temperature(self, conversation: Conversation) -> float:
        """Returns a conversation's temperature: 0 for greedy answers."""
        drawn = draw(self.seed, conversation.digest, "sampled") % 10_000
        return self.temp if drawn < 10_000 * self.sampled else 0.0


class Answerer:
    """Lets a target answer conversations.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        tokenizer: Its tokenizer.
        layout: How conversations become tokens.
        asking: How it answers.
        drafter: What is drafted with, where anything is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        layout: Layout,
        asking: Asking,
        drafter: Drafter | None = None,
    ):
        self.model, self.tokenizer, self.layout, self.asking = model, tokenizer, layout, asking
        self.drafter = drafter if asking.num_draft_tokens else None

    def answer(self, conversation: Conversation, temp: float | None = None) -> list[Text]:
        """Answers all turns of a conversation.

        Args:
            conversation: The conversation; what its assistant said is not looked at, unless it
                calls tools.
            temp: The temperature; None for what the conversation drew.

        Returns:
            What was said, none of it beyond `max_seq_length`: nothing if there was no room.
        """
        temp = self.asking.temperature(conversation) if temp is None else temp
        texts = Texts()
        for number, prompt in enumerate(self._prompts(conversation)):
            room = min(self.asking.max_tokens, self.asking.max_seq_length - len(prompt.tokens))
            if room < min(LEAST_ROOM, self.asking.max_tokens):
                break
            seed = draw(self.asking.seed, conversation.digest, str(number))
            tokens, said = self._say(prompt.tokens, room, temp, seed)
            texts.add(prompt.tokens, tokens)
            prompt.said = said
        return texts.found

    def _prompts(self, conversation: Conversation) -> Iterator["Prompt"]:
        """Yields the prompt of each turn; what is said to it goes into the next."""
        messages = self.layout.messages(conversation)
        if conversation.calls_tools:
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    yield Prompt(self._encode(conversation, messages[:number]))
            return
        so_far: list[dict[str, Any]] = []
        for message in messages:
            if message["role"] == "assistant":
                continue
            so_far.append(message)
            if message["role"] == "user":
                prompt = Prompt(self._encode(conversation, so_far))
                yield prompt
                so_far.append({"role": "assistant", "content": prompt.said})

    def _encode(self, conversation: Conversation, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self.layout.encode(conversation, messages, to_answer=True)

    def _say(self, prompt: list[int], room: int, temp: float, seed: int) -> tuple[list[int], str]:
        """Returns the tokens of an answer, with what ended it, and its text."""
        drafting: dict[str, Any] = {}
        if self.drafter is not None:
            drafting = {
                "drafter": self.drafter,
                "num_draft_tokens": self.asking.num_draft_tokens,
            }
        tokens, text = [], ""
        for response in stream_generate(
            self.model, self.tokenizer, prompt, room, temp=temp, seed=seed, **drafting
        ):
            tokens.append(int(response.token))
            text += response.text
        return tokens, text


@dataclass
class Prompt:
    """The tokens of a prompt, and what was said to it."""

    tokens: list[int]
    said: str = ""


def draw(seed: int, *names: str) -> int:
    """Draws a number that depends on nothing but the seed and some names."""
    text = "/".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
