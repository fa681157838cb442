"""Git LFS pointers: what a clone without `git lfs` has in the place of every large file.

Some 130 bytes of text, of which the first line is the same in all (git-lfs/git-lfs
`docs/spec.md`).
"""

from contextlib import suppress
from pathlib import Path

from mlx_drift.errors import DriftError

POINTER = b"version https://git-lfs.github.com/spec/"
MOST = 1024  # bytes, as the specification has it


def refuse_pointer(start: bytes, where: str | Path) -> None:
    """Refuses a file that begins as a pointer does.

    Raises:
        DriftError: If it does.
    """
    if start.startswith(POINTER):
        raise DriftError(
            f"{where}: a Git LFS pointer and not the file that it stands for: run `git lfs pull` "
            "in the clone, or download it with `hf download`"
        )


def refuse_pointers(folder: Path) -> None:
    """Refuses a folder with a pointer in it.

    Raises:
        DriftError: Naming the first pointer.
    """
    for path in sorted(folder.iterdir()):
        start = b""
        with suppress(OSError):  # somebody else will say what is wrong with it
            if path.is_file() and path.stat().st_size <= MOST:
                start = path.read_bytes()
        refuse_pointer(start, path)
