"""Pictures need the `plot` extra, matplotlib, which is loaded only for them."""

from mlx_drift.errors import DriftError


def check_matplotlib() -> None:
    """Checks that pictures can be drawn, before anything is measured.

    Raises:
        DriftError: If matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DriftError(
            "pictures need matplotlib, which is not installed: pip install 'mlx-drift[plot]', or "
            "leave --plot out"
        ) from None
