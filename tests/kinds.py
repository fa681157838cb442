"""Random heads of every kind that drafts a block, for any target."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.config import config_from_dict
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
SPARK = BLOCKS | {"drafter_type": "dspark", "markov_rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "p-eagle": LAYERS
    | {
        "drafter_type": "p-eagle",
        "feedback": "pre",
        "fc_norm": True,
        "norm_before_fc": False,
        "norm_before_residual": True,
        "own_head": False,
        "mask_token_id": 1,
        "max_drafts": BLOCK,
    },
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
}
"""What a config says, but for what the target tells."""


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
    if kind == "medusa":
        values = {key: value for key, value in values.items() if key != "own_head"}
        values |= {"taps": [shape.num_layers + 1]}
    config = config_from_dict(values | changes)
    mx.random.seed(7)
    network = build_network(config, Path("x"))
    network.apply(lambda x: x if x.ndim == 1 else 0.3 * mx.random.normal(x.shape))
    mx.eval(network.parameters())
    return build_drafter(config, network, Target(model, config.taps), d2t)
