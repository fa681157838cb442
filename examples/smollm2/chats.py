"""Chats of which the target writes both sides: what the drafters learn from.

After the template's opening of a user's turn an instruction-tuned model writes a user's turn
(Magpie, arXiv 2406.08464), and then answers it. No foreign data is needed, and the answers are what
a drafter has to predict. Half of the answers are greedy, half drawn at temperature 0.7; the users'
turns at temperature 1 within a nucleus of 0.95.

Each chat is written as a line when it ends: ids, and which spans the assistant says. A run that was
stopped goes on where the file ends.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipe.target import Llama
from smollm2.decoder import Decoder, draw

SYSTEM_PROMPTS = [
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are a helpful assistant.",
    "You are a friendly tutor. Explain things step by step, in simple words.",
    "You are an experienced programmer. Answer with short, correct code and a brief explanation.",
    "You are a careful mathematician. Show your reasoning, then state the result.",
    "Answer briefly and to the point.",
    "You are a creative writer with a vivid style.",
    "You are a historian who likes to tell how things came about.",
    "You are an assistant for everyday questions: cooking, travel, health and home.",
    "You are an editor. Improve, shorten or rewrite texts as you are asked to.",
]
DEFAULT_SHARE = 0.4
"""Of chats with the first system prompt, the one that the model's template puts by default."""

TURNS = [1, 1, 1, 2, 2, 3, 4, 6]
END, FIRST_WORD = 2, 17  # <|im_end|>; the ids below are control tokens
MOST_ASKED, MOST_ANSWERED = 192, 400
LEAST_VARIED = 0.5
"""The least share of distinct 4-grams in an answer: what a small model repeats without end teaches
repeating alone."""

LOOKED_AT = 32
"""Every so many tokens an answer is looked at, whether it still says new things."""


@dataclass(eq=False)
class Chat:
    """One row's conversation."""

    ids: list[int]
    turns: int
    told: list[int]  # what comes next in any case
    is_answer: bool = False
    start: int = 0  # of the turn under way
    said: list[tuple[int, int]] = field(default_factory=list)
    heat: float = 1.0


def varied(answer: list[int]) -> bool:
    """Whether an answer goes on saying new things."""
    grams = list(zip(*(answer[i:] for i in range(4)), strict=False))
    return len({*grams}) >= LEAST_VARIED * len(grams)


class Writer:
    """Writes chats, a row each, until told to stop."""

    def __init__(
        self,
        target: Llama,
        tokenizer: Tokenizer,
        rows: int,
        context: int,
        seed: int,
        turns: Sequence[int] = TURNS,
    ):
        self.decoder, self.turns = Decoder(target, rows, context), turns
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

        def encoded(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        self.openings = [
            encoded(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n")
            for prompt in SYSTEM_PROMPTS
        ]
        self.to_answer = encoded("\n<|im_start|>assistant\n")
        self.to_ask = encoded("\n<|im_start|>user\n")
        self.fill = context > 2048  # long contexts: go on until the context is full
        self.chats = [self._open() for _ in range(rows)]

    def step(self) -> list[Chat]:
        """Adds a token to every chat; returns those that ended, if they are any good."""
        ids = torch.tensor([chat.told.pop(0) for chat in self.chats])
        for chat, token in zip(self.chats, ids.tolist(), strict=True):
            chat.ids.append(token)
        logits = self.decoder.step(ids)
        choosing = [row for row, chat in enumerate(self.chats) if not chat.told]
        ended = []
        for chat, token in zip(
            [self.chats[row] for row in choosing], self._choose(logits, choosing), strict=True
        ):
            chat.told.append(token)
            if self._goes_on(chat, token):
                continue
            if chat.said:
                ended.append(chat)
            row = self.chats.index(chat)
            for source, to in self.decoder.restart(row):
                self.chats[to], row = self.chats[source], source
            self.chats[row] = self._open()
        return ended

    def _choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        """Chooses a token for each of some rows."""
        chosen = logits[rows].argmax(-1)
        for heat, top_p in ((1.0, 0.95), (0.7, 1.0)):  # a user's turn, a sampled answer
            drawn = [i for i, row in enumerate(rows) if self.chats[row].heat == heat]
            if drawn:
                hot = logits[[rows[i] for i in drawn]] / heat
                chosen[drawn] = draw(hot, top_p, self.generator)
        return chosen.tolist()

    def _open(self) -> Chat:
        default = self.rng.random() < DEFAULT_SHARE
        opening = self.openings[0 if default else self.rng.randrange(1, len(self.openings))]
        turns = 10**6 if self.fill else self.rng.choice(self.turns)
        return Chat([], turns, list(opening), start=len(opening))

    def _goes_on(self, chat: Chat, token: int) -> bool:
        """Takes note of a chosen token; says whether the chat goes on with it."""
        length = len(chat.ids) + 1 - chat.start
        full = len(chat.ids) + len(self.to_answer) + 2 >= self.decoder.context
        if token != END:
            if chat.is_answer and (length >= MOST_ANSWERED or full):
                self._answered(chat, chat.ids[chat.start :])
                return False
            if chat.is_answer and length % LOOKED_AT == 0 and not varied(chat.ids[chat.start :]):
                return False  # it would say the same until it may say no more
            return not full and token >= FIRST_WORD and (chat.is_answer or length < MOST_ASKED)
        if chat.is_answer:
            if not self._answered(chat, [*chat.ids[chat.start :], token]):
                return False
            chat.turns -= 1
            if not chat.turns:
                chat.ids.append(token)
                return False
            chat.told += self.to_ask
        elif length < 3:  # nothing was asked
            return False
        else:
            chat.told += self.to_answer
        chat.is_answer = not chat.is_answer
        chat.start = len(chat.ids) + len(chat.told)
        chat.heat = self.rng.choice([0.0, 0.7]) if chat.is_answer else 1.0
        return not full

    def _answered(self, chat: Chat, answer: list[int]) -> bool:
        good = len(answer) > 1 and varied(answer)
        if good:
            chat.said.append((chat.start, chat.start + len(answer)))
        return good


def main() -> None:
    """Writes chats until enough is said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="of model.py: its torch folder")
    parser.add_argument("--out", type=Path, required=True, help="a file of one chat a line")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a chat at most")
    parser.add_argument(
        "--turns", type=int, nargs="+", default=TURNS, help="a chat has one of so many, by chance"
    )
    parser.add_argument("--tokens", type=float, default=2e6, help="answer tokens to write in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="where bfloat16 is slow")
    args = parser.parse_args()
    written = [json.loads(line) for line in args.out.open()] if args.out.exists() else []
    said = sum(stop - start for chat in written for start, stop in chat["said"])
    dtype = torch.float32 if args.float32 else torch.bfloat16
    target = Llama.load(args.target).to(dtype).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    seed = args.seed + 1_000_003 * len(written)
    writer = Writer(target, tokenizer, args.rows, args.context, seed, args.turns)
    start = told = time.monotonic()
    before, steps = said, 0
    with args.out.open("a") as file:
        while said < args.tokens:
            for chat in writer.step():
                said += sum(stop - start for start, stop in chat.said)
                file.write(json.dumps({"ids": chat.ids, "said": chat.said}) + "\n")
                file.flush()
            steps += 1
            if time.monotonic() - told > 30:
                told = time.monotonic()
                rate, step = (said - before) / (told - start), (told - start) / steps
                print(f"{said} answer tokens, {rate:.0f}/s, {step:.3f} s a step", file=sys.stderr)


if __name__ == "__main__":
    main()
