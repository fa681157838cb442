"""Configs of drafters that fill all slots of a round in one pass."""

from dataclasses import dataclass
from typing import Literal

from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.drafters.schema import VocabularyConfig, check_layers, check_mask
from mlx_drift.errors import DriftError


@dataclass(frozen=True, kw_only=True)
class PEagleConfig(Eagle3Config):
    """A P-EAGLE drafter: an EAGLE-3 network that drafts in one pass, and feeds nothing back.

    Attributes:
        mask_token_id: What rows after the first embed.
        max_drafts: How many drafts a round it was trained for; None if the checkpoint does not say.
    """

    drafter_type: Literal["p-eagle"] = "p-eagle"
    feedback: Literal["pre"] = "pre"
    mask_token_id: int
    max_drafts: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_mask(self.mask_token_id, self.target)
        if not self.fc:
            raise DriftError("a P-EAGLE drafter fuses its taps by fc, but this has none")


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(VocabularyConfig):
    """A DFlash drafter: a block of mask tokens, filled in one pass.

    Attributes:
        block_size: Slots of a block, B.
        mask_token_id: What the slots after the first embed.
        slots: Whether a slot predicts the token at its own position (`unshifted`, B − 1 drafts) or
            the one after it (`shifted`, B drafts).
        causal_layers: Layers in which a slot sees only the slots before it.
        window_rule: Whether the window of a sliding layer moves with each slot (`slot`) or is what
            lies before the block's first slot (`anchor`).
    """

    drafter_type: Literal["dflash", "dspark"] = "dflash"
    block_size: int
    mask_token_id: int
    slots: Literal["unshifted", "shifted"] = "unshifted"
    causal_layers: tuple[int, ...] = ()
    window_rule: Literal["slot", "anchor"] = "slot"
    own_head: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_mask(self.mask_token_id, self.target)
        least = 2 if self.slots == "unshifted" else 1
        if not least <= self.block_size <= MAX_DRAFT_TOKENS:
            raise DriftError(
                f"block_size is {self.block_size}; expected {least} to {MAX_DRAFT_TOKENS}"
            )
        check_layers(self, "causal_layers")


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(DFlashConfig):
    """A DSpark drafter: a DFlash block whose drafts are chosen one after another.

    Attributes:
        markov: How the bias by the token before is made; None for none.
        markov_rank: Its rank, R; of no meaning without one.
        confidence: What the confidence head reads: the slot's state alone (`state`), or the
            embedding of the token before beside it (`state and token`); None for no such head.
    """

    drafter_type: Literal["dspark"] = "dspark"
    markov: Literal["vanilla", "gated", "rnn"] | None
    markov_rank: int = 1
    confidence: Literal["state", "state and token"] | None = None

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if self.confidence == "state and token" and self.markov is None:
            raise DriftError("confidence reads the token before, but there is no markov head")
