"""The model card of an adapted head: what it was, what it learned from, what that changed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from mlx_drift.convert.card import kind_of, repository_of
from mlx_drift.drafters.config import read_config
from mlx_drift.measure.acceptance.count import ALL, Condition
from mlx_drift.measure.bootstrap import Interval

if TYPE_CHECKING:
    from mlx_drift.train.adapt import Adapted

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")

BODY = """
# {name}

{what}, {origin} {target} with `mlx-drift adapt`: {best} steps of {batch} texts, of {texts} in all,
whose answers {whose}.

```bash
mlx-drift generate --model {model} --drafter {name} -p "…"
```

Accepted drafts a round (of {k}), greedily, over the target's own answers (so many questions), with
95 % bootstrap intervals:

| | before | after | after ÷ before | prompt lookup |
|---|---|---|---|---|
{rows}

Of the 4-grams in what was held out so many are distinct: {distinct}. Where few are, or prompt
lookup accepts much, the target repeats itself. `adapted.json` has all settings and
figures.{licence}
"""


def adapted_card(
    name: str,
    original: Path,
    called: str | None,
    target: str | None,
    done: "Adapted",
    settings: dict[str, Any],
) -> str:
    """Writes the `README.md` of an adapted head.

    Args:
        name: Its repository, or else its folder's name.
        original: The folder of the head as it was.
        called: What the user called that; None if it was trained from nothing.
        target: What the user called the target, if anything.
        done: What came of it.
        settings: Those of the run.
    """
    config = read_config(original)
    kind, tag = kind_of(config)
    source, origin = None, "trained from nothing for"
    if called is not None:
        is_repository = bool(_REPOSITORY.fullmatch(called)) and not Path(called).exists()
        source = repository_of(config) or (called if is_repository else None)
        origin = f"adapted from `{source or Path(called).name}` to"
    data = ModelCardData(
        library_name="mlx",
        base_model=source,
        base_model_relation="finetune" if source else None,
        tags=["mlx", "mlx-drift", "speculative-decoding", tag],
    )
    body = BODY.format(
        name=name,
        what=kind,
        origin=origin,
        target="a target of its own" if target is None else f"`{Path(target).name}`",
        model="TARGET" if target is None or not _REPOSITORY.fullmatch(target) else target,
        best=done.progress.best_step,
        batch=settings["batch_size"],
        texts=done.texts,
        whose="the target gave itself" if settings["answers"] == "self" else "came with the data",
        k=settings["num_draft_tokens"],
        rows="\n".join(row for condition in done.measured for row in _rows(condition)),
        distinct=", ".join(f"{name} {share:.0%}" for name, share in done.distinct.items()),
        licence="" if called is None else " The licence is that of the original head.",
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _rows(condition: Condition) -> list[str]:
    """Lays out a condition: its acceptance_length, then what is accepted at each position."""
    before, after, lookup = condition.acceptance.values()
    _, ratios, _ = condition.ratio.values()
    rows = []
    for group in before:
        name = condition.name if group == ALL else f"{condition.name}: {group}"
        was, became, copied = (one[group].acceptance_length for one in (before, after, lookup))
        count = before[group].questions
        rows.append(_row(f"{name} ({count})", [was, became, ratios[group], copied], count))
    positions = zip(*(one[ALL].conditional_acceptance for one in (before, after)), strict=False)
    for number, shares in enumerate(positions, 1):
        name = f"{condition.name}: draft {number}, if all before are right"
        rows.append(_row(name, [*shares, None, None], condition.questions))
    return rows


def _row(name: str, figures: Sequence[Interval | None], questions: int) -> str:
    shown = ("" if one is None else one.shown(questions) for one in figures)
    return f"| {name} | {' | '.join(shown)} |"
