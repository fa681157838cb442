"""What a checkpoint is understood from: its config, its tensors, and what the user says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_drift.convert.conventions import TapConvention, Undecided, Values
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.errors import DriftError
from mlx_drift.target.model import TargetShape

Tensors = Mapping[str, StoredTensor]
Understood = tuple[dict[str, Any], Undecided | None]
"""The fields of a config, and what keeps its `taps` undecided, if anything does."""

Slots = Literal["unshifted", "shifted"]


FIELDS = {
    "taps": "taps",
    "feedback": "feedback",
    "rope_theta": "rope_theta",
    "window": "sliding_window",
    "slots": "slots",
}
"""The field of a config that each of the `Overrides` is about."""


@dataclass(frozen=True)
class Overrides:
    """What the user, or the probe, says of what a checkpoint leaves open or has wrong.

    Attributes:
        taps: What the checkpoint's tap layers mean; of an MTP head, whether it reads the input of
            the target's head or the last layer's output.
        feedback: Which state the next chain step gets.
        rope_theta: The base of RoPE.
        window: The sliding window; 0 for none.
        slots: Which position a slot of a block predicts: its own, or the one after.
        probed: Which of these the probe says, under the names of the config's fields.
    """

    taps: TapConvention | None = None
    feedback: Literal["pre", "post"] | None = None
    rope_theta: float | None = None
    window: int | None = None
    slots: Slots | None = None
    probed: frozenset[str] = frozenset()

    def refuse(self, why: str, *flags: str) -> None:
        """Refuses what the user says of a head that has no such thing.

        Args:
            why: What the head is.
            flags: The overrides that say nothing of it, under their names here.

        Raises:
            DriftError: Naming the first that was given.
        """
        for flag in flags:
            if getattr(self, flag) is not None and flag not in self.probed:
                raise DriftError(f"{why}; leave --{flag.replace('_', '-')} out")


@dataclass(frozen=True)
class Given:
    """All that the fields of a config are resolved from.

    Attributes:
        values: The flattened config.
        tensors: The tensors under canonical names.
        weights: The file they came from, for messages.
        tap_ids: What layer ids mean to the producer.
        target: The target's sizes, where the user named one.
        overrides: The user's choices.
    """

    values: Values
    tensors: Tensors
    weights: str
    tap_ids: TapConvention | None
    target: TargetShape | None
    overrides: Overrides
