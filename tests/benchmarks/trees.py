"""How near `--tree auto` comes to the best fixed chain or tree, on recorded answers.

The rounds are replayed (`mlx-drift bench --replay`), over what rounds may cost: tables, so that no
clock is in it. Acceptance is that of the drafter on the answers.

    python tests/benchmarks/trees.py ANSWERS.jsonl --record       # of held-out questions, first
    python tests/benchmarks/trees.py ANSWERS.jsonl --drafter eagle3
"""

import argparse
import json
from pathlib import Path

import mlx_lm

from mlx_drift import load_drafter, stream_generate
from mlx_drift.cli.transcripts import read_transcripts
from mlx_drift.decode.draft_length import COPIED, TREES
from mlx_drift.demo import DEMO, TARGET
from mlx_drift.measure.speed.replay import ReplayCosts, replay

QUESTIONS = Path(__file__).parents[2] / "examples/train_demo_pair/heldout.jsonl"
CHAINS, ROWS = (1, 2, 3, 4, 6), (3, 5, 8)

REGIMES = {  # seconds a row and a draft, in plain steps; and what a tree's level takes more
    "rows nearly free, as on a large GPU": (0.01, 0.05, 0.02),
    "rows free up to eight, trees' masks dear": (0.01, 0.08, 0.10),
    "rows at a tenth, as with OpenBLAS": (0.10, 0.08, 0.03),
    "rows at a half": (0.50, 0.08, 0.03),
}


def costs_of(row: float, draft: float, level: float) -> ReplayCosts:
    """What rounds cost; a tree of k drafts has about 2 + k / 4 levels."""
    chains = {k: 1 + row * k + draft * k for k in range(9)}
    trees = {k: 1.05 + row * k + (draft + level) * min(k, 2 + k // 4) for k in TREES}
    return ReplayCosts(chains, {k: 1 + row * k for k in COPIED}, draft / 2, trees)


def record(model, tokenizer, answers: Path, every: int) -> None:
    """Writes the target's greedy answers to the held-out questions, for `bench --replay`."""
    drafter = load_drafter(DEMO / "mtp", model)  # which answers sooner, and alike
    with answers.open("w") as file:
        for line in QUESTIONS.read_text().splitlines()[::every]:
            messages = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            said = stream_generate(model, tokenizer, prompt, 128, drafter=drafter)
            answer = {"role": "assistant", "content": "".join(r.text for r in said)}
            file.write(json.dumps({"messages": [*messages, answer]}) + "\n")


def main() -> None:
    """Prints a line a regime."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--drafter", default="eagle3.1", help="of the embedded pair")
    parser.add_argument("--record", action="store_true", help="write ANSWERS.jsonl instead")
    parser.add_argument("--every", type=int, default=2, help="of the questions, with --record")
    options = parser.parse_args()
    model, tokenizer = mlx_lm.load(str(TARGET))
    if options.record:
        record(model, tokenizer, options.answers, options.every)
        return
    drafter = load_drafter(DEMO / options.drafter, model)
    recorded = read_transcripts(options.answers, tokenizer, {})
    for name, regime in REGIMES.items():
        found = replay(
            model,
            drafter,
            recorded,
            costs_of(*regime),
            lengths=[*CHAINS, "auto"],
            trees=[*ROWS, "auto"],
        )
        speed = {arm.name: arm.tokens_per_second for arm in found.arms}
        fixed = {name: one for name, one in speed.items() if not name.startswith("auto")}
        best = max(fixed, key=fixed.get)
        share = speed["auto, trees"] / fixed[best]
        chains = speed["auto, head alone"] / fixed[best]
        print(f"{name}: best {best} ({fixed[best]:.2f}); auto {share:.3f} of it, ", end="")
        print(f"{chains:.3f} without trees", flush=True)


if __name__ == "__main__":
    main()
