"""A checkpoint understood: what all the rest of the converter works with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_drift.convert.conventions import Undecided
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.schema import DrafterConfig
from mlx_drift.errors import DriftError

CONVERTED = "mlx-drift"
"""The dialect of a drafter that was converted already."""


def warnings_of(unknown_keys: Sequence[str], notes: Sequence[str]) -> list[str]:
    """Returns what the user should know of a checkpoint, a line each."""
    unread = ", ".join(unknown_keys)
    return [f"config keys that nothing reads: {unread}"] * bool(unread) + [*notes]


@dataclass(frozen=True)
class Resolved:
    """A checkpoint understood.

    Attributes:
        dialect: The name of its dialect.
        config_file: The name of its config, for messages.
        fields: The fields of its config; `taps` is missing while it is undecided.
        provenance: Where each of them came from.
        tensors: The tensors under canonical names, `d2t` and `t2d` as they are in the file.
        unknown_keys: Config keys that were not recognised.
        notes: What the user should know, a line each.
        undecided: What keeps `taps` open, if anything does.
        origin: What the checkpoint itself says of where it is from: the name of its `target`, or
            all of a converted drafter's `source`.
    """

    dialect: str
    config_file: str
    fields: dict[str, Any]
    provenance: dict[str, str]
    tensors: dict[str, StoredTensor]
    unknown_keys: list[str]
    notes: list[str]
    undecided: Undecided | None = None
    origin: dict[str, str] = field(default_factory=dict)

    def config(self, source: dict[str, str]) -> DrafterConfig:
        """Makes the config.

        Raises:
            Undecided: If the taps are.
            DriftError: If the fields contradict each other, or one makes no sense.
        """
        if self.undecided is not None:
            raise self.undecided
        try:
            return config_from_dict(self.fields | {"source": source, "provenance": self.provenance})
        except DriftError as error:
            raise DriftError(f"{self.config_file}: {error}") from None
