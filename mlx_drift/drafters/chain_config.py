"""Configs of drafters that chain: each step reads the token before it and a recycled state."""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_drift.drafters.schema import (
    MAX_SIZE,
    LayersConfig,
    LlamaLayersConfig,
    VocabularyConfig,
    check_one_tap,
)
from mlx_drift.errors import DriftError


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(VocabularyConfig):
    """An EAGLE-3 drafter, normalized (EAGLE-3.1) or not.

    Attributes:
        feedback: Which state the next chain step gets: before (`pre`) or after (`post`) the final
            norm. `norm_output` in PyTorch checkpoints; `post` is one half of EAGLE-3.1.
        fc: The taps are fused by a linear layer. Without one (NVIDIA's heads of a single feature)
            the one tap is the hidden state.
        fc_norm: One RMSNorm per tap before `fc`, the other half of EAGLE-3.1.
        norm_before_fc: One RMSNorm over all A·T captured values.
        hidden_norm: The first layer norms the hidden state it reads beside the embedding.
        norm_before_residual: The residual stream starts at the normed hidden state.
    """

    drafter_type: Literal["eagle3", "eagle4", "p-eagle"] = "eagle3"
    feedback: Literal["pre", "post"]
    fc: bool = True
    fc_norm: bool
    norm_before_fc: bool
    hidden_norm: bool = True
    norm_before_residual: bool
    own_head: bool = True

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if not self.fc and (self.fc_bias or len(self.taps) > 1):
            raise DriftError(
                f"a drafter without fc reads one tap as it is, but this has taps {list(self.taps)}"
                f"{' and fc_bias' if self.fc_bias else ''}"
            )
        if not self.fc and self.hidden_size != self.target.hidden_size:
            raise DriftError(
                f"hidden_size is {self.hidden_size} and the target's {self.target.hidden_size}, "
                "so the drafter needs an fc"
            )
        if self.norm_before_residual and not self.hidden_norm:
            raise DriftError("norm_before_residual is true, but there is no hidden_norm")


@dataclass(frozen=True, kw_only=True)
class Eagle4Config(Eagle3Config):
    """An EAGLE-4 drafter: EAGLE-3 with a cheap head that chooses candidates for the exact one.

    Attributes:
        candidate_rank: How wide the cheap head is.
        num_candidates: How many tokens get their exact logit; the others are not drafted.
    """

    drafter_type: Literal["eagle4"] = "eagle4"
    candidate_rank: int
    num_candidates: int

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        if not self.own_head:
            raise DriftError("an EAGLE-4 drafter chooses rows of its own head, but has none")
        if self.num_candidates > self.draft_vocab_size:
            raise DriftError(
                f"num_candidates is {self.num_candidates} of a draft vocabulary of "
                f"{self.draft_vocab_size}"
            )


@dataclass(frozen=True, kw_only=True)
class EagleConfig(LlamaLayersConfig):
    """An EAGLE-1 or EAGLE-2 drafter (the same weights; EAGLE-2 only drafts a tree).

    It reads the target's final norm alone, and its output goes to the target's head as it is.

    Attributes:
        input_norm: The first layer norms what it reads (Hydra's `eagle-attn`, which may read an
            earlier state of the target than the final norm's).
    """

    drafter_type: Literal["eagle"] = "eagle"
    input_norm: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, "an EAGLE-1/2 drafter")


@dataclass(frozen=True, kw_only=True)
class MTPConfig(LayersConfig):
    """A multi-token-prediction head: a projection, one block of the target's own kind, a norm.

    Its one tap is the target's final norm or, one less, the last layer's output before it: engines
    disagree on which of the two the first step gets, and on which of its own the later steps get.

    Attributes:
        feedback: Which state the next chain step gets: before (`pre`) or after (`post`) the head's
            final norm.
        hidden_first: The projection reads the hidden state before the embedding (MiMo).
        block: The keys that mlx-lm's model file of the family builds its decoder layer from, layer
            0 being of the head's kind; `model_type` names the family.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    drafter_type: Literal["mtp"] = "mtp"
    feedback: Literal["pre", "post"]
    hidden_first: bool = False
    num_layers: int = 1
    block: dict[str, Any]
    own_head: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, "an MTP head")
        if self.num_layers != 1:
            raise DriftError(f"num_layers is {self.num_layers}; an MTP head has one block")
        _check_block(self.block, "block")


def _check_block(value: Any, where: str) -> None:
    """Checks that numbers in a block's keys are no larger than any model's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "rope_theta":
                _check_block(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_block(inner, where)
    elif isinstance(value, int | float) and not abs(value) <= MAX_SIZE:  # false for NaN
        raise DriftError(f"{where} is {value}; expected at most {MAX_SIZE}")
