"""A command as one of several ranks, started by `mlx.launch`: rank 0 speaks, all end together."""

import atexit
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from mlx_drift.errors import DriftError
from mlx_drift.ranks.world import SECONDS_OF_GRACE, Ranks, own_rank, world

COMMANDS = "generate", "serve", "measure", "bench"
"""The commands that run over several ranks."""

PACKAGES = "mlx", "mlx-lm", "mlx-drift"


@contextmanager
def among_ranks(arguments: list[str] | None) -> Iterator[None]:
    """Runs a command as one of the ranks.

    Args:
        arguments: The command line's; None for the process's own.

    Raises:
        DriftError: If the ranks differ, do not find each other, or the command is for one alone.
    """
    if own_rank():
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # as long as the process
        sys.stdout = sys.stderr = nowhere
    ranks = world()
    try:
        if ranks.size > 1:
            words = sys.argv[1:] if arguments is None else arguments
            mine = {package: version(package) for package in PACKAGES}
            ranks.check_same("the ranks differ", mine, "Install the same on all")
            ranks.check_same("the ranks differ", {"the command": " ".join(words)}, "")
            command = next((word for word in words if not word.startswith("-")), None)
            if command is not None and command not in COMMANDS:
                raise DriftError(
                    f"{command} runs on one machine, without mlx.launch; over several ranks "
                    f"there are {', '.join(COMMANDS)}"
                )
        yield
    except SystemExit as end:
        if end.code:
            _fail(ranks, None, end.code if isinstance(end.code, int) else 1)
        else:
            ranks.finish()
        raise
    except DriftError as error:
        _fail(ranks, str(error))
        raise
    except BaseException as error:
        # A collective fails, too, where a rank is gone: that is told by the thread that watches,
        # in one line, with which it ends this process.
        time.sleep(SECONDS_OF_GRACE)
        if ranks.rank:
            traceback.print_exc(file=sys.__stderr__)
        _fail(ranks, f"{type(error).__name__}: {error}")
        raise


def _fail(ranks: Ranks, line: str | None, code: int = 1) -> None:
    """Ends all ranks: the others now, this one when its error is told.

    Without the interpreter's own end, which would wait for collectives that nobody comes to.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    ranks.fail(line)
    atexit.register(leave)
