"""How the families that have multi-token-prediction heads write them, and which are not run.

A head is found by the names of its tensors alone, so that of a repository of many shards only
those are fetched that hold some of it. The layouts are those of the public repositories, as vLLM
reads them (`qwen3_5_mtp.py`, `deepseek_mtp.py`, `mimo_mtp.py`) and speculators writes them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mlx_drift.errors import DriftError, brief

Config = dict[str, Any]

QWEN_NAMES = (
    ("pre_fc_norm_embedding.", "embedding_norm."),
    ("pre_fc_norm_hidden.", "hidden_norm."),
)
NEXTN_NAMES = (
    ("enorm.", "embedding_norm."),
    ("hnorm.", "hidden_norm."),
    ("eh_proj.", "fc."),
    ("shared_head.norm.", "norm."),
)
MIMO_NAMES = (
    ("token_layernorm.", "embedding_norm."),
    ("hidden_layernorm.", "hidden_norm."),
    ("input_proj.", "fc."),
    ("final_layernorm.", "norm."),
)
SIDECAR_NAMES = (*NEXTN_NAMES, ("shared_head_norm.", "norm."), ("mtp_block.", "layers.0."))
OUTER = ("embedding_norm.", "hidden_norm.", "fc.", "norm.", "embed_tokens.", "lm_head.", "layers.")
BUFFERS = "rotary_emb.inv_freq"
"""A table that some checkpoints hold, and every engine computes anew."""
SHARED = ("shared_head.head.", "embed_tokens.")
"""Copies of the target's own, in DeepSeek's layout (arXiv 2412.19437 §2.2)."""


@dataclass(frozen=True)
class Layout:
    """How one family writes an MTP head.

    Attributes:
        name: What the user sees.
        prefix: What stands before every name, a pattern with the module's number as its only group
            where it has one; `{layers}` is the target's number of layers.
        names: The head's own names and the canonical ones; all others are the block's.
        dropped: What is left out: copies of what the target has.
        hidden_first: The projection reads the hidden state before the embedding.
    """

    name: str
    prefix: str
    names: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...] = ()
    hidden_first: bool = False

    def pattern(self, config: Config) -> re.Pattern[str]:
        """Returns what the names of the head's tensors begin with, under a target's config."""
        return re.compile(self.prefix.replace("{layers}", _numbers(config)))

    def canonical(self, name: str) -> str | None:
        """Returns a name's canonical one, its prefix being gone; None for what is dropped."""
        if name.startswith(self.dropped) or name.endswith(BUFFERS):
            return None
        for theirs, ours in self.names:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name if name.startswith(OUTER) else f"layers.0.{name}"


def _numbers(config: Config) -> str:
    """The numbers of the layers after the last one, of which there are at most a handful."""
    layers = config.get("num_hidden_layers")
    first = layers if type(layers) is int else 0
    return "|".join(str(first + i) for i in range(8))


QWEN = Layout("a Qwen MTP head", r"(?:(?:model|language_model)\.)*mtp\.", QWEN_NAMES)
QWEN_SIDECAR = Layout(
    "a Qwen MTP head",
    r"(?:(?:model|language_model)\.)*"
    r"(?:mtp\.|(?=fc\.|norm\.|pre_fc_norm_|layers\.|embed_tokens\.|lm_head\.))",
    QWEN_NAMES,
)
NEXTN = Layout("a NextN head", r"model\.layers\.({layers})\.", NEXTN_NAMES, SHARED)
NEXTN_SIDECAR = Layout(
    "a NextN head",
    r"(?:model\.)?(?=[eh]norm\.|eh_proj\.|shared_head_norm\.|mtp_block\.|embed_tokens\.|lm_head\.)",
    SIDECAR_NAMES,
)
"""mlx-vlm's, which keeps the head's copies of embedding and head."""
MIMO = Layout("a MiMo MTP head", r"model\.mtp_layers\.(\d+)\.", MIMO_NAMES, hidden_first=True)
SPECULATORS = Layout("speculators mtp", r"mtp_layers\.(\d+)\.", MIMO_NAMES)

LAYOUTS: dict[str, tuple[Layout, str]] = {
    "qwen3_next": (QWEN, "qwen3_next"),
    "qwen3_5": (QWEN, "qwen3_5"),
    "qwen3_5_moe": (QWEN, "qwen3_5"),
    "qwen3_next_mtp": (QWEN_SIDECAR, "qwen3_next"),
    "qwen3_5_mtp": (QWEN_SIDECAR, "qwen3_5"),
    "qwen3_5_moe_mtp": (QWEN_SIDECAR, "qwen3_5"),
    "deepseek_v3": (NEXTN, "deepseek_v3"),
    "glm4_moe": (NEXTN, "glm4_moe"),
    "glm4_moe_lite": (NEXTN, "glm4_moe_lite"),
    "glm4_moe_lite_mtp": (NEXTN_SIDECAR, "glm4_moe_lite"),
    "mimo": (MIMO, "mimo"),
}
"""The layout, and mlx-lm's model file of the block, by the target's model type."""

