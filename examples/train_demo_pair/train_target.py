"""Train the tokenizer, then the target, on standard-library chats within a wall-clock budget.

Loss on every token but padding; the held-out losses that are logged count assistant tokens only.
A tenth of the modules of each epoch is told as long dialogues in rows of 2048 tokens.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from recipe.muon import Muon
from recipe.rows import pack
from recipe.schedule import paced
from recipe.target import Llama, LlamaConfig
from train_demo_pair.data import Fact, load_facts, read_jsonl, training_chats
from train_demo_pair.tokenizer import (
    BOS,
    EOT,
    PAD,
    encode_chat,
    save_tokenizer,
    token_id,
    train_tokenizer,
)

SHORT_ROW, LONG_ROW = 512, 2048
LONG_DIALOGUE_TURNS = 32  # about 2048 tokens
LONG_SHARE = 0.1


def rows_of_epoch(
    facts: list[Fact], tokenizer: Tokenizer, rng: random.Random, batch_tokens: int
) -> list[Tensor]:
    """The epoch's batches, shuffled, each [rows, length] with rows * length = `batch_tokens`."""
    modules = sorted({fact.module for fact in facts})
    long = set(rng.sample(modules, round(LONG_SHARE * len(modules))))
    short_chats = training_chats([f for f in facts if f.module not in long], rng)
    long_chats = training_chats([f for f in facts if f.module in long], rng, LONG_DIALOGUE_TURNS)
    batches = []
    for chats, length in ((short_chats, SHORT_ROW), (long_chats, LONG_ROW)):
        sequences = [encode_chat(tokenizer, chat) for chat in chats]
        rows = [ids for ids, _ in pack(sequences, length, token_id(tokenizer, PAD))]
        count = max(1, batch_tokens // length)
        batches += [torch.stack(rows[i : i + count]) for i in range(0, len(rows), count)]
    rng.shuffle(batches)
    return batches


def endless_batches(
    facts: list[Fact], tokenizer: Tokenizer, seed: int, batch_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    rng, epoch = random.Random(seed), 0
    while True:
        for batch in rows_of_epoch(facts, tokenizer, rng, batch_tokens):
            yield epoch, batch
        epoch += 1


@torch.no_grad()
def heldout_losses(
    model: Llama, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> dict[str, float]:
    """Mean loss per assistant token, for each split."""
    sums: dict[str, list[float]] = {}
    for record in records:
        chat = [*record["messages"], {"role": "assistant", "content": record["answer"]}]
        ids, mask = encode_chat(tokenizer, chat)
        losses = F.cross_entropy(
            model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none"
        )
        sums.setdefault(record["split"], []).extend(losses[torch.tensor(mask[1:])].tolist())
    return {split: sum(losses) / len(losses) for split, losses in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pair/target-hf"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=float, default=180, help="seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    config, facts = LlamaConfig(), load_facts()
    questions = training_chats(facts, random.Random(args.seed))
    tokenizer = train_tokenizer(
        (message["content"] for chat in questions for message in chat), config.vocab_size
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out, config.max_position_embeddings)
    bos, eot, pad = (token_id(tokenizer, token) for token in (BOS, EOT, PAD))

    model = Llama(config)
    model.init_weights()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() == 1 or "embed" in name]
    muon = Muon(matrices, lr=args.lr, momentum=0.95)
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    records = read_jsonl(args.heldout)
    batches = endless_batches(facts, tokenizer, args.seed, args.batch_tokens)
    tokens, reported, recent = 0, time.monotonic(), []
    for step, elapsed in paced(args.minutes, [muon, adamw]):
        epoch, ids = next(batches)
        logits = model(ids[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=pad)
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        recent.append(loss.item())
        if time.monotonic() - reported > args.report_every:
            held_out = heldout_losses(model, tokenizer, records)
            print(
                f"{elapsed / 60:5.1f} min  step {step}  epoch {epoch}  tokens {tokens}"
                f"  {tokens / elapsed:.0f} tok/s  loss {sum(recent) / len(recent):.3f}"
                + "".join(f"  {split} {value:.3f}" for split, value in held_out.items()),
                flush=True,
            )
            model.save(args.out, bos, eot)
            reported, recent = time.monotonic(), []
    model.save(args.out, bos, eot)
    print(f"{tokens} tokens", heldout_losses(model, tokenizer, records), flush=True)


if __name__ == "__main__":
    main()
