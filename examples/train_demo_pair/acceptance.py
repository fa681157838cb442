"""How many drafts a round the embedded pair's drafters get accepted on the held-out questions."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from recipe.acceptance import measure
from recipe.dflash import DFlash
from recipe.drafter import Eagle3
from recipe.features import read
from recipe.generate import generate
from recipe.loss import Drafter
from recipe.medusa import Medusa
from recipe.mtp import MTP
from recipe.rows import Row
from recipe.target import Llama
from train_demo_pair.data import read_jsonl
from train_demo_pair.tokenizer import EOT, PAD, generation_prompt, token_id

ANSWER_TOKENS = 128
NAMES = ("eagle3", "eagle3.1", "mtp", "dflash", "medusa")


def heldout_answers(
    target: Llama, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> dict[str, list[Row]]:
    """The target's greedy answers to the held-out questions, by split."""
    prompts = [generation_prompt(tokenizer, record["messages"]) for record in records]
    end, pad = token_id(tokenizer, EOT), token_id(tokenizer, PAD)
    answers = generate(target, prompts, [0.0] * len(prompts), ANSWER_TOKENS, end, pad)
    by_split: dict[str, list[Row]] = {}
    for record, (ids, said) in zip(records, answers, strict=True):
        rows = read(target, torch.tensor([ids]), torch.tensor([said]))
        by_split.setdefault(record["split"], []).extend(rows)
    return by_split


def load_drafter(folder: Path, target: Llama) -> Drafter:
    stored = json.loads((folder / "config.json").read_text())
    kind = stored.get("speculators_model_type") or stored.get("model_type")
    if kind == "dflash":
        return DFlash.load(folder, target)
    heads: dict[str, type[MTP | Medusa | Eagle3]] = {"mtp": MTP, "medusa": Medusa}
    return heads.get(kind, Eagle3).load(folder, target.config)


def most(drafter: Drafter) -> int:
    """How many drafts a round it makes at most."""
    if isinstance(drafter, DFlash):
        return drafter.block - 1
    return len(drafter.blocks) if isinstance(drafter, Medusa) else 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafters", type=Path, nargs="*", help="default: all of pair/")
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    target = Llama.load(args.target)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    by_split["all"] = [answer for answers in by_split.values() for answer in answers]
    for folder in args.drafters or [Path("pair") / name for name in NAMES]:
        drafter = load_drafter(folder, target)
        for steps in args.draft_tokens:
            for split, answers in by_split.items():
                measured = measure(drafter, target, answers, min(steps, most(drafter)))
                print(f"{folder.name}, K={steps}, {split}: {measured}", flush=True)


if __name__ == "__main__":
    main()
