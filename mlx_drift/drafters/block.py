"""One decoder block of mlx-lm's own model files: what an MTP head is made of.

An MTP head repeats a layer of its target, so the layer is the very class that runs the target:
what mlx-lm knows of a family (gated or latent attention, experts and their routing) is not written
a second time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import mlx.nn as nn

from mlx_drift.errors import DriftError, brief

ROUTERS = "gate", "shared_expert_gate"
"""Linear layers that choose experts: a small error there is another expert, so they are never
quantized."""


@dataclass(frozen=True)
class Family:
    """Where mlx-lm keeps a family's decoder layer.

    Attributes:
        layer: The class of the layer.
        arguments: The class of what it is built from.
        numbered: It asks for the layer's number, on which its kind may depend.
        plain: Keys that make layer 0 the kind of layer an MTP head has: full attention, experts.
        experts: The key that tells how many experts there are, and what it is without any.
    """

    layer: str
    arguments: str = "ModelArgs"
    numbered: bool = True
    plain: tuple[tuple[str, Any], ...] = ()
    experts: tuple[str, Any] | None = None


_ROUTED = ("n_routed_experts", None)
_ALL_ROUTED = (("first_k_dense_replace", 0), ("moe_layer_freq", 1))
_FULL_ATTENTION = ("full_attention_interval", 1)

FAMILIES: dict[str, Family] = {
    "llama": Family("TransformerBlock", numbered=False),
    "qwen3": Family("TransformerBlock", numbered=False),
    "mimo": Family("TransformerBlock", numbered=False),
    "qwen3_next": Family(
        "Qwen3NextDecoderLayer",
        plain=(_FULL_ATTENTION, ("mlp_only_layers", []), ("decoder_sparse_step", 1)),
        experts=("num_experts", 0),
    ),
    "qwen3_5": Family(
        "DecoderLayer", "TextModelArgs", plain=(_FULL_ATTENTION,), experts=("num_experts", 0)
    ),
    "deepseek_v3": Family("DeepseekV3DecoderLayer", plain=_ALL_ROUTED, experts=_ROUTED),
    "glm4_moe": Family("DecoderLayer", plain=_ALL_ROUTED[:1], experts=_ROUTED),
    "glm4_moe_lite": Family("Glm4MoeLiteDecoderLayer", plain=_ALL_ROUTED, experts=_ROUTED),
}
"""By the name of mlx-lm's model file."""


def block_keys(family: str, config: dict[str, Any], has_experts: bool) -> dict[str, Any]:
    """Returns the keys of a target's config that `build_block` needs for its MTP head's block.

    Args:
        family: A key of `FAMILIES`.
        config: The target's config, in the words of mlx-lm's arguments.
        has_experts: Whether the head's block has experts, which its tensors tell.
    """
    known = FAMILIES[family]
    wanted = {f.name for f in fields(_class(family, known.arguments))} - {"layer_types"}
    keys = {key: value for key, value in config.items() if key in wanted}
    keys |= {key: value for key, value in known.plain if key in wanted} | {"model_type": family}
    if known.experts is not None and not has_experts:
        keys |= dict([known.experts])
    return keys


def build_block(keys: dict[str, Any]) -> nn.Module:
    """Builds a block from what `block_keys` returned.

    Raises:
        DriftError: If it is of no known family.
        TypeError: If a key is missing (and whatever else a model file raises).
    """
    family = keys.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise DriftError(
            f"block.model_type is {brief(family)}; this version builds {', '.join(FAMILIES)}"
        )
    known = FAMILIES[family]
    arguments = _class(family, known.arguments).from_dict(copy.deepcopy(keys))
    layer: Callable[..., nn.Module] = _class(family, known.layer)
    return layer(arguments, 0) if known.numbered else layer(arguments)


def _class(family: str, name: str) -> Any:
    return getattr(import_module(f"mlx_lm.models.{family}"), name)
