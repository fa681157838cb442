"""Low-rank training: mlx-lm's LoRA layers over a head's linear ones, merged in what is written."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

SCALE = 2.0
"""α ÷ rank, as usual; `mlx_lm.lora` has 20 by default, for a tenth of the learning rate."""

LAYERS: dict[Any, Any] = {nn.Linear: LoRALinear, SwitchLinear: LoRASwitchLinear}


def add_low_rank(network: nn.Module, rank: int, seed: int) -> None:
    """Freezes a network, and adds factors of a rank to each of its linear layers, in place.

    They start as nothing: the second factor is 0, the first drawn by the seed alone.
    """
    network.freeze()
    layers = [(n, m) for n, m in sorted(network.named_modules()) if type(m) in LAYERS]
    replaced = []
    for (name, module), key in zip(
        layers, mx.random.split(mx.random.key(seed), len(layers)), strict=True
    ):
        layer = LAYERS[type(module)].from_base(module, r=rank, scale=SCALE)
        bound = layer.lora_a.shape[-1 if type(module) is SwitchLinear else 0] ** -0.5
        layer.lora_a = mx.random.uniform(-bound, bound, layer.lora_a.shape, key=key)
        replaced.append((name, layer))
    network.update_modules(tree_unflatten(replaced))
    mx.eval(mx.random.state)  # the layers drew first values of their own


def merged(network: nn.Module) -> dict[str, mx.array]:
    """Returns a network's weights under their canonical names, low-rank factors merged."""
    weights = dict(tree_flatten(network.parameters()))
    for name, module in network.named_modules():
        if isinstance(module, (LoRALinear, LoRASwitchLinear)):
            for inner in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[inner]
            fused = tree_flatten(module.fuse().parameters())
            weights |= {f"{name}.{inner}": value for inner, value in fused}
    return weights
