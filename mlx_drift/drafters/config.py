"""The one schema every drafter meets, whatever checkpoint it came from.

A config is a frozen dataclass, read strictly from the `config.json` of a converted drafter: this
format is ours, so an unknown key, kind or version is an error and nothing is guessed at load.
What a source checkpoint left open was decided by `mlx_drift.convert`, which noted in `provenance`
where each value came from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS
from mlx_drift.drafters.schema import (
    FORMAT_VERSION,
    MAX_LAYERS,
    MAX_SIZE,
    DrafterConfig,
    LayersConfig,
    LlamaLayersConfig,
    Quantization,
    check_mask,
    strictly,
)
from mlx_drift.errors import DriftError, brief
from mlx_drift.files.json_file import read_json
from mlx_drift.target.model import TargetShape

MOST_PADDING = 1024
"""Rows that a vocabulary is padded with, at most."""


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(LlamaLayersConfig):
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
        draft_vocab_size: Rows of the drafter's head; `d2t` maps them if fewer than the target's.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    drafter_type: Literal["eagle3", "eagle4", "p-eagle"] = "eagle3"
    feedback: Literal["pre", "post"]
    fc: bool = True
    fc_norm: bool
    norm_before_fc: bool
    hidden_norm: bool = True
    norm_before_residual: bool
    draft_vocab_size: int
    own_head: bool = True

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_own_parts(self)
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
class PEagleConfig(Eagle3Config):
    """A P-EAGLE drafter: an EAGLE-3 network that drafts in one pass, and feeds nothing back.

    Attributes:
        mask_token_id: What rows after the first embed.
        max_drafts: How many drafts a round it was trained for; None if the checkpoint does not say.
    """

    drafter_type: Literal["p-eagle"] = "p-eagle"
    mask_token_id: int
    max_drafts: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_mask(self.mask_token_id, self.target)
        if not self.fc:
            raise DriftError("a P-EAGLE drafter fuses its taps by fc, but this has none")
        if self.feedback != "pre":
            raise DriftError(f"feedback is {self.feedback}, but a P-EAGLE drafter feeds none back")


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(LlamaLayersConfig):
    """A DFlash drafter: a block of mask tokens, filled in one pass.

    Attributes:
        block_size: Slots of a block, B.
        mask_token_id: What the slots after the first embed.
        slots: Whether a slot predicts the token at its own position (`unshifted`, B − 1 drafts) or
            the one after it (`shifted`, B drafts).
        causal_layers: Layers in which a slot sees only the slots before it.
        window_rule: Whether the window of a sliding layer moves with each slot (`slot`) or is what
            lies before the block's first slot (`anchor`).
        draft_vocab_size: Rows of the drafter's head; `d2t` maps them if fewer than the target's.
        own_head: The checkpoint brings `lm_head`; else the target's head is used.
    """

    drafter_type: Literal["dflash", "dspark"] = "dflash"
    block_size: int
    mask_token_id: int
    slots: Literal["unshifted", "shifted"] = "unshifted"
    causal_layers: tuple[int, ...] = ()
    window_rule: Literal["slot", "anchor"] = "slot"
    draft_vocab_size: int
    own_head: bool = False

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_mask(self.mask_token_id, self.target)
        check_own_parts(self)
        least = 2 if self.slots == "unshifted" else 1
        if not least <= self.block_size <= MAX_DRAFT_TOKENS:
            raise DriftError(
                f"block_size is {self.block_size}; expected {least} to {MAX_DRAFT_TOKENS}"
            )
        if any(layer >= self.num_layers for layer in self.causal_layers):
            raise DriftError(
                f"causal_layers is {list(self.causal_layers)}, but there are {self.num_layers} "
                "layers"
            )


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


@dataclass(frozen=True, kw_only=True)
class MedusaConfig(DrafterConfig):
    """Medusa heads: each predicts one further position from the target's final normed state.

    Attributes:
        num_heads: How many there are: drafts a round, at most.
        num_blocks: Residual blocks of each.
        block_bias: The blocks have biases.
        draft_vocab_size: Rows of each head; `d2t` maps them if fewer than the target's.
    """

    drafter_type: Literal["medusa"] = "medusa"
    num_heads: int
    num_blocks: int
    block_bias: bool = True
    draft_vocab_size: int

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, "a Medusa head")
        check_heads(self, least_blocks=0)


@dataclass(frozen=True, kw_only=True)
class HydraConfig(DrafterConfig):
    """Hydra heads: Medusa heads that read the drafts before theirs.

    Attributes:
        num_heads: How many there are: drafts a round, at most.
        num_blocks: Residual blocks of each, with the one that narrows what it reads.
        draft_vocab_size: Rows of each head; `d2t` maps them if fewer than the target's.
    """

    drafter_type: Literal["hydra"] = "hydra"
    num_heads: int
    num_blocks: int
    draft_vocab_size: int

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, "a Hydra head")
        check_heads(self, least_blocks=1)


@dataclass(frozen=True, kw_only=True)
class HydraPrefixConfig(LlamaLayersConfig):
    """Hydra heads behind Llama layers over the states of all committed positions (Hydra++).

    Attributes:
        num_heads: As in `HydraConfig`, and so are the two that follow.
        num_blocks: Residual blocks of each head.
        draft_vocab_size: Rows of each head.
    """

    drafter_type: Literal["hydra-prefix"] = "hydra-prefix"
    num_heads: int
    num_blocks: int
    draft_vocab_size: int

    def __post_init__(self) -> None:
        """Refuses what no checkpoint can mean."""
        super().__post_init__()
        check_one_tap(self, "a Hydra head")
        check_heads(self, least_blocks=1)


CONFIGS: dict[str, type[DrafterConfig]] = {
    "eagle3": Eagle3Config,
    "eagle4": Eagle4Config,
    "p-eagle": PEagleConfig,
    "dflash": DFlashConfig,
    "dspark": DSparkConfig,
    "eagle": EagleConfig,
    "mtp": MTPConfig,
    "medusa": MedusaConfig,
    "hydra": HydraConfig,
    "hydra-prefix": HydraPrefixConfig,
}


def check_one_tap(config: DrafterConfig, what: str) -> None:
    """Checks that a drafter reads one tap, as wide as itself; DriftError if not."""
    if len(config.taps) != 1 or config.hidden_size != config.target.hidden_size:
        raise DriftError(
            f"{what} reads one tap of its own width, but this has taps {list(config.taps)}, "
            f"hidden_size {config.hidden_size} and the target's {config.target.hidden_size}"
        )


def check_heads(config: MedusaConfig | HydraConfig | HydraPrefixConfig, least_blocks: int) -> None:
    """Checks how many heads there are, and blocks of each; DriftError if none can be."""
    ranges = {"num_heads": (1, MAX_DRAFT_TOKENS), "num_blocks": (least_blocks, MAX_LAYERS)}
    for name, (least, most) in ranges.items():
        if not least <= getattr(config, name) <= most:
            raise DriftError(f"{name} is {getattr(config, name)}; expected {least} to {most}")


def check_own_parts(config: Eagle3Config | DFlashConfig) -> None:
    """Checks that a drafter brings the embedding and head that the target's cannot stand for.

    Raises:
        DriftError: If it does not.
    """
    if not config.own_head and config.draft_vocab_size != config.target.vocab_size:
        raise DriftError(
            f"draft_vocab_size is {config.draft_vocab_size} and the target's vocabulary "
            f"{config.target.vocab_size}, so the drafter needs an lm_head of its own"
        )
    own = config.own_embedding and config.own_head
    if config.hidden_size != config.target.hidden_size and not own:
        raise DriftError(
            f"hidden_size is {config.hidden_size} and the target's {config.target.hidden_size}, "
            "so the drafter needs an embed_tokens and an lm_head of its own"
        )


def config_from_dict(values: dict[str, Any]) -> DrafterConfig:
    """Reads a config, strictly.

    Raises:
        DriftError: If the kind or version is unknown, a key is unknown or missing, or a value makes
            no sense.
    """
    kind = values.get("drafter_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise DriftError(f"drafter_type is {brief(kind)}; this version runs {', '.join(CONFIGS)}")
    if values.get("format_version") != FORMAT_VERSION:
        raise DriftError(
            f"format_version is {brief(values.get('format_version'))}; this version of mlx-drift "
            f"reads {FORMAT_VERSION}: convert the drafter again, or upgrade mlx-drift"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["target"] = strictly(TargetShape, values.get("target"), "target")
    if values.get("quantization") is not None:
        values["quantization"] = strictly(Quantization, values["quantization"], "quantization")
    return strictly(CONFIGS[kind], values, "the config")


def pads(vocab_size: int, padded: int) -> bool:
    """Tells whether one vocabulary may be another, padded: all ids of the smaller are there.

    Models round their tokenizers' sizes up to a multiple of some power of two: Qwen3's 151,669 to
    151,936, DeepSeek-V3's 128,815 to 129,280. Heads are known that were made for the former.
    """
    missing = padded - vocab_size
    return 0 < missing < MOST_PADDING and 16 * missing < padded


def check_target(config: DrafterConfig, target: TargetShape, where: str) -> None:
    """Checks that a drafter was made for such a target.

    Args:
        config: The drafter's config.
        target: The target's sizes.
        where: The drafter's path, for the message.

    Raises:
        DriftError: Naming the first size that differs.
    """
    for key, what in (
        ("hidden_size", "hidden size"),
        ("vocab_size", "vocabulary size"),
        ("num_layers", "number of layers"),
    ):
        made_for, given = getattr(config.target, key), getattr(target, key)
        if key == "vocab_size" and pads(made_for, given):
            continue
        if None not in (made_for, given) and made_for != given:
            raise DriftError(
                f"{where}: the drafter was made for a target whose {what} is {made_for}, but this "
                f"target's is {given}. Use the target it was trained on"
            )
    if target.num_layers is not None and config.taps[-1] > target.num_layers + 1:
        raise DriftError(
            f"{where}: the drafter taps the output of layer {config.taps[-1] - 1}, but this "
            f"target has {target.num_layers} layers. Use the target it was trained on"
        )


def read_config(folder: Path) -> DrafterConfig:
    """Reads the config of a converted drafter.

    Raises:
        DriftError: If `config.json` is missing, unreadable, or not of this format.
    """
    path = folder / "config.json"
    values = read_json(path)
    if "drafter_type" not in values:
        raise DriftError(
            f"{path} is not a converted drafter (it has no drafter_type). Convert it first: "
            f"mlx-drift convert {folder} --mlx-path OUT"
        )
    try:
        return config_from_dict(values)
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None


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
