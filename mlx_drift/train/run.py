"""The folder of a run: what it was begun with, answers, checkpoint and the best head so far.

It stands beside the result. One process has it at a time, and a run that was cut short goes on in
it, if it is the same run.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_drift.errors import DriftError, brief
from mlx_drift.files.json_file import read_json

FREE = "save_every", "steps_per_report"
"""Settings that change nothing of the result."""


def run_folder(mlx_path: Path) -> Path:
    """Returns the folder of the run that writes a result."""
    return mlx_path.with_name(f"{mlx_path.name}.run")


class Run:
    """The folder of a run; a context manager.

    Args:
        path: The folder; made if it is not there.
        settings: What the run depends on, as JSON has it.

    Raises:
        DriftError: If another run has it, it was begun with other settings, or it cannot be
            written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.answers, self.best = path / "answers.jsonl", path / "best"
        self.checkpoint, self.log = path / "checkpoint.safetensors", path / "log.jsonl"
        self._lock: int | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._settle(json.loads(json.dumps(settings)))
        except BlockingIOError:
            self._close()
            raise DriftError(f"{path}: another run is at work in it") from None
        except OSError as error:
            self._close()
            raise DriftError(f"{path}: cannot be written ({error.strerror})") from None
        except DriftError:
            self._close()
            raise

    def __enter__(self) -> "Run":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Lets others have it."""
        self._close()

    def note(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the log; a run that goes on from a checkpoint may say some twice."""
        try:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DriftError(f"{self.log}: cannot be written ({error.strerror})") from None

    def _settle(self, settings: dict[str, Any]) -> None:
        """Notes the settings, or checks that they are those it was begun with."""
        file = self.path / "run.json"
        if not file.exists():
            partial = file.with_name("partial-run.json")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            partial.replace(file)
            return
        try:
            theirs = read_json(file)
        except DriftError:
            raise DriftError(f"{file}: damaged; remove {self.path} to begin anew") from None
        for key in sorted({*theirs, *settings} - {*FREE}):
            if theirs.get(key) != settings.get(key):
                raise DriftError(
                    f"{self.path}: a run with another {key} was begun in it, "
                    f"{brief(theirs.get(key))}, not {brief(settings.get(key))}; give what it was "
                    "begun with and it goes on, or remove it to begin anew"
                )

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
