"""Results that survive the run: a JSON value a line, each written as soon as it is there.

The first line says what the others depend on. A last line that a killed run left unfinished is
taken away: what it would have said is done again.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_drift.errors import DriftError, brief

PREFIX = "mlx_drift_"


class LineFile:
    """A file of results that goes on if it is there.

    Args:
        path: The file.
        what: What it holds, a word; the name of the format behind `mlx_drift_`.
        version: Of the format.
        settings: What the results depend on: anything JSON can say.
        take: Told of each result in the file, with the number of its line; what it raises for a
            value that is none, a `ValueError` or any error of a wrong type, tells damage.
        advice: What to do about a file that cannot be used: how its errors end.

    Raises:
        DriftError: If the file is another, of other settings, damaged, or cannot be read and
            written.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        version: int,
        settings: Mapping[str, Any],
        take: Callable[[int, Any], None],
        advice: str,
    ):
        self.path, self.what, self.advice = path, what, advice
        header = {PREFIX + what: version, "settings": json.loads(json.dumps(settings))}
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if not whole and not _line(header).startswith(data):
                raise self.damaged(1)
            for number, line in enumerate(whole.splitlines(), 1):
                self._read(number, line, header, take)
            if not whole:
                path.write_bytes(_line(header))
            elif len(whole) < len(data):
                os.truncate(path, len(whole))
        except OSError as error:
            raise self._unwritten(error) from None

    def append(self, value: Mapping[str, Any]) -> None:
        """Writes a result.

        Raises:
            DriftError: If the disk does not take it.
        """
        try:
            with self.path.open("ab") as stream:
                stream.write(_line(value))
        except OSError as error:
            raise self._unwritten(error) from None

    def damaged(self, number: int) -> DriftError:
        """Returns the error for a line that cannot be read."""
        what = f"is not a file of {self.what}" if number == 1 else f"is damaged in line {number}"
        return DriftError(f"{self.path} {what}; {self.advice}")

    def _read(
        self, number: int, line: bytes, header: dict[str, Any], take: Callable[[int, Any], None]
    ) -> None:
        try:
            value = json.loads(line)
            if number == 1:
                self._compare(value, header)
            else:
                take(number, value)
        except DriftError:  # a ValueError, but one that says what is wrong
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            raise self.damaged(number) from None

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        """Checks the first line.

        Raises:
            DriftError: If it is of another version or other settings.
            KeyError, TypeError: If it is none.
        """
        version = PREFIX + self.what
        if theirs[version] != ours[version]:
            raise DriftError(
                f"{self.path} is of version {brief(theirs[version])}, not {ours[version]}; "
                f"{self.advice}"
            )
        if (found := _difference(theirs["settings"], ours["settings"])) is not None:
            where, was, now = found
            raise DriftError(
                f"{self.path} holds {self.what} of other settings: {where} was {brief(was)}, not "
                f"{brief(now)}; {self.advice}"
            )

    def _unwritten(self, error: OSError) -> DriftError:
        return DriftError(f"{self.path}: cannot be read and written ({error.strerror})")


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _difference(theirs: Any, ours: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Finds the first place in which two objects differ, and what is there."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return None if theirs == ours else (where, theirs, ours)
    pairs = ((key, theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours}))
    found = (_difference(a, b, f"{where} {key}".strip()) for key, a, b in pairs)
    return next((one for one in found if one is not None), None)
