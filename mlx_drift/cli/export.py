"""`mlx-drift export`: a converted drafter in, a PyTorch checkpoint out."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mlx_drift.cli.options import Revision
from mlx_drift.cli.show import conversion_bar, warning
from mlx_drift.convert import export_drafter


def export(
    drafter: Annotated[
        str, typer.Argument(help="A converted drafter's folder, or a Hub repository of one.")
    ],
    format: Annotated[
        Literal["specforge", "speculators"],
        typer.Option(
            help="Whose layout: specforge for SGLang, SpecForge; speculators for vLLM, MTP heads."
        ),
    ],
    path: Annotated[Path, typer.Option(help="The folder to write.")],
    target: Annotated[
        str | None,
        typer.Option(help="Of speculators: the target's name, where the drafter does not say it."),
    ] = None,
    revision: Revision = None,
    upload_repo: Annotated[
        str | None, typer.Option(help="A Hub repository to upload the result to.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout: the config and notes.")
    ] = False,
) -> None:
    """Give a converted drafter back to PyTorch: vLLM, SGLang, SpecForge, speculators."""
    console = Console(stderr=True)
    with conversion_bar(console, f"exporting {drafter}") as progress:
        done = export_drafter(
            drafter,
            path,
            format=format,
            target=target,
            revision=revision,
            upload_repo=upload_repo,
            progress=progress,
        )
    for line in done.notes:
        warning(console, line)
    if as_json:
        report = {"format": done.format, "path": str(path), "config": done.config}
        typer.echo(json.dumps(report | {"notes": done.notes, "url": done.url}))
    typer.echo(f"{drafter} → {path} ({done.format})", err=True)
    if done.url is not None:
        typer.echo(f"uploaded to {done.url}", err=True)
