"""mlx-drift: lossless EAGLE-3 and EAGLE-3.1 speculative decoding on MLX."""

from mlx_lm import load

from mlx_drift.convert import convert_drafter
from mlx_drift.decode.statistics import Statistics
from mlx_drift.demo import load_demo
from mlx_drift.drafters.load import load_drafter
from mlx_drift.errors import DriftError
from mlx_drift.generate import DriftResponse, generate, stream_generate
from mlx_drift.target import remove_taps

__all__ = [
    "DriftError",
    "DriftResponse",
    "Statistics",
    "convert_drafter",
    "generate",
    "load",
    "load_demo",
    "load_drafter",
    "remove_taps",
    "stream_generate",
]
