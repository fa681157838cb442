"""What several commands show: conventions, warnings, a bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mlx_drift.convert.card import in_short
from mlx_drift.errors import printable

FIRST = (
    "taps feedback fc_norm norm_before_fc norm_before_residual rope_theta rope_scaling "
    "sliding_window"
).split()
"""The conventions that a wrong value spoils without a word."""

SECONDS_BETWEEN_LINES = 60
"""How often a long measurement tells how far it is, where there is no terminal for a bar."""


@contextmanager
def conversion_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback that shows a bar while it is called, on a terminal only.

    Not before, nor after: huggingface_hub shows its own bars while it downloads and uploads.
    """
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)

    def update(at: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=at, total=total)
        if at == total:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def count_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback that tells how much of something is done: a bar, or a line now and then."""
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)
    told = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal told
        bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if not console.is_terminal and now - told >= SECONDS_BETWEEN_LINES:
            console.print(f"{what}: {done} of {total}", markup=False, highlight=False)
            told = now

    with bar:
        yield update


@contextmanager
def prompt_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback that shows a bar while the prompt is processed, on a terminal only."""
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("prompt", total=None)

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done == total:  # the first token is there: its text follows
            bar.stop()

    with bar:
        yield update


def conventions(values: dict[str, Any], provenance: dict[str, str]) -> Table:
    """Lays out every resolved value with where it came from."""
    table = Table("convention", "value", "from")
    for key in [*filter(provenance.get, FIRST), *sorted(provenance.keys() - set(FIRST))]:
        table.add_row(key, as_is(in_short(values.get(key))), as_is(provenance[key]))
    return table


def warning(console: Console, line: str) -> None:
    """Prints a warning."""
    text = as_is(f"warning: {line}", style="yellow")
    console.print(text, soft_wrap=not console.is_terminal)  # a pipe has no width


def as_is(value: object, style: str = "") -> Text:
    """Shows what a file says: its brackets are no markup, its control characters do nothing."""
    return Text(printable(str(value)), style=style)
