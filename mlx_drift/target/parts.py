"""Where mlx-lm's model files keep embedding, layers, final norm and head: each by their names."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_drift.errors import DriftError
from mlx_drift.target.recurrent import INSTEAD

EMBEDDINGS = (
    "embed_tokens wte word_embeddings embeddings embedding tok_embeddings token_embeddings "
    "embed_in embed"
).split()
LAYERS = "layers h blocks".split()
NORMS = (
    "norm ln_f norm_f final_norm final_layernorm final_layer_norm embedding_norm output_norm"
).split()
HEADS = "lm_head embed_out output".split()
"""What they call them."""


def find_part(module: nn.Module, names: Sequence[str]) -> Any:
    """Returns the part of a module under the first of some names that it has; else None."""
    return next((module[name] for name in names if name in module), None)


def find_layers(backbone: nn.Module) -> list[nn.Module]:
    """Returns the layers, which some model files keep in a module of their own."""
    layers = find_part(backbone, LAYERS)
    return find_layers(layers) if isinstance(layers, nn.Module) else layers


def find_backbone(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Finds the module that holds embedding, layers and final norm, and what it is in.

    Returns:
        It, and itself with the modules around it, the outermost first.

    Raises:
        DriftError: If there is none.
    """
    around = [[model]]
    while around:
        path = around.pop(0)
        module = path[-1]
        if all(find_part(module, names) is not None for names in (EMBEDDINGS, LAYERS)):
            return module, path
        around += [[*path, part] for part in module.values() if isinstance(part, nn.Module)]
    raise DriftError(
        f"the target's model type {getattr(model, 'model_type', '?')!r} has no embedding and "
        f"layers side by side, so its hidden states cannot be tapped. {INSTEAD}"
    )


def vocabulary_size(model: nn.Module) -> int | None:
    """Returns how many rows a model's embedding has; None if it is not where others have it."""
    try:
        backbone, _ = find_backbone(model)
    except DriftError:
        return None
    rows: int = find_part(backbone, EMBEDDINGS).weight.shape[0]
    return rows
