"""What a user's text or a checkpoint's file name may be as a path."""

from pathlib import Path

from mlx_drift.errors import DriftError


def existing(text: str) -> Path | None:
    """Returns the path that a text names, if there is something at it."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, not a path
        return None


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of a folder.

    Raises:
        DriftError: If it is a link that leads out of the folder. Inside a Hub cache, links lead to
            the blobs of the same repository.
    """
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DriftError(f"{path}: cannot be read ({error})") from None
    homes = [home]
    snapshots = next((p for p in home.parents if p.name == "snapshots"), None)
    if snapshots is not None:
        homes.append(snapshots.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise DriftError(
            f"{path}: a link that leads out of its folder, to {real}; copy the file there"
        )
    return path
