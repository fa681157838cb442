"""Trains a draft model of two layers for the target: what mlx-lm's own speculative loop needs.

    python -m smollm2.draft_model --target work/torch --features work/features --out work/draft
    mlx-drift bench --model work/torch --drafter work/run/eagle3.1 --baseline-draft-model work/draft

It has the target's embedding and, to start with, its first layers, and learns what the heads
learn from: the same rows, the target's own words, compared with the target's whole distribution.
It reads tokens alone, so one pass over a row teaches every step of a chain at once.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.average import Average
from recipe.features import Features, endless
from recipe.learner import save_whole
from recipe.muon import Muon
from recipe.precision import products
from recipe.rows import Row
from recipe.target import Llama, LlamaConfig
from smollm2.chats import END
from smollm2.train import CHECKPOINT_EVERY, WARMUP, window

LAYERS = 2

SCALE = 0.3
"""Of the final norm at the start: two layers' states say less than thirty's, and should be less
sure. The loss starts at 7.6 so, at 16.7 without."""

TOKENIZER = "tokenizer.json", "tokenizer_config.json"


def first_layers(target: Llama) -> Llama:
    """A model of the target's first layers, whose embedding stays as it is."""
    small = Llama(LlamaConfig(**vars(target.config) | {"num_hidden_layers": LAYERS}))
    small.load_state_dict(target.state_dict(), strict=False)
    small.model.norm.weight.data *= SCALE
    small.model.embed_tokens.requires_grad_(False)
    return small


def loss_of(small: Llama, target: Llama, row: Row) -> tuple[Tensor, int]:
    """The sum of cross-entropies where the target's own word follows, and of how many."""
    follows = row.said.roll(-1)
    follows[-1] = False
    with torch.no_grad():
        wanted = target.head(row.final[follows]).float().softmax(-1)
    predicted = small.logits(small.hidden_states(row.ids[None])[-1][0, follows]).float()
    return F.cross_entropy(predicted, wanted, reduction="sum"), int(follows.sum())


class Training:
    """The draft model, its optimizers, and where it stands."""

    def __init__(self, target: Llama, lr: float) -> None:
        self.target, self.lr = target, lr
        self.small = first_layers(target)
        self.average = Average(self.small)
        learned = [p for p in self.small.parameters() if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([p for p in learned if p.dim() == 2], lr=lr, momentum=0.95),
            torch.optim.AdamW([p for p in learned if p.dim() == 1], lr=lr, weight_decay=0.0),
        ]
        self.step = self.rows = self.said = 0

    def learn(self, rows: Iterator[Row], batch: int) -> float:
        """Takes one step, over rows of so many answer tokens; returns the mean loss of one."""
        said, total = 0, 0.0
        while said < batch:
            with products(self.small):
                loss, count = loss_of(self.small, self.target, next(rows))
            loss.backward()
            total, said, self.rows = total + loss.item(), said + count, self.rows + 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / WARMUP)
                for parameter in group["params"]:
                    parameter.grad /= said
            with products(self.small):
                optimizer.step()
            optimizer.zero_grad()
        self.average.follow(self.small, self.step)
        self.step, self.said = self.step + 1, self.said + said
        return total / said

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "at": (self.step, self.rows, self.said),
            "small": self.small.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.step, self.rows, self.said = state["at"]
        self.small.load_state_dict(state["small"])
        self.average.model.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def windows(features: Features, most: int | None, seed: int, start: int) -> Iterator[Row]:
    """Rows without end from number `start` on, each cut to some of its answer tokens."""
    count = min(len(features), most or len(features))
    for number, index in enumerate(endless(range(count), seed, start), start):
        yield window(features[index], torch.Generator().manual_seed(hash((seed, number)) % 2**63))


def main() -> None:
    """Trains until enough is learned; goes on where it was when it is started again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="the float32 folder")
    parser.add_argument("--features", type=Path, required=True, help="those of train.py")
    parser.add_argument("--out", type=Path, required=True, help="a folder that mlx-lm loads")
    parser.add_argument("--rows", type=int, help="learn from so many chats, the first, and no more")
    parser.add_argument("--tokens", type=float, default=2e6, help="answer tokens to learn in all")
    parser.add_argument("--batch", type=int, default=1024, help="answer tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    training = Training(Llama.load(args.target).requires_grad_(False), args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint))
    features = Features(sorted(args.features.glob("*.safetensors")))
    rows = windows(features, args.rows, args.seed, training.rows)
    saved, losses = time.monotonic(), []
    while training.said < args.tokens:
        losses.append(training.learn(rows, args.batch))
        if time.monotonic() - saved > CHECKPOINT_EVERY or training.said >= args.tokens:
            save_whole(training.state_dict(), checkpoint)
            mean = sum(losses) / len(losses)
            print(
                f"step {training.step}, {training.said} answer tokens, loss {mean:.3f}", flush=True
            )
            saved, losses = time.monotonic(), []
    training.average.model.save(args.out, bos_token_id=1, eos_token_id=END)
    for name in TOKENIZER:
        shutil.copyfile(args.target / name, args.out / name)


if __name__ == "__main__":
    main()
