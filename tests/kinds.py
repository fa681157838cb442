"""Random heads of every kind, for any target."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.config import CONFIGS, config_from_dict
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.load import build_drafter, build_network
from mlx_drift.target.model import Target

BLOCK = 5
LAYERS: dict[str, Any] = {
    "intermediate_size": 48,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "qk_norm": True,
}
BLOCKS = LAYERS | {"block_size": BLOCK, "mask_token_id": 1}
EAGLE = LAYERS | {
    "feedback": "pre",
    "fc_norm": True,
    "norm_before_fc": False,
    "norm_before_residual": True,
}
SPARK = BLOCKS | {"drafter_type": "dspark", "markov_rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "p-eagle": EAGLE | {"drafter_type": "p-eagle", "mask_token_id": 1, "max_drafts": BLOCK},
    "dflash": BLOCKS | {"drafter_type": "dflash"},
    "dflash sliding": BLOCKS
    | {
        "drafter_type": "dflash",
        "sliding_window": 6,
        "full_attention_layers": [1],
        "causal_layers": [0],
    },
    "dflash causal": BLOCKS
    | {"drafter_type": "dflash", "sliding_window": 6, "causal_layers": [0, 1]}
    | {"window_rule": "anchor"},
    "dspark": SPARK | {"markov": "vanilla", "slots": "shifted"},
    "dspark gated": SPARK | {"markov": "gated", "confidence": "state"},
    "medusa": {"drafter_type": "medusa", "num_heads": BLOCK, "num_blocks": 1},
    "dspark rnn": SPARK | {"markov": "rnn", "slots": "shifted", "confidence": "state and token"},
    "hydra": {"drafter_type": "hydra", "num_heads": BLOCK, "num_blocks": 2},
    "hydra prefix": LAYERS | {"drafter_type": "hydra-prefix", "num_heads": BLOCK, "num_blocks": 1},
    "eagle-attn": LAYERS | {"drafter_type": "eagle", "input_norm": True, "fc_bias": True},
    "eagle4": EAGLE | {"drafter_type": "eagle4", "candidate_rank": 8, "num_candidates": 12},
}
"""What a config says, but for what the target tells."""

ONE_STATE = "medusa", "hydra", "hydra-prefix", "eagle"
"""Kinds that read the target's final norm alone."""


def random_head(
    kind: str, model: nn.Module, d2t: mx.array | None = None, **changes: Any
) -> HeadDrafter:
    """A random head of one kind, the same each time.

    Args:
        kind: A key of `KINDS`.
        model: The target.
        d2t: Target token id of each draft token id; None for the target's vocabulary.
        changes: To the config.
    """
    shape = Target(model).shape
    values = KINDS[kind] | {
        "format_version": 1,
        "taps": [1, shape.num_layers],
        "hidden_size": shape.hidden_size,
        "draft_vocab_size": shape.vocab_size if d2t is None else d2t.size,
        "own_head": d2t is not None,
        "target": vars(shape),
    }
    if values["drafter_type"] in ONE_STATE:
        values |= {"taps": [shape.num_layers + 1]}
    if values["drafter_type"] == "eagle4":
        values |= {"own_head": True}
    known = {field.name for field in fields(CONFIGS[values["drafter_type"]])}
    config = config_from_dict({k: v for k, v in (values | changes).items() if k in known})
    mx.random.seed(7)
    network = build_network(config, Path("x"))
    network.apply(lambda x: x if x.ndim == 1 else 0.3 * mx.random.normal(x.shape))
    mx.eval(network.parameters())
    return build_drafter(config, network, Target(model, config.taps), d2t)
