"""Reads safetensors files as untrusted data."""

from pathlib import Path

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from mlx_drift.errors import DriftError
from mlx_drift.files.lfs import POINTER, refuse_pointer
from mlx_drift.files.text import check_text

MAX_HEADER_BYTES = 8 << 20
"""Of some 80,000 tensors; parsed, a header may take thirty times its size in memory."""


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """Reads all tensors of a file, after its header was checked against the file's real size.

    Raises:
        DriftError: If the file is missing, truncated, damaged or a Git LFS pointer.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise DriftError(f"{path}: not a regular file; expected safetensors")
    check_text(str(path), f"{path}: the path")  # mlx takes no other
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        refuse_pointer(start, path)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        # The reference parser checks offsets, shapes and sizes; mlx trusts them.
        with safe_open(path, framework="numpy"):
            pass
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except DriftError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DriftError(
            f"{path}: cannot be read as safetensors ({reason}). Download or copy it again"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Reads what a file says of itself, once `read_safetensors` has found it sound."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}
