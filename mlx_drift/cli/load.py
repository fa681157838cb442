"""Loads models for the command line: mlx-lm's own loader, its errors in one line."""

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.errors import DriftError
from mlx_drift.hub import resolve
from mlx_drift.paths import existing


def load_model(model: str, adapter_path: str | None) -> tuple[nn.Module, TokenizerWrapper]:
    """Loads a target and its tokenizer.

    Raises:
        DriftError: If there is no such model, or mlx-lm cannot load it.
    """
    resolve(model, "model", None, ["config.json"])
    path = existing(model)
    try:
        return mlx_lm.load(model if path is None else str(path), adapter_path=adapter_path)
    except Exception as error:  # whatever a damaged folder makes mlx-lm or transformers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DriftError(f"{model}: mlx-lm cannot load it ({reason})") from error
