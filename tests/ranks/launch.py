"""Starts ranks on this machine, as `mlx.launch` does, but hears each of them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
SECONDS = 300  # the machine may be busy; nothing here waits for its own sake


def start(
    count: int, folder: Path, *command: str, folders: Sequence[Path | None] = (None,)
) -> list[subprocess.Popen[str]]:
    """Starts a Python command as so many ranks on the ring backend.

    Args:
        count: How many.
        folder: For what they are told.
        command: Python's arguments.
        folders: The working directory of each, or of all.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    around = {
        **os.environ,
        "MLX_HOSTFILE": str(folder / "hosts.json"),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "ranks")]),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=around | {"MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders[rank % len(folders)],
        )
        for rank in range(count)
    ]


def outcome(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Waits for all; exit code, stdout and stderr of each. None is left behind."""
    try:
        told = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(one.returncode, *said) for one, said in zip(processes, told, strict=True)]


def run(count: int, folder: Path, *command: str) -> list[tuple[int, str, str]]:
    """Starts ranks and waits for them."""
    return outcome(start(count, folder, *command))


def mlx_drift(count: int, folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """Runs the command line as so many ranks."""
    return run(count, folder, "-m", "mlx_drift", *arguments)
