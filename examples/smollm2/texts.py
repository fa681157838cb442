"""Chats as texts to train on, and questions with the target's greedy answers to measure on."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from recipe.features import read, store
from recipe.generate import generate
from recipe.rows import Text
from recipe.target import Llama
from smollm2.chats import END, SYSTEM_PROMPTS

HELD_OUT = 32
"""So many chats, the first of the first file, are measured on and never trained on."""

ANSWERED = 96
"""Tokens of an answer that is measured on, at most."""

SHARD = 32_768
"""Tokens of a file of features, about 150 MB; the last chats wait until there are so many."""


def chats(path: Path, start: int = 0) -> Iterator[Text]:
    """The chats of a file from line `start` on; a line that is being written is left out."""
    with path.open() as lines:
        for number, line in enumerate(lines):
            if number < start or not line.endswith("\n"):
                continue
            chat = json.loads(line)
            said = [False] * len(chat["ids"])
            for first, stop in chat["said"]:
                said[first:stop] = [True] * (stop - first)
            yield chat["ids"], said


def extend(target: Llama, files: list[Path], folder: Path, at_most: int) -> list[Path]:
    """Lets the target read chats that it has not read yet.

    Args:
        target: The target.
        files: Of chats, growing.
        folder: Of features: `<number>_<file>_<first line>_<line after>.safetensors`.
        at_most: Files of features to add; each is a minute's work of one core.

    Returns:
        All files of features, in the order in which they were made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = sorted(folder.glob("*.safetensors"))
    enough = len(stored) + at_most
    for file in files:
        done = HELD_OUT if file == files[0] else 0
        for path in stored:
            _, stem, _, stop = path.stem.split("_")
            done = max(done, int(stop)) if stem == file.stem else done
        waiting: list[Text] = []
        for number, text in enumerate(chats(file, done), done + 1):
            if len(stored) == enough:
                return stored
            waiting.append(text)
            if sum(len(ids) for ids, _ in waiting) >= SHARD:
                name = f"{len(stored):05}_{file.stem}_{done:06}_{number:06}.safetensors"
                store_texts(target, waiting, folder / name)
                stored.append(folder / name)
                done, waiting = number, []
    return stored


def store_texts(target: Llama, texts: list[Text], path: Path) -> None:
    """Stores what the target makes of texts of any lengths."""
    store(
        (
            row
            for ids, said in texts
            for row in read(target, torch.tensor([ids]), torch.tensor([said]))
        ),
        path,
    )


def held_out(file: Path) -> list[list[int]]:
    """The prompts of the chats that are never trained on: what comes before the first answer."""
    found = []
    for (ids, said), _ in zip(chats(file), range(HELD_OUT), strict=False):
        found.append(ids[: said.index(True)])
    return found


def asked(tokenizer: Tokenizer, file: Path, limit: int | None) -> list[list[int]]:
    """The first turns of a file of questions, `{"turns": [...]}` a line, as prompts."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    step = max(1, len(records) // limit) if limit else 1  # spread over the categories
    return [
        tokenizer.encode(
            f"<|im_start|>system\n{SYSTEM_PROMPTS[0]}<|im_end|>\n"
            f"<|im_start|>user\n{record['turns'][0]}<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        ).ids
        for record in records[::step][:limit]
    ]


def store_answers(target: Llama, prompts: list[list[int]], path: Path, batch: int = 48) -> None:
    """Lets the target answer prompts greedily, in float32, and stores what it makes of that."""
    texts: list[Text] = []
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        texts += generate(target, some, [0.0] * len(some), ANSWERED, END, END)
    store_texts(target, texts, path)
