"""Write the study's report: each claim of the paper's abstract beside what was found.

Reads the JSON files of `measure_all.py` and writes `REPORT.md` and its pictures. Every figure is
computed, and so is every word that judges one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from attention_drift import pictures
from attention_drift.arms import ARMS, DEPTH, DEPTH_ARMS, MTP_ARMS, OTHER_DEPTHS
from attention_drift.claims import (
    BOTH,
    PRE,
    growth,
)
from attention_drift.findings import (
    CLOSE,
    Study,
    compare,
    ratio,
)
from attention_drift.sections import (
    COMPARED,
    GROUPS,
    of_all,
    of_claims,
    of_contexts,
    of_depths,
    of_figure_7,
    of_group,
    of_interventions,
    of_real,
    of_steps,
    of_two_norms,
    of_wordings,
    spoken,
)
from attention_drift.settings import EMBEDDED, SMOLLM2
from attention_drift.tables import (
    listed,
    times,
)

DPI = 100


INTRODUCTION = """# Which norm does what: what was found

Written by `python report.py` from [`results`](results); [README.md](README.md) tells how the
drafters were trained and measured. The paper is *Attention Drift*, arXiv 2605.09992.

Figures are of all seeds together. In brackets: 95 % of what prompts drawn again give. Small: each
seed alone. A ratio is **bold**, and a claim judged, only where the interval and every seed alone
lie on the same side of 1; ratios within {close:.0%} of 1, interval and seeds, count as 1.

- *τ*: acceptance_length, accepted drafts a round, without the target's own token
- *conditional*: of drafts whose predecessors were accepted, the share that is accepted
- *forced*: the share of drafts that are right if each step is fed the target's text, as in training
- *own drafts*: the attention that a step has on what was drafted before it, a mean over heads"""


LIMITS = """## What this scale cannot tell

- The embedded target is tiny and knows a part of Python's documentation by heart; its drafters saw
  {tokens:,} tokens each. That an effect is missing here does not say that it is at another size.
- Seeds vary a drafter's first weights and the order of its rows. There is one text.
- Trainings of each of the two arms of {real}: {trainings}, of {real_tokens:.2f} million answer
  tokens, at one depth.
- Intervals are of prompts. How much another training would differ is only seen in the small
  figures; nothing is said that one of them contradicts.
- Other wordings make the target say other things, and without a chat template the embedded one says
  next to nothing: the paper's strongest perturbation is tried on {real} alone.
- Contexts are at most {times:.0f} times the rows of training.
- The paper's figures are known from transcriptions, and how it counts (the target's own token,
  heads, what is recent) is partly not known."""


def in_short(study: Study) -> str:
    """What each switch does, in words that the figures choose."""
    pre = study.arm(PRE, DEPTH)
    arms = {f"`{name}`": study.arm(name, DEPTH) for name in ARMS}
    grown = {name: compare(growth, arm) for name, arm in arms.items()}
    lines = [
        f"The recycled state keeps its size to {CLOSE:.0%} with "
        f"{listed(name for name, found in grown.items() if found.is_one)}. Its growth otherwise: "
        f"{listed(times(name, found) for name, found in grown.items() if not found.is_one)}."
    ]
    for what, figure in COMPARED.items():
        if figure is growth:
            continue
        others = {name: arm for name, arm in arms.items() if arm is not arms[f"`{PRE}`"]}
        found = {name: compare(ratio(figure), arm, pre) for name, arm in others.items()}
        more, less, open_ = (
            listed(times(name, one) for name, one in found.items() if one.direction == side)
            for side in (1, -1, 0)
        )
        lines.append(f"*{what}*, in parts of `{PRE}`: more with {more}; less with {less}; not ")
        lines[-1] += f"settled for {open_}."
    return "## In short\n\n" + "\n".join(f"- {line}" for line in lines)


def draw(study: Study, names: Sequence[str], wordings: Sequence[str], folder: Path) -> None:
    """Draws all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = [study.arm(name, DEPTH) for name in names]
    depths = sorted({DEPTH, *OTHER_DEPTHS})
    by_depth = {name: [study.arm(name, depth) for depth in depths] for name in DEPTH_ARMS}
    drawn = {
        "growth": pictures.growth(arms),
        "attention": pictures.attention(arms),
        "acceptance": pictures.acceptance(arms),
        "depth": pictures.depth(by_depth),
        "wordings": pictures.wordings(arms, wordings),
        "contexts": pictures.contexts([study.arm(name, DEPTH) for name in DEPTH_ARMS]),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)


def write(results: Path, folder: Path) -> Path:
    """Writes the report and its pictures into a folder; returns its file."""
    study = Study(results, EMBEDDED)
    real = Study(results / SMOLLM2.results.name, SMOLLM2)
    names = tuple(ARMS)
    measured = {one["arm"] for one in study.drafters}
    draw(study, names, spoken(study), folder / "figures")
    parts = [
        INTRODUCTION.format(close=CLOSE),
        in_short(study),
        of_claims(study, real),
        of_real(real),
        *(of_group(study, title) for title, (base, _) in GROUPS.items() if base in measured),
        *([of_figure_7(study)] if measured & MTP_ARMS.keys() else []),
        "![acceptance](figures/acceptance.png)",
        of_two_norms(study),
        of_steps(study, names),
        of_depths(study),
        of_wordings(study, names),
        of_contexts(study, DEPTH_ARMS),
        of_interventions(study, names),
        LIMITS.format(
            tokens=study.drafters[0]["tokens"],
            times=max(EMBEDDED.lengths) / EMBEDDED.row,
            real=SMOLLM2.name,
            trainings=len(real.arm(BOTH, DEPTH).drafters),
            real_tokens=real.drafters[0]["tokens"] / 1e6,
        ),
        of_all(study),
    ]
    path = folder / "REPORT.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=EMBEDDED.results, help="where the figures are"
    )
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where it goes")
    args = parser.parse_args()
    print(write(args.results, args.to))


if __name__ == "__main__":
    main()
