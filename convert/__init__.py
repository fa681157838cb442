"""Converts PyTorch drafter checkpoints to mlx-drift's canonical directory.

Installed as `mlx_drift.convert`. The way of a checkpoint: `read` finds it and reads its headers,
`dialects` know its spelling, `understand` resolves its conventions and keeps account of where each
came from, `write` streams it into a folder. `export` goes the other way, in the words of `formats`.
"""

from mlx_drift.convert.conventions import Undecided
from mlx_drift.convert.convert import Conversion, convert_drafter
from mlx_drift.convert.export import Export, export_drafter
from mlx_drift.convert.inspect import Check, Inspection, inspect_drafter

__all__ = [
    "Check",
    "Conversion",
    "Export",
    "Inspection",
    "Undecided",
    "convert_drafter",
    "export_drafter",
    "inspect_drafter",
]
