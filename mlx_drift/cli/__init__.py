"""The `mlx-drift` command: each command a thin shell over a public function."""

import sys

import typer

from mlx_drift.cli.convert import convert
from mlx_drift.cli.generate import generate
from mlx_drift.errors import DriftError

app = typer.Typer(
    name="mlx-drift",
    help="Lossless EAGLE-3 and EAGLE-3.1 speculative decoding on MLX.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(convert)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line: exit code 0 done, 1 a clear one-line error, 2 usage."""
    try:
        app(args=arguments)
    except DriftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
