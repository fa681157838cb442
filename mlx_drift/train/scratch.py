"""A head from nothing, for a target that nobody trained one for.

It starts as a logit lens: the deepest tap goes straight to the target's final norm and head, and
what the layer adds is 0. Its vocabulary is what the target says most.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.load import WEIGHTS, build_drafter, build_network
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.train.layout import Text

Kind = Literal["eagle3.1", "eagle3"]
DRAFT_VOCABULARY = 32_000
"""SafeAILab/EAGLE's, for targets of 128k and more."""

LEAST_LAYERS = 7
"""With fewer, two of the taps are the same."""

ROWS = 256
"""Rows of the target's head that are read off at a time."""


def scratch_config(
    kind: Kind, target: Target, draft_vocab_size: int | None, max_seq_length: int
) -> Eagle3Config:
    """Returns the config of a head of a target's own sizes, that taps layers 2, n//2 and n − 3.

    Args:
        kind: Normalized or not.
        target: What it drafts for.
        draft_vocab_size: Its vocabulary's size; None for the usual one.
        max_seq_length: The length it is trained on.

    Raises:
        DriftError: If the target has too few layers to tap, or the vocabulary is none.
    """
    shape, layers = target.shape, target.shape.num_layers or 0
    if layers < LEAST_LAYERS:
        raise DriftError(
            f"the target has {layers} layers; a head from scratch taps 2, n // 2 and n − 3 of at "
            f"least {LEAST_LAYERS}"
        )
    wanted = draft_vocab_size or min(DRAFT_VOCABULARY, shape.vocab_size)
    if not 1 <= wanted <= shape.vocab_size:
        raise DriftError(
            f"draft_vocab_size is {wanted}; expected 1 to {shape.vocab_size}, the target's"
        )
    given = getattr(target.model, "args", None)
    nested = getattr(given, "text_config", None) or {}
    told = {**vars(given), **nested} if given is not None else {}
    heads = told.get("num_attention_heads") or max(1, shape.hidden_size // 64)
    return Eagle3Config(
        taps=(2, layers // 2, layers - 3),
        hidden_size=shape.hidden_size,
        target=shape,
        feedback="post" if kind == "eagle3.1" else "pre",
        fc_norm=kind == "eagle3.1",
        norm_before_fc=False,
        norm_before_residual=False,
        draft_vocab_size=wanted,
        num_layers=1,
        intermediate_size=told.get("intermediate_size") or 4 * shape.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=told.get("num_key_value_heads") or heads,
        head_dim=told.get("head_dim") or shape.hidden_size // heads,
        rms_norm_eps=told.get("rms_norm_eps") or 1e-6,
        rope_theta=float(told.get("rope_theta") or 10_000.0),
        max_position_embeddings=max_seq_length,
        source={"path": f"nothing (mlx-drift adapt --from-scratch {kind})"},
    )


def lazy_head(config: Eagle3Config, target: Target) -> ChainDrafter:
    """Returns a head of a config that takes no memory: for what its shapes tell."""
    network = build_network(config, Path("from scratch") / WEIGHTS)
    drafter = build_drafter(config, network, target, None)
    assert isinstance(drafter, ChainDrafter)
    return drafter


def write_scratch_head(
    folder: Path, config: Eagle3Config, target: Target, texts: Sequence[Text], seed: int
) -> Path:
    """Writes a head that has learned nothing yet.

    Args:
        folder: The folder to write.
        config: Its config.
        target: What it drafts for.
        texts: What that says: the tokens said most are the head's vocabulary.
        seed: Of its weights.

    Returns:
        The folder.
    """
    ids = draft_vocabulary(texts, config.draft_vocab_size, config.target.vocab_size)
    network = build_network(config, folder / WEIGHTS)
    weights = _random_weights(network, seed)
    size = config.hidden_size
    for name in ("fc", "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"):
        weights[f"{name}.weight"] *= 0
    weights["fc.weight"][:, -size:] = mx.eye(size)
    weights["norm.weight"] = target.final_gain().astype(mx.float32)
    weights["lm_head.weight"] = _rows_of_head(target, mx.array(ids))
    if len(ids) < config.target.vocab_size:
        weights["d2t"] = mx.array(np.array(ids) - np.arange(len(ids)))
    mx.eval(weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"partial-{WEIGHTS}"
        mx.save_safetensors(str(partial), weights, {"format": "mlx"})
        sha256 = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial.replace(folder / WEIGHTS)
        config = replace(config, source=config.source | {"file": WEIGHTS, "sha256": sha256})
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise DriftError(f"{folder}: cannot be written ({error})") from None
    return folder


def draft_vocabulary(texts: Sequence[Text], size: int, vocab_size: int) -> list[int]:
    """Returns the tokens that are said most, in ascending order; then the lowest of the others."""
    counts = Counter(t for text in texts for a, b in text.said for t in text.tokens[a:b])
    by_count = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return sorted(by_count[:size])


def _random_weights(network: nn.Module, seed: int) -> dict[str, Any]:
    """Draws matrices as `nn.Linear` does; norms are 1."""
    shapes = sorted((name, array.shape) for name, array in tree_flatten(network.parameters()))
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        name: mx.random.uniform(-(shape[-1] ** -0.5), shape[-1] ** -0.5, shape, key=key)
        if len(shape) > 1
        else mx.ones(shape)
        for (name, shape), key in zip(shapes, keys, strict=True)
    }


def _rows_of_head(target: Target, ids: mx.array) -> mx.array:
    """Reads rows of the target's head off what it makes of unit vectors, `[D, H]` float32."""
    size, found = target.shape.hidden_size, []
    units = mx.eye(size, dtype=target.dtype)
    for start in range(0, size, ROWS):
        found.append(target.head(units[start : start + ROWS])[:, ids].astype(mx.float32))
        mx.eval(found[-1])
    return mx.concatenate(found).T
