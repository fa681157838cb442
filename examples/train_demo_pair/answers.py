"""Let the target answer the training questions: what the drafters learn from.

A drafter has to predict what the target says, right or wrong, so its data is the target's own
output, obtained in two ways:

* decoded, half greedily and half by sampling. Prompts are batched by the length of the reference
  answer, which is a good guess of when the target will stop;
* recited: one forward pass over a training chat shows how far the reference answer is what greedy
  decoding would have said. A target that knows its corpus by heart gets most of it right, and a
  forward pass costs a small part of decoding.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from recipe.generate import generate
from recipe.precision import products
from recipe.rows import Text
from recipe.target import Llama
from train_demo_pair.data import Chat, load_facts, training_chats
from train_demo_pair.tokenizer import EOT, PAD, encode_chat, generation_prompt, token_id

MAX_PROMPT = 256  # with MAX_ANSWER: a sequence fits in a row of 512
MAX_ANSWER = 256
BATCH = 64
WINDOW = 8  # batches that are sorted by length together


def prompt_batches(tokenizer: Tokenizer, seed: int) -> Iterator[list[list[int]]]:
    """Training prompts without end, in batches whose reference answers are of similar length."""
    rng, facts = random.Random(seed), load_facts()
    while True:
        pairs = []
        for chat in training_chats(facts, rng):
            prompt = generation_prompt(tokenizer, chat[:-1])
            if len(prompt) <= MAX_PROMPT:
                pairs.append((len(chat[-1]["content"]), prompt))
        batches = []
        for start in range(0, len(pairs), WINDOW * BATCH):
            window = sorted(pairs[start : start + WINDOW * BATCH])
            batches += [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
        rng.shuffle(batches)
        for batch in batches:
            yield [prompt for _, prompt in batch]


@torch.no_grad()
def recited(target: Llama, tokenizer: Tokenizer, chats: list[Chat]) -> list[Text]:
    """The chats, with each answer's mask cut where greedy decoding would first deviate."""
    pad = token_id(tokenizer, PAD)
    encoded = sorted((encode_chat(tokenizer, chat) for chat in chats), key=lambda s: len(s[0]))
    sequences = []
    for start in range(0, len(encoded), BATCH):
        batch = encoded[start : start + BATCH]
        longest = len(batch[-1][0])
        padded = [ids + [pad] * (longest - len(ids)) for ids, _ in batch]
        with products(target):
            choices = target(torch.tensor(padded)).argmax(-1).tolist()
        for (ids, mask), chosen in zip(batch, choices, strict=True):
            said = [False]
            for position in range(1, len(ids)):
                on_track = said[-1] or not mask[position - 1]  # or the answer starts here
                agrees = chosen[position - 1] == ids[position]
                said.append(mask[position] and on_track and agrees)
            sequences.append((ids, said))
    return sequences


def save_sequences(sequences: list[Text], path: Path) -> None:
    tensors = {
        "ids": torch.tensor([i for ids, _ in sequences for i in ids], dtype=torch.int16),
        "mask": torch.tensor([m for _, mask in sequences for m in mask]),
        "lengths": torch.tensor([len(ids) for ids, _ in sequences]),
    }
    save_file(tensors, path)


def load_sequences(path: Path) -> list[Text]:
    stored = load_file(path)
    lengths = stored["lengths"].tolist()
    ids, masks = stored["ids"].split(lengths), stored["mask"].split(lengths)
    return [(i.tolist(), m.tolist()) for i, m in zip(ids, masks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--out", type=Path, default=Path("pair/answers.safetensors"))
    parser.add_argument("--minutes", type=float, default=8, help="of decoding")
    parser.add_argument("--recited-epochs", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    target = Llama.load(args.target)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))

    end, pad = token_id(tokenizer, EOT), token_id(tokenizer, PAD)
    sequences: list[Text] = []
    start = time.monotonic()
    for prompts in prompt_batches(tokenizer, args.seed):
        if time.monotonic() - start > 60 * args.minutes:
            break
        temperatures = [args.temperature * (row % 2) for row in range(len(prompts))]
        sequences += generate(target, prompts, temperatures, MAX_ANSWER, end, pad)
    rng = random.Random(args.seed)
    for _ in range(args.recited_epochs):
        sequences += recited(target, tokenizer, training_chats(load_facts(), rng))
    save_sequences(sequences, args.out)
    tokens = sum(len(ids) for ids, _ in sequences)
    answered = sum(sum(mask) for _, mask in sequences)
    print(f"{len(sequences)} answers, {tokens} tokens, {answered} of them the target's")


if __name__ == "__main__":
    main()
