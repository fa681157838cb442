"""`mlx-drift pairs`: which published head to try for which target."""

import json
from typing import Annotated

import typer

from mlx_drift.pairs import PAIRS


def pairs(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of the list.")
    ] = False,
) -> None:
    """List known pairs of target and drafter, from which `generate --drafter auto` picks."""
    if as_json:
        typer.echo(json.dumps({"pairs": [vars(pair) for pair in PAIRS]}))
        return
    width = max(len(pair.target) for pair in PAIRS)  # no table: it would break long names in two
    for pair in PAIRS:
        typer.echo(f"{pair.target:{width}}  {pair.drafter}")
        for kind, other in pair.others:
            typer.echo(f"{'':{width}}  {other} ({kind})")
    for needs in sorted({pair.needs for pair in PAIRS} - {""}):
        targets = ", ".join(pair.target for pair in PAIRS if pair.needs == needs)
        typer.echo(f"\n{targets} need {needs}")
