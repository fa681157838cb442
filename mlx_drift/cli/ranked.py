"""A command as one of several ranks, started by `mlx.launch`: rank 0 speaks, all end together."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from mlx_drift.errors import DriftError
from mlx_drift.ranks.world import world

COMMANDS = ("generate", "serve")
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
    if os.environ["MLX_RANK"] != "0":
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
            ranks.fail(None)
        else:
            ranks.finish()
        raise
    except DriftError as error:
        ranks.fail(str(error))
        raise
    except BaseException as error:
        if ranks.rank:
            traceback.print_exc(file=sys.__stderr__)
        ranks.fail(f"{type(error).__name__}: {error}")
        raise
