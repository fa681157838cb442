"""`mlx-drift inspect`: what a checkpoint is, and whether it fits a target, from headers alone."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_drift.cli.options import (
    Feedback,
    Mtp,
    Revision,
    RopeTheta,
    Slots,
    Source,
    Taps,
    Target,
    Window,
)
from mlx_drift.cli.show import as_is, conventions, warning
from mlx_drift.convert import Inspection, inspect_drafter
from mlx_drift.errors import DriftError

MARKS = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[dim]unknown[/]"}


def inspect(
    source: Source,
    target: Target = None,
    mtp: Mtp = False,
    revision: Revision = None,
    taps: Taps = None,
    feedback: Feedback = None,
    rope_theta: RopeTheta = None,
    window: Window = None,
    slots: Slots = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of the tables.")
    ] = False,
) -> None:
    """Tell what a drafter checkpoint is, without downloading its weights."""
    found = inspect_drafter(
        source,
        target,
        mtp=mtp,
        revision=revision,
        taps=taps,
        feedback=feedback,
        rope_theta=rope_theta,
        window=window,
        slots=slots,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(Console(), found)
    console = Console(stderr=True)
    for line in found.warnings:
        warning(console, line)
    where = f"{found.weights}: "  # which some details begin with
    failed = [check for check in found.checks if check.passed is False]
    if failed:
        told = (f"{check.name}: {check.detail.removeprefix(where)}" for check in failed)
        raise DriftError(f"{where}failed: {'; '.join(told)}")


def _print(console: Console, found: Inspection) -> None:
    typer.echo(f"{found.weights}: {found.dialect}")
    console.print(f"{found.parameters / 1e6:.1f} M parameters, {found.size / 1e6:.1f} MB")
    tensors = Table("tensor", "shape", "dtype")
    for name, shape, dtype in found.tensors:
        tensors.add_row(as_is(name), " × ".join(map(str, shape)), dtype)
    console.print(tensors)
    console.print(conventions(found.values, found.provenance))
    checks = Table("check", "", "")
    for check in found.checks:
        checks.add_row(check.name, MARKS[check.passed], as_is(check.detail))
    console.print(checks)
