"""How the report writes figures, claims and tables."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import isnan

from attention_drift.claims import Claim
from attention_drift.findings import Compared
from mlx_drift.measure.bootstrap import Interval


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def bounded(found: Interval) -> str:
    """Writes a figure with its bounds."""
    if isnan(found.value):
        return "–"
    value, low, high = (f"{bound:.3g}" if bound < 1 else f"{bound:.2f}" for bound in found)
    return f"{value} ({low}–{high})"


def seen(found: Compared) -> str:
    """Writes a figure with its bounds and what each seed alone gives."""
    seeds = " ".join("–" if isnan(one) else f"{one:.2f}" for one in found.seeds)
    return f"{bounded(found.all)} <sub>{seeds}</sub>"


def judged(found: Compared) -> str:
    """Writes a ratio of arms, bold where it may be said to differ from 1."""
    return f"**{seen(found)}**" if found.direction else seen(found)


def times(name: str, found: Compared) -> str:
    """Writes a factor."""
    return f"{name} ×{found.all.value:.2f}"


def listed(names: Iterable[str]) -> str:
    """Writes a list."""
    return ", ".join(names) or "none"


def tallied(found: Iterable[Claim]) -> str:
    """Counts verdicts."""
    verdicts = Counter(one.verdict for one in found)
    return ", ".join(f"{count} × {verdict}" for verdict, count in verdicts.items())


def told(claim: Claim) -> tuple[str, str]:
    """What was found of a claim, and the verdict."""
    found, verdict = claim.found, f"**{claim.verdict}**"
    if claim.verdict == "not settled":
        needed = found.prompts_to_settle
        settles = f"{needed} prompts" if needed else "trainings disagree"
        verdict += f" (±{found.half_width:.2g}; {settles})"
    return seen(found), verdict


def beside(found: Iterable[Claim]) -> str:
    """Lays out claims beside what was found."""
    rows = [(one.says, one.figure, *told(one)) for one in found]
    return table(("claim", "figure here", "found", "verdict"), rows)
