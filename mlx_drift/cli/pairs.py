"""`mlx-drift pairs`: which published head to try for which target."""

import json
from typing import Annotated

import typer

from mlx_drift.demo import smollm2
from mlx_drift.pairs import PAIRS


def pairs(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of the list.")
    ] = False,
) -> None:
    """List known pairs of target and drafter, from which `generate --drafter auto` picks."""
    if as_json:
        own = {"target": smollm2.REPOSITORY, "drafter": str(smollm2.HEAD)}
        typer.echo(json.dumps({"in_this_package": own, "pairs": [vars(pair) for pair in PAIRS]}))
        return
    width = max(len(pair.target) for pair in PAIRS)  # no table: it would break long names in two
    for pair in PAIRS:
        typer.echo(f"{pair.target:{width}}  {pair.drafter}")
        for kind, other in pair.others:
            typer.echo(f"{'':{width}}  {other} ({kind})")
    typer.echo(f"\n{smollm2.REPOSITORY}, and what was made of it: a head is in this package")
    for needs in sorted({pair.needs for pair in PAIRS} - {""}):
        targets = ", ".join(pair.target for pair in PAIRS if pair.needs == needs)
        typer.echo(f"\n{targets} need {needs}")
