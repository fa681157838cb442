"""Tiny heads of every kind that is trained, beside their PyTorch writings."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from cases import draw_weight, generator, make_config, short_floats, tensor_shapes

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.load import load_network
from mlx_drift.train.objective import Row

LENGTH = 5
LAYERS = 10
TARGET = {"hidden_size": 32, "vocab_size": 48, "num_layers": LAYERS}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
EAGLE3: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "eagle3 of speculators": {
        "norm_before_fc": True,
        "norm_before_residual": True,
        "norm_output": True,
        "qk_norm": True,
        "sliding_window": 3,
    },
    "eagle3 with a gate and two layers": {"gated_attention": True, "num_hidden_layers": 2},
    "eagle3 tied": {"tied": True, "attention_bias": True},
}
MTP = {"mtp": {"norm_output": True}, "mtp fed back before its norm": {"norm_output": False}}
KINDS = [*EAGLE3, "eagle", *MTP]


@dataclass(frozen=True)
class TinyHead:
    """A head, and its PyTorch writing's config.

    Attributes:
        kind: A name of `KINDS`.
        config: The keys of `cases.BASE_CONFIG`.
        fields: The package's config.
        weights: Canonical name → float32.
    """

    kind: str
    config: dict[str, Any]
    fields: dict[str, Any]
    weights: dict[str, np.ndarray]

    @property
    def vocabulary(self) -> int:
        return self.config["draft_vocab_size"]

    @property
    def embed(self) -> np.ndarray:
        return short_floats(0.05 * generator(0, "embed").standard_normal((48, 32)))

    @property
    def target_head(self) -> np.ndarray:
        return short_floats(generator(0, "target_head").standard_normal((48, 32)) / 6)

    def drafter(self) -> ChainDrafter:
        """The package's drafter, to be trained."""
        config = config_from_dict(self.fields)
        weights = {name: mx.array(weight) for name, weight in self.weights.items()}
        network = load_network(config, weights, Path(self.kind))
        embed, head = mx.array(self.embed), mx.array(self.target_head)
        target: Any = SimpleNamespace(
            model=None,
            embed=lambda ids: embed[ids],
            head=lambda states: states @ head.T,
            shape=config.target,
        )
        return ChainDrafter(config, network, target, None)

    def row(self) -> Row:
        """What it is trained on; two positions do not count."""
        rng = generator(0, "row")
        taps = rng.standard_normal((LENGTH, len(self.fields["taps"]), 32))
        counted = np.ones(LENGTH + 1, bool)
        counted[[2, 4]] = False
        return Row(
            tokens=mx.array(rng.integers(0, 48, LENGTH + 1)),
            taps=mx.array(short_floats(taps)),
            logits=mx.array(short_floats(2 * rng.standard_normal((LENGTH + 1, self.vocabulary)))),
            counted=mx.array(counted),
        )


def tiny_head(kind: str) -> TinyHead:
    """Makes the head of a name of `KINDS`."""
    common = {"format_version": 1, "num_layers": 1, "max_position_embeddings": 64, "target": TARGET}
    if kind in EAGLE3:
        config = make_config(**EAGLE3[kind])
        fields = {
            "drafter_type": "eagle3",
            "feedback": "post" if config["norm_output"] else "pre",
            "own_head": not config["tied"],
            "attention_output_bias": config["attention_bias"],
            "num_layers": config["num_hidden_layers"],
        }
        same = "taps fc_norm norm_before_fc norm_before_residual qk_norm gated_attention"
        for key in f"{same} attention_bias sliding_window draft_vocab_size".split():
            fields[key] = config[key]
        shapes = {n: s for n, s in tensor_shapes(config).items() if n != "d2t"}
        return _made(kind, config, common | SIZES | fields, shapes)
    switches = MTP.get(kind, {})
    config = make_config(taps=[LAYERS + 1], tied=True, **switches)
    block = {name: shape for name, shape in tensor_shapes(config).items() if "layers.0." in name}
    block = {n: (s[0], 32) if "proj" in n and s[-1] == 64 else s for n, s in block.items()}
    del block["layers.0.hidden_norm.weight"]
    shapes = block | {"fc.weight": (32, 64)}
    if kind == "eagle":
        del shapes["layers.0.input_layernorm.weight"]
        fields = SIZES | {"drafter_type": "eagle", "taps": [LAYERS + 1], "fc_bias": True}
        return _made(kind, config, common | fields, shapes | {"fc.bias": (32,)})
    for name in ("embedding_norm", "hidden_norm", "norm"):
        shapes[f"{name}.weight"] = (32,)
    fields = {
        "drafter_type": "mtp",
        "taps": [LAYERS + 1],
        "hidden_size": 32,
        "rms_norm_eps": 1e-5,
        "feedback": "post" if config["norm_output"] else "pre",
        "block": SIZES | {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 48},
    }
    return _made(kind, config, common | fields, shapes)


def _made(
    kind: str, config: dict[str, Any], fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> TinyHead:
    weights = {name: draw_weight(config, name, shape, 7) for name, shape in shapes.items()}
    return TinyHead(kind, config, fields, weights)
