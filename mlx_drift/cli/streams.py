"""The streams of a command, set up once: what they cannot show or take ends no run in a traceback.

An answer goes to whatever stdout is: a terminal of another encoding, a pipe that closes early, a
disk that is full.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

RAISING = "strict", "surrogateescape"
"""How a stream may deal with what it cannot encode, and raise; there are others to choose from."""

NARROWEST, WIDEST = 20, 1000
"""Columns in which text can still be read, and beyond which lines are only filled up."""


def set_up_streams() -> None:
    """Makes stdout and stderr take any text.

    What they cannot encode is replaced; if they are closed, nothing is shown; and where `COLUMNS`
    says a width in which nothing could be read, it is put right for rich and typer alike.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nothing = Path(os.devnull).open("w")  # noqa: SIM115  # as long as the process
            setattr(sys, name, nothing)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in RAISING:
            stream.reconfigure(errors="replace")
    if (columns := os.environ.get("COLUMNS", "")).isdecimal():
        os.environ["COLUMNS"] = str(min(max(int(columns), NARROWEST), WIDEST))


def discard_stdout() -> None:
    """Lets what is left in stdout's buffer go, so that the interpreter's last flush finds room."""
    with suppress(OSError), Path(os.devnull).open("w") as nothing:  # no file: there is none
        os.dup2(nothing.fileno(), sys.stdout.fileno())
