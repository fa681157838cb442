"""Configs of heads that stand side by side on one state of the target: Medusa's and Hydra's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.drafters.schema import (
    MAX_LAYERS,
    DrafterConfig,
    LlamaLayersConfig,
    check_one_tap,
)
from mlx_drift.errors import DriftError


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(DrafterConfig):
    """What the configs of such heads have in common.

    Attributes:
        num_heads: How many there are: drafts a round, at most.
        num_blocks: Residual blocks of each.
        draft_vocab_size: Rows of each head; `d2t` maps them if fewer than the target's.
    """

    num_heads: int
    num_blocks: int
    draft_vocab_size: int

    what: ClassVar[str]
    least_blocks: ClassVar[int]

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, self.what)
        ranges = {
            "num_heads": (1, MAX_DRAFT_TOKENS),
            "num_blocks": (self.least_blocks, MAX_LAYERS),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise DriftError(f"{name} is {getattr(self, name)}; expected {least} to {most}")


@dataclass(frozen=True, kw_only=True)
class MedusaConfig(HeadsConfig):
    """Medusa heads: each predicts one further position from the target's final normed state.

    Attributes:
        block_bias: The blocks have biases.
    """

    drafter_type: Literal["medusa"] = "medusa"
    block_bias: bool = True

    what = "a Medusa head"
    least_blocks = 0


@dataclass(frozen=True, kw_only=True)
class HydraConfig(HeadsConfig):
    """Hydra heads: Medusa heads that read the drafts before theirs.

    Of the residual blocks the first narrows what a head reads, so there is at least one.
    """

    drafter_type: Literal["hydra", "hydra-prefix"] = "hydra"

    what = "a Hydra head"
    least_blocks = 1


@dataclass(frozen=True, kw_only=True)
class HydraPrefixConfig(HydraConfig, LlamaLayersConfig):
    """Hydra heads behind Llama layers over the states of all committed positions (Hydra++)."""

    drafter_type: Literal["hydra-prefix"] = "hydra-prefix"
