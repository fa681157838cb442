"""Measures the embedded pair on held-out prompts, with the package itself.

Held-out loss of the target (a mean over the answers' tokens), and for each drafter what greedy
rounds accept; whole unseen symbols and unseen wordings of seen symbols are reported apart. This
is the command behind the table in the repository's README:

    python examples/train_demo_pair/evaluate.py [--fp32 pair/target-hf] [--json]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import track

from mlx_drift import Statistics, load, load_drafter, stream_generate
from mlx_drift.demo import DEMO, DRAFTERS, TARGET

HELD_OUT = Path(__file__).with_name("heldout.jsonl")
SPLITS = ("wording", "symbol")


def mean_loss(
    model: nn.Module, tokenizer: TokenizerWrapper, records: list[dict[str, Any]]
) -> float:
    """Mean cross-entropy in nats over the tokens of the answers, end token included."""
    total, count = 0.0, 0
    for record in records:
        prompt = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        answer = [*tokenizer.encode(record["answer"]), tokenizer.eos_token_id]
        logits = model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(answer))
        total, count = total + losses.sum().item(), count + len(answer)
    return total / count


def acceptance(model, tokenizer, drafter, records, k: int, max_tokens: int) -> Statistics:
    """Adds up the rounds of greedy answers."""
    total = Statistics()
    for record in track(records, f"K = {k}", console=Console(stderr=True), transient=True):
        prompt = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True)
        *_, last = stream_generate(
            model, tokenizer, prompt, max_tokens, drafter=drafter, num_draft_tokens=k
        )
        total.add(last.statistics)
    return total


def row_of(drafter: str, k: int, split: str, rounds: Statistics) -> dict[str, Any]:
    return {
        "drafter": drafter,
        "k": k,
        "split": split,
        "rounds": rounds.rounds,
        "acceptance_length": rounds.acceptance_length,
        "conditional_acceptance": rounds.conditional_acceptance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp32", help="the target before quantization, for its loss as well")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    of_split = {split: [r for r in records if r["split"] == split] for split in SPLITS}
    model, tokenizer = load(str(TARGET))
    report: dict[str, Any] = {"loss": {}, "acceptance": []}
    targets = {"quantized": (model, tokenizer)}
    if args.fp32:
        targets["fp32"] = load(args.fp32)
    for name, pair in targets.items():
        report["loss"][name] = {split: mean_loss(*pair, of_split[split]) for split in SPLITS}

    for name in DRAFTERS:
        drafter = load_drafter(str(DEMO / name), model)
        for k in (4, 8):
            both = Statistics()
            for split in SPLITS:
                rounds = acceptance(model, tokenizer, drafter, of_split[split], k, args.max_tokens)
                report["acceptance"].append(row_of(name, k, split, rounds))
                both.add(rounds)
            report["acceptance"].append(row_of(name, k, "both", both))
    print(json.dumps(report) if args.json else table(report))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| target | " + " | ".join(f"loss, {split}" for split in SPLITS) + " |",
        "|---|---|---|",
    ]
    for name, losses in report["loss"].items():
        lines.append(f"| {name} | " + " | ".join(f"{losses[s]:.3f}" for s in SPLITS) + " |")
    lines += [
        "",
        "| drafter | K | held out | acceptance_length | conditional acceptance |",
        "|---|---|---|---|---|",
    ]
    for row in report["acceptance"]:
        rates = " ".join(f"{rate:.2f}" for rate in row["conditional_acceptance"])
        lines.append(
            f"| `{row['drafter']}` | {row['k']} | {row['split']} "
            f"| {row['acceptance_length']:.2f} | {rates} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
