"""The spellings of one drafter: a dialect is a file that recognises, renames and resolves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_drift.convert.conventions import TapConvention


@dataclass(frozen=True)
class Dialect:
    """How one family of trainers writes an EAGLE-3 checkpoint.

    Attributes:
        name: What the user sees.
        recognises: Whether a checkpoint is of this dialect, from its config and tensor names.
        rename: A tensor's canonical name; None for a tensor that carries nothing to keep.
        flatten: The config as one level of keys, under the names of SpecForge's.
        tap_ids: What layer ids mean to this producer; None if it is not known.
    """

    name: str
    recognises: Callable[[dict[str, Any], set[str]], bool]
    rename: Callable[[str], str | None]
    flatten: Callable[[dict[str, Any]], dict[str, Any]]
    tap_ids: TapConvention | None