BLOCKS = {
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen3_next": "qwen3_next",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
}
"""mlx-lm's model file of the block, by the model type that speculators writes."""

ZERO_CENTRED = {"qwen3_next", "qwen3_5"}
"""Families whose norms hold w and multiply by 1 + w in PyTorch; mlx-lm's hold 1 + w."""

_VLLM = "vLLM runs it"
_MLX_VLM = "mlx-vlm runs it"
REFUSED: dict[str, tuple[str, str]] = {
    "gemma4": ("Gemma-4's assistants share the target's cache", _MLX_VLM),
    "gemma4_assistant": ("a Gemma-4 assistant shares the target's cache", _MLX_VLM),
    "gemma4_unified_assistant": ("a Gemma-4 assistant shares the target's cache", _MLX_VLM),
    "deepseek_v32": ("its head has sparse attention", _VLLM),
    "deepseek_v4": ("its head has sparse attention", _MLX_VLM),
    "glm_moe_dsa": ("its head has sparse attention", _MLX_VLM),
    "mimo_v2_flash": ("it has three heads in turn, with sliding windows", "SGLang runs it"),
    "step3p5": ("it has three heads in turn", _VLLM),
    "ernie4_5_moe": ("its head's layout is not known here", _VLLM),
    "nemotron_h": ("its head is a hybrid of two layers", _MLX_VLM),
    "exaone_moe": ("its head's layout is not known here", _VLLM),
    "kimi_linear": ("its head's layout is not known here", _VLLM),
    "longcat_flash": ("its head's layout is not known here", "SGLang runs it"),
    "qwen4_exp": ("its head's layout is not known here", _MLX_VLM),
}
"""Model types with MTP heads that this version does not run: why, and what does."""


def text_config(config: Config) -> Config:
    """Returns the config of the language model in a config, which may be nested."""
    for key in ("text_config", "transformer_layer_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def find_layout(config: Config, where: str) -> tuple[Layout, str]:
    """Finds the layout of a config's MTP head, and mlx-lm's model file of its block.

    Raises:
        DriftError: If its model type is not known, or refused.
    """
    if config.get("speculators_model_type") == "mtp":
        kind = str(text_config(config).get("model_type"))
        if kind in BLOCKS:
            return SPECULATORS, BLOCKS[kind]
        raise DriftError(
            f"{where}: transformer_layer_config.model_type is {brief(kind)}; an MTP head of "
            f"speculators is run for {', '.join(BLOCKS)}"
        )
    inner = str(text_config(config).get("model_type"))
    kind = str(config.get("model_type") or inner)
    kind = kind if kind in LAYOUTS | REFUSED else kind.removesuffix("_text")
    if kind in LAYOUTS:
        layout, family = LAYOUTS[kind]
        return layout, BLOCKS.get(inner, family)  # mlx-vlm calls Qwen3-Next's qwen3_5_mtp too
    if kind in REFUSED:
        why, instead = REFUSED[kind]
        raise DriftError(f"{where}: the MTP head of {kind} is not run ({why}). {instead}")
    raise DriftError(
        f"{where}: model_type is {brief(config.get('model_type'))}, of which no MTP head is known; "
        f"this version runs those of {', '.join(LAYOUTS)}, and speculators' mtp"
    )


def wanted_by(layout: Layout, config: Config) -> Callable[[str], bool]:
    """Returns what tells the names of a head's tensors from all others."""
    pattern = layout.pattern(text_config(config))
    return lambda name: pattern.match(name) is not None


def modules_of(
    layout: Layout, config: Config, names: Iterable[str], where: str
) -> dict[str, dict[str, str]]:
    """Sorts the names of a head's tensors by module: for each, name by canonical name.

    Raises:
        DriftError: If two names mean the same.
    """
    pattern = layout.pattern(text_config(config))
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        match = pattern.match(name)
        if match is None:
            continue
        canonical = layout.canonical(name[match.end() :])
        if canonical is None:
            continue
        if pattern.groups:
            number = match.group(1)
        else:  # Qwen's layers are numbered behind what they share
            number = canonical.split(".")[1] if canonical.startswith("layers.") else "0"
        other = modules.setdefault(number, {}).setdefault(canonical, name)
        if other != name:
            raise DriftError(f"{where}: {other} and {name} both mean {canonical}")
    return modules
