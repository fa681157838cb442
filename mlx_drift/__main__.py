"""`python -m mlx_drift`, which is `mlx-drift`: for `mlx.launch -n 2 -- python -m mlx_drift …`."""

from mlx_drift.cli import main

main()
