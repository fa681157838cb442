"""What rounds cost on this machine, as `mlx-drift tune` measured it, for `auto` to start from.

One small JSON file for each target, drafter, device and mlx version; in it, for each length of
context, the seconds of a round of every draft length. The fingerprints see shapes and types, so
another quantization is another file.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.fingerprint import fingerprint
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Drafter
from mlx_drift.errors import DriftError
from mlx_drift.files.json_file import read_json
from mlx_drift.loading import cache_home
from mlx_drift.ranks.world import ranks_of

LONGEST = 1 << 40
"""Tokens of context that no machine holds."""

_learned: WeakKeyDictionary[Any, dict[int, float]] = WeakKeyDictionary()
"""By drafter, what `auto` found rounds to cost in this process last: not a conversation's state."""

Table = dict[int, dict[int, float]]
"""Seconds of a round by context length, then by draft length; of a plain token under 0."""


def device_name() -> str:
    """Names what mlx computes on."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return str(mx.device_info().get("device_name", "GPU"))


def tuned_file(model: nn.Module, drafter: Drafter) -> Path:
    """Returns where the table of a target and drafter is kept, or would be."""
    seen = [
        fingerprint(model),
        fingerprint(drafter.network),
        f"{device_name()}, {os.cpu_count()} cores",
        version("mlx"),
    ]
    name = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
    return cache_home() / "tuned" / f"{name}.json"


def read_table(path: Path) -> Table:
    """Reads a table; empty if there is none, or none that can be read.

    It is only ever a head start, so what is damaged is as good as missing.
    """
    try:
        stored = read_json(path)["contexts"]
        table = {
            int(context): {int(k): float(seconds) for k, seconds in costs.items()}
            for context, costs in stored.items()
        }
    except (DriftError, KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return {}
    sane = all(
        0 < context < LONGEST
        and all(0 <= k <= MAX_DRAFT_TOKENS and 1e-9 < seconds < 1e6 for k, seconds in costs.items())
        for context, costs in table.items()
    )
    return table if sane else {}


def write_table(path: Path, table: Table, about: Mapping[str, Any]) -> None:
    """Writes a table, beside and then in place.

    Raises:
        DriftError: If it cannot be written.
    """
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({**about, "contexts": table}, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        raise DriftError(
            f"{path}: cannot be written ({error.strerror}); MLX_DRIFT_CACHE may name another folder"
        ) from error


def remember(drafter: Drafter, draft_length: DraftLength) -> None:
    """Keeps what was learned of a drafter's rounds, for other answers of this process.

    But not that drafting does not pay: it may have been another program's fault, and nothing would
    ever measure it again.
    """
    best = draft_length.best()
    if best is not None and best.num_draft_tokens > PLAIN:
        _learned[drafter] = draft_length.costs.known()
    else:
        _learned.pop(drafter, None)


def tuned_costs(model: nn.Module, drafter: Drafter, context: int) -> dict[int, float]:
    """Returns what rounds cost at the nearest context that was measured, as far as it is known.

    Without such a table, what was learned in this process. Of a target that is cut over several
    ranks there is none: `tune` runs on one machine.

    Args:
        model: The target.
        drafter: The drafter.
        context: Tokens of the prompt.
    """
    table: Table = {}
    if ranks_of(model).size == 1 and (cache_home() / "tuned").is_dir():
        table = read_table(tuned_file(model, drafter))
    if not table:
        return _learned.get(drafter, {})
    return table[min(table, key=lambda tokens: abs(math.log(tokens / max(1, context))))]
