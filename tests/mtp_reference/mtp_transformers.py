"""The same modules from the layers of ``transformers``: a cross-check of ``mtp_torch.py``.

Its ``MtpLayer`` around the decoder layer, norm and rotary embedding of each family, eager attention
and a DynamicCache: all L rows at once, then one row at a time. Tried with 5.23. Three things are
its own choice and are overridden: a dense block for DeepSeek (it takes every module for a mixture),
Qwen2's layer for MiMo, which it does not have, and the order of MiMo's projection.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from make_references import reference
from mtp_cases import LAYERS, Config, Tensors
from mtp_torch import MtpReference
from torch import Tensor
from transformers import AutoConfig, DynamicCache
from transformers.modeling_layers import MtpLayer

TOLERANCE = 1e-4  # its norms, softmax and rotary embedding are float32
PREFIXES = {
    "qwen3": "Qwen3",
    "qwen3_next": "Qwen3Next",
    "qwen3_5_text": "Qwen3_5",
    "qwen3_5_moe_text": "Qwen3_5Moe",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "qwen2": "Qwen2",
    "llama": "Llama",
}


def layer_config(config: Config) -> Any:
    """The family's own config of a model of one layer, the module's."""
    values = dict(config)
    if values["model_type"] == "mimo":
        values |= {"model_type": "qwen2", "mtp_hidden_states_first": True}
    dense = values.get("first_k_dense_replace", 0) > LAYERS
    made = AutoConfig.for_model(**values)
    made.num_hidden_layers = 1
    if hasattr(made, "first_k_dense_replace"):
        made.first_k_dense_replace = 1 if dense else 0
    if hasattr(made, "layer_types"):
        made.layer_types = ["full_attention"]
    if hasattr(made, "mlp_layer_types"):
        made.mlp_layer_types = ["sparse"]
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    return made


def state_dict(module: MtpReference) -> Tensors:
    """The module's tensors under the names of ``MtpLayer``, dequantized and fused."""
    names = module.names
    outer = {names["token"]: "enorm", names["hidden"]: "hnorm", names["proj"]: "eh_proj"}
    outer[names["norm"]] = "post_norm"
    state: Tensors = {}
    for name in module.tensors:
        stem, _, kind = name.rpartition(".")
        if kind.endswith("_scale_inv") or stem.endswith(("embed_tokens", "_head", "_head.head")):
            continue
        inner = f"mtp_block.{name.removeprefix(names['block'])}"
        state[f"{outer[stem]}.{kind}" if stem in outer else inner] = module.weight(name)
    numbered = re.compile(r"(mtp_block\.mlp\.experts\.)(\d+)\.(\w+)\.weight")
    experts: dict[int, Tensors] = {}
    for name in list(state):
        if found := numbered.fullmatch(name):
            experts.setdefault(int(found[2]), {})[found[3]] = state.pop(name)
    if experts:
        ordered = [experts[n] for n in range(len(experts))]
        both = [torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered]
        state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack(both)
        state["mtp_block.mlp.experts.down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return state


@torch.no_grad()
def states(module: MtpReference, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What ``MtpReference.engine`` answers as its second."""
    config = layer_config(module.config)
    prefix = PREFIXES[config.model_type]
    path = config.model_type.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{path}.modeling_{path}")
    rotary_name = "TextRotaryEmbedding" if path.startswith("qwen3_5") else "RotaryEmbedding"
    rotary = getattr(modeling, prefix + rotary_name)(config)
    layer = MtpLayer(
        config,
        getattr(modeling, f"{prefix}DecoderLayer"),
        getattr(modeling, f"{prefix}RMSNorm"),
        0,
    )
    layer = layer.double().eval()
    layer.load_state_dict(state_dict(module))  # strictly
    cache = DynamicCache(config=config)
    out: list[Tensor] = []
    rows = len(hidden)
    for start, stop in ((0, rows), *((i, i + 1) for i in range(rows, len(tokens) - 1))):
        before = hidden.double() if start == 0 else out[-1][-1:]
        positions = torch.arange(start, stop)[None]
        embedded = module.embed[tokens[start + 1 : stop + 1]][None]
        unseen = torch.arange(stop)[None] > positions[0][:, None]
        mask = torch.zeros(unseen.shape, dtype=torch.float64).masked_fill(unseen, -1e30)
        position_embeddings = rotary(embedded, positions)
        y = layer(embedded, before[None], position_embeddings, mask[None, None], positions, cache)
        out.append(y[0])
    return torch.cat(out)


def compare_all(names: list[str], given: Tensors) -> None:
    """Compare every case; ends the program at the first that differs."""
    for name in names:
        module = reference(name, given)
        hidden = given[f"{module.config['hidden_size']}/hidden"]
        got = states(module, given["tokens"], hidden)
        error = float((got - given[f"{name}/states"]).abs().max())
        print(f"{name}: {error:.1e}")
        if not error <= TOLERANCE:
            raise SystemExit(f"{name}: transformers differs")
