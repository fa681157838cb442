"""How near `--tree auto` comes to the best fixed chain or tree, on recorded answers.

The rounds are replayed (`mlx-drift bench --replay`), over what rounds may cost: tables, so that no
clock is in it. Acceptance is that of the drafter on the answers.

    python tests/benchmarks/trees.py ANSWERS.jsonl --drafter eagle3
"""

import argparse
from pathlib import Path

import mlx_lm

from mlx_drift import load_drafter
from mlx_drift.cli.transcripts import read_transcripts
from mlx_drift.decode.draft_length import COPIED, TREES
from mlx_drift.demo import DEMO, TARGET
from mlx_drift.measure.speed.replay import ReplayCosts, replay

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


def main() -> None:
    """Prints a line a regime."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("--drafter", default="eagle3.1", help="of the embedded pair")
    options = parser.parse_args()
    model, tokenizer = mlx_lm.load(str(TARGET))
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
