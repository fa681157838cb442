"""Reads JSON files as untrusted data: regular, of a sane size, not nested too deep."""

import gc
import json
import stat
from pathlib import Path
from typing import Any

from mlx_drift.errors import DriftError
from mlx_drift.files.lfs import refuse_pointer

MAX_JSON_BYTES, MAX_JSON_DEPTH = 4 << 20, 32
"""No config comes near these either; parsed, it may take thirty times the memory of its file."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        DriftError: If the file is missing, unreadable, too large, or holds something else: a Git
            LFS pointer, say.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise DriftError(f"{path}: not a regular file; expected a JSON object")
        if status.st_size > max_bytes:
            raise DriftError(f"{path}: larger than {max_bytes >> 20} MB; expected a config")
        data = path.read_bytes()
        refuse_pointer(data, path)
        values = parse_json(data.decode("utf-8"))
    except DriftError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON ({error})"
        raise DriftError(f"{path}: {reason}; expected a JSON object") from None
    if not isinstance(values, dict):
        raise DriftError(f"{path}: holds a JSON {type(values).__name__}, expected an object")
    level: list[Any] = [values]
    for _ in range(MAX_JSON_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for v in inner for child in v if child and isinstance(child, dict | list)]
    if level:  # comparing, copying or printing it might overflow the stack
        raise DriftError(f"{path}: nested more than {MAX_JSON_DEPTH} deep; expected a config")
    return values


def parse_json(text: str | bytes) -> Any:
    """Parses JSON, without the garbage collector: it would visit a large file's objects for ever.

    Raises:
        ValueError: If it is not JSON.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if collecting:
            gc.enable()
