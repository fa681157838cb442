"""`python -m mlx_drift`, which is `mlx-drift`: for `mlx.launch -n 2 -- python -m mlx_drift …`."""

import sys


def main() -> None:
    """Runs the command line. Ctrl-C while Python still imports it ends without a traceback too."""
    try:
        from mlx_drift.cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
