"""The `mlx-drift` command: each command a thin shell over a public function."""

import logging
import sys
import warnings
from typing import Any

import typer
from huggingface_hub.utils import logging as hub_log

from mlx_drift.cli.bench import bench_command
from mlx_drift.cli.cache_prompt import cache_prompt
from mlx_drift.cli.convert import convert
from mlx_drift.cli.doctor import doctor
from mlx_drift.cli.drift import drift_command
from mlx_drift.cli.generate import generate
from mlx_drift.cli.inspect import inspect
from mlx_drift.cli.measure import measure
from mlx_drift.cli.pairs import pairs
from mlx_drift.cli.tune import tune_command
from mlx_drift.errors import DriftError, DriftWarning

app = typer.Typer(
    name="mlx-drift",
    help="Lossless speculative decoding on MLX: EAGLE-3, EAGLE-3.1 and MTP heads.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(cache_prompt)
app.command()(convert)
app.command()(inspect)
app.command()(doctor)
app.command()(pairs)
app.command(name="bench")(bench_command)
app.command(name="tune")(tune_command)
app.command(name="drift")(drift_command)
app.command()(measure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line: exit code 0 done, 1 a clear one-line error, 2 usage."""
    with_place = warnings.showwarning

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, DriftWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            with_place(message, category, *args, **kwargs)

    if hub_log.get_verbosity() == logging.WARNING:  # unless HF_HUB_VERBOSITY says otherwise
        hub_log.set_verbosity_error()  # its retries: what they come to is told in one line
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            app(args=arguments)
    except DriftError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
