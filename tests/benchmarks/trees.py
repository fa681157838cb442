"""What trees of drafts give over chains, and how near `--tree auto` comes to the best of either.

The rounds of recorded answers are replayed (`mlx-drift bench --replay`), over tables of what rounds
may cost: no clock is in it. With `--counts` only tokens a round are told, at equal rows.

    python tests/benchmarks/trees.py ANSWERS.jsonl --record       # of held-out questions, first
    python tests/benchmarks/trees.py ANSWERS.jsonl --drafter eagle3 --counts
    python tests/benchmarks/trees.py ANSWERS.jsonl --drafter eagle3 --every 6
"""

import argparse
import json
from collections import defaultdict
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


def record(model, tokenizer, options) -> None:
    """Writes the target's greedy answers to questions, for `bench --replay`."""
    drafter = load_drafter(options.drafter, model)  # with which it answers sooner, and alike
    with options.answers.open("w") as file:
        for line in options.questions.read_text().splitlines()[:: options.every]:
            asked = json.loads(line)
            first = {"role": "user", "content": asked.get("turns", [""])[0]}
            messages = asked.get("messages", [first])
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            said = stream_generate(model, tokenizer, prompt, options.max_tokens, drafter=drafter)
            answer = {"role": "assistant", "content": "".join(r.text for r in said)}
            file.write(json.dumps({"messages": [*messages, answer]}) + "\n")


def tell_counts(model, drafter, recorded) -> None:
    """Prints a line for each number of rows."""
    chains = [rows - 1 for rows in ROWS]
    found = replay(model, drafter, recorded, costs_of(0, 0, 0), lengths=chains, trees=ROWS)
    rounds = {arm.name: arm.statistics.tokens_per_round for arm in found.arms}
    for arm in found.arms:
        if (ratio := found.over_chain(arm)) is not None:
            chain, tree = rounds[f"K={arm.tree - 1}"], rounds[arm.name]
            print(f"{arm.tree} rows: chain {chain:.2f}, tree {tree:.2f} tokens a round; ", end="")
            print(f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})")


def tell_auto(model, drafter, recorded) -> None:
    """Prints a line for each table of costs."""
    drafts = defaultdict(dict)  # they do not hang on what they cost
    for name, regime in REGIMES.items():
        found = replay(
            model,
            drafter,
            recorded,
            costs_of(*regime),
            lengths=[*CHAINS, "auto"],
            trees=[*ROWS, "auto"],
            drafts=drafts,
        )
        speed = {arm.name: arm.tokens_per_second for arm in found.arms}
        fixed = {name: one for name, one in speed.items() if not name.startswith("auto")}
        best = max(fixed, key=fixed.get)
        share = speed["auto, trees"] / fixed[best]
        chains = speed["auto, head alone"] / fixed[best]
        print(f"{name}: best {best} ({fixed[best]:.2f}); auto {share:.3f} of it, ", end="")
        print(f"{chains:.3f} without trees", flush=True)


def main() -> None:
    """Prints one or the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", default=str(TARGET), help="a folder; else the embedded pair's")
    parser.add_argument("--drafter", default="eagle3.1", help="a folder, or of the embedded pair")
    parser.add_argument("--every", type=int, default=1, help="of the answers or questions")
    parser.add_argument("--counts", action="store_true", help="tell tokens a round alone")
    parser.add_argument("--record", action="store_true", help="write ANSWERS.jsonl instead")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="messages or turns")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer, with --record")
    options = parser.parse_args()
    if (DEMO / options.drafter).is_dir():
        options.drafter = str(DEMO / options.drafter)
    model, tokenizer = mlx_lm.load(options.model)
    if options.record:
        record(model, tokenizer, options)
        return
    drafter = load_drafter(options.drafter, model)
    recorded = read_transcripts(options.answers, tokenizer, {})[:: options.every]
    print(f"{len(recorded)} answers of {sum(len(one.answer) for one in recorded)} tokens")
    (tell_counts if options.counts else tell_auto)(model, drafter, recorded)


if __name__ == "__main__":
    main()
