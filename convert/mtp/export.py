"""An MTP head in speculators' words: the names and the config of its `MTPDraftModel`.

The other way of `mlx_drift.convert.mtp.layouts`. Blocks whose norms are zero-centred in PyTorch,
and those with experts, are not written yet.
"""

from collections.abc import Iterator
from typing import Any

from mlx_drift.convert.mtp.layouts import BLOCKS, MIMO_NAMES, ZERO_CENTRED
from mlx_drift.drafters.chain_config import MTPConfig

PREFIX = "mtp_layers.0."
FAMILIES = sorted({*BLOCKS.values()} - ZERO_CENTRED)


def unsaid(config: MTPConfig) -> Iterator[str]:
    """Yields what of a head is not said in this format."""
    if (family := config.block.get("model_type")) not in FAMILIES:
        yield f"its block is one of {family}, and {' or '.join(FAMILIES)} is what is written"
    if config.hidden_first:
        yield "its projection reads the hidden state before the embedding"
    if config.feedback != "post":
        yield "it recycles the state before its norm"
    layers = config.target.num_layers
    if layers is None or list(config.taps) != [layers + 1]:
        yield "it reads another state of the target than its head does"
    if config.sliding_window is not None:
        yield f"it has a sliding window of {config.sliding_window}"
    if config.block.get("rope_traditional"):
        yield "its RoPE turns pairs of neighbours (rope_traditional)"
    for what, own in (("embedding", config.own_embedding), ("head", config.own_head)):
        if own:
            yield f"it has its own {what}"


def name_of(canonical: str) -> str:
    """Returns the name of a tensor."""
    for theirs, ours in MIMO_NAMES:
        if canonical.startswith(ours):
            return PREFIX + theirs + canonical.removeprefix(ours)
    return PREFIX + canonical.removeprefix("layers.0.")


def layer_config(config: MTPConfig) -> dict[str, Any]:
    """Returns the target's config in transformers' words: the block takes its sizes from it."""
    keys = dict(config.block)
    scaling, theta = keys.pop("rope_scaling", None), keys.pop("rope_theta", None)
    rope = keys.pop("rope_parameters", None) or dict(scaling or {"rope_type": "default"})
    if "type" in rope:  # transformers 4's
        rope.setdefault("rope_type", rope.pop("type"))
    if theta is not None:
        rope["rope_theta"] = theta
    return keys | {
        "hidden_size": config.hidden_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.target.vocab_size,
        "num_hidden_layers": config.target.num_layers,
        "hidden_act": "silu",
        "rope_parameters": rope,
    }
