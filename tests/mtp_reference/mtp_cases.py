"""Tiny MTP checkpoints in their makers' layouts: configs, tensors and inputs, drawn.

The key sets of the configs, the tensor names and the dtypes are those of the repositories named
beside each case. A drawn tensor depends only on (seed, name, shape). Every drawn float has at most
8 significant bits, so it is exact in bfloat16; but 1 + w of a zero-centred norm is so only in
float32. The one exception, ``e_score_correction_bias``, is float32 in the real files too. fp8
weights and their scales have 4 significant bits each, so their products have 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cases import generator, short_floats
from mtp_torch import FP8_BLOCK, family, module_names, text_config
from torch import Tensor

SEED = 53
LENGTH = 10
STEPS = 3
VOCAB = 48
LAYERS = 4
HIDDEN = 32
FP8_HIDDEN = 136

Config = dict[str, Any]
Tensors = dict[str, Tensor]

SIZES: Config = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}

LINEAR_ATTENTION: Config = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}

QWEN_EXPERTS: Config = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}

QWEN3_NEXT: Config = {  # Qwen/Qwen3-Next-80B-A3B-Instruct: nothing in it tells of the module
    **SIZES,
    **LINEAR_ATTENTION,
    **QWEN_EXPERTS,
    "architectures": ["Qwen3NextForCausalLM"],
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_sliding_window": False,
}

QWEN3_5_TEXT: Config = {
    **SIZES,
    **LINEAR_ATTENTION,
    "attention_bias": False,
    "attn_output_gate": True,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mamba_ssm_dtype": "float32",
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "pad_token_id": None,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
        "rope_theta": 500,
        "rope_type": "default",
    },
}

QWEN3_5: Config = {  # Qwen/Qwen3.6-27B, less its vision_config
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 40,
    "language_model_only": False,
    "model_type": "qwen3_5",
    "text_config": QWEN3_5_TEXT,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "video_token_id": 41,
    "vision_end_token_id": 42,
    "vision_start_token_id": 43,
}

QWEN3_5_MOE_TEXT: Config = {
    **{key: value for key, value in QWEN3_5_TEXT.items() if key != "intermediate_size"},
    **QWEN_EXPERTS,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
}

QWEN3_5_MOE: Config = {  # Qwen/Qwen3.6-35B-A3B: fused experts
    **QWEN3_5,
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": QWEN3_5_MOE_TEXT,
}

FP8: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}

YARN: Config = {  # its ramp over the four frequencies is 0, 1/3, 2/3, 1
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
    "type": "yarn",
}

DEEPSEEK_V3: Config = {  # deepseek-ai/DeepSeek-V3, less its auto_map
    **SIZES,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 16,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 100,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "v_head_dim": 10,
}

GLM4_MOE: Config = {  # zai-org/GLM-4.5
    **SIZES,
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [1, 2, 3],
    "first_k_dense_replace": 3,
    "head_dim": 16,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 12,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_qk_norm": True,
}

GLM4_MOE_LITE: Config = {  # zai-org/GLM-4.7-Flash
    **{key: value for key, value in SIZES.items() if key not in ("initializer_range", "use_cache")},
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": [1, 2, 3],
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 12,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0",
    "v_head_dim": 10,
}

MIMO: Config = {  # XiaomiMiMo/MiMo-7B-RL, less its auto_map
    **SIZES,
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": "mimo",
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_sliding_window": False,
}

LLAMA_SPECULATORS: Config = {  # the layout of speculators, for a family it does not train
    "architectures": ["MTPDraftModel"],
    "dtype": "float16",
    "num_nextn_predict_layers": 1,
    "speculators_config": {
        "algorithm": "mtp",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "accept_tolerance": 0.0,
                "proposal_type": "greedy",
                "speculative_tokens": 3,
                "verifier_accept_k": 1,
            }
        ],
        "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "tiny-target"},
    },
    "speculators_model_type": "mtp",
    "speculators_version": "0.9.0",
    "transformer_layer_config": {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "vocab_size": VOCAB,
    },
}

CONFIGS: dict[str, Config] = {
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_5_moe_fp8": {**QWEN3_5_MOE, "quantization_config": FP8},  # numbered experts
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3_yarn": DEEPSEEK_V3 | {"max_position_embeddings": 5120, "rope_scaling": YARN},
    "deepseek_v3_yarn_mscale": {
        **DEEPSEEK_V3,
        "max_position_embeddings": 5120,
        "rope_scaling": {**YARN, "mscale": 0.5},
    },
    "deepseek_v3_dense": {
        **DEEPSEEK_V3,
        "first_k_dense_replace": LAYERS + 1,
        "q_lora_rank": None,
    },
    "deepseek_v3_fp8": {
        **DEEPSEEK_V3,
        "hidden_size": FP8_HIDDEN,
        "n_group": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "topk_group": 1,
        "v_head_dim": 36,  # o_proj is 136 x 144: two blocks by two
        "quantization_config": FP8,
    },
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "mimo": MIMO,
    "llama": LLAMA_SPECULATORS,
}
"""The cases made here, by the name of their folder."""


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name without ``.weight`` (or ``.bias``) -> shape of every weight, in its maker's layout."""
    c, names = text_config(config), module_names(config)
    kind, hidden, heads = family(c), c["hidden_size"], c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"]
    head_dim = c.get("head_dim") or hidden // heads
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }

    def attention(**rows_and_columns: tuple[int, int]) -> None:
        block.update(
            {f"self_attn.{name}.weight": shape for name, shape in rows_and_columns.items()}
        )

    def swiglu(name: str, inner: int) -> None:
        block[f"{name}.gate_proj.weight"] = block[f"{name}.up_proj.weight"] = (inner, hidden)
        block[f"{name}.down_proj.weight"] = (hidden, inner)

    if "kv_lora_rank" in c:
        rank, nope, rotary = c["kv_lora_rank"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        values = c["v_head_dim"]
        q_rows, q_rank = heads * (nope + rotary), c["q_lora_rank"]
        if q_rank is None:
            attention(q_proj=(q_rows, hidden))
        else:
            attention(q_a_proj=(q_rank, hidden), q_b_proj=(q_rows, q_rank))
            block["self_attn.q_a_layernorm.weight"] = (q_rank,)
        block["self_attn.kv_a_layernorm.weight"] = (rank,)
        attention(
            kv_a_proj_with_mqa=(rank + rotary, hidden),
            kv_b_proj=(heads * (nope + values), rank),
            o_proj=(hidden, heads * values),
        )
    else:
        q_rows = heads * head_dim * (2 if kind in ("qwen3_next", "qwen3_5") else 1)
        kv_rows = kv_heads * head_dim
        attention(
            q_proj=(q_rows, hidden),
            k_proj=(kv_rows, hidden),
            v_proj=(kv_rows, hidden),
            o_proj=(hidden, heads * head_dim),
        )
        if kind in ("qwen3", "qwen3_next", "qwen3_5") or c.get("use_qk_norm"):
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (head_dim,)
        if c.get("attention_bias"):
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                block[f"self_attn.{name}.bias"] = (rows,)

    experts = c.get("num_experts") or c.get("n_routed_experts")
    if not experts or c.get("first_k_dense_replace", 0) > LAYERS:
        swiglu("mlp", c["intermediate_size"])
    else:
        inner = c["moe_intermediate_size"]
        block["mlp.gate.weight"] = (experts, hidden)
        if "num_experts" in c:
            block["mlp.shared_expert_gate.weight"] = (1, hidden)
            swiglu("mlp.shared_expert", c["shared_expert_intermediate_size"])
        else:
            block["mlp.gate.e_score_correction_bias"] = (experts,)
            swiglu("mlp.shared_experts", inner * c["n_shared_experts"])
        if kind == "qwen3_5" and "quantization_config" not in config:
            block["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
            block["mlp.experts.down_proj"] = (experts, hidden, inner)
        else:
            for n in range(experts):
                swiglu(f"mlp.experts.{n}", inner)

    shapes = {names["block"] + name: shape for name, shape in block.items()}
    shapes |= {f"{names[name]}.weight": (hidden,) for name in ("token", "hidden", "norm")}
    shapes[f"{names['proj']}.weight"] = (hidden, 2 * hidden)
    if names["proj"].endswith("eh_proj"):  # these makers repeat the target's embedding and head
        for name in ("embed_tokens", "shared_head.head"):
            shapes[f"{names['block']}{name}.weight"] = (VOCAB, hidden)
    return shapes


def draw(name: str, shape: tuple[int, ...], zero_centred: bool = False) -> Tensor:
    """One drawn weight, float32: norms around 1 (or 0), matrices that keep activations O(1)."""
    noise = generator(SEED, name, *shape).standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        return torch.from_numpy((0.2 * noise).astype(np.float32))
    if name.endswith(".bias"):
        return torch.from_numpy(short_floats(0.5 * noise))
    if len(shape) == 1:
        return torch.from_numpy(short_floats(0.3 * noise + (0.0 if zero_centred else 1.0)))
    # Sharper scores than at initialisation, so that RoPE and the choice of experts matter.
    gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight", "mlp.gate.weight")) else 1.0
    return torch.from_numpy(short_floats(gain * noise / np.sqrt(shape[-1])))


def embedding(hidden: int) -> Tensor:
    """[V, H]: rows as small as real ones, so that the eps of their norm shows."""
    noise = generator(SEED, "embed", VOCAB, hidden).standard_normal((VOCAB, hidden))
    return torch.from_numpy(short_floats(0.05 * noise))


def head(hidden: int) -> Tensor:
    """[V, H]: the target's head."""
    return draw("head", (VOCAB, hidden))


def inputs(hidden: int) -> Tensors:
    """What every case of a hidden size is given: tokens [L + 3], hidden [L, H], embed, head."""
    tokens = generator(SEED, "tokens", LENGTH).integers(0, VOCAB, size=LENGTH + STEPS)
    noise = generator(SEED, "hidden", LENGTH, hidden).standard_normal((LENGTH, hidden))
    return {
        "tokens": torch.from_numpy(tokens),
        f"{hidden}/hidden": torch.from_numpy(short_floats(noise)),
        f"{hidden}/embed": embedding(hidden),
        f"{hidden}/head": head(hidden),
    }


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] as E4M3 and a float32 scale for each 128 x 128 block."""
    rows, columns = (-(-n // FP8_BLOCK) for n in weight.shape)
    short = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (
                slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK),
                slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK),
            )
            # Larger than need be, so that neighbouring blocks differ much.
            wanted = float(weight[block].abs().max()) / 448 * (1 + i + 3 * j)
            mantissa, exponent = np.frexp(wanted)
            scales[i, j] = float(np.ldexp(np.ceil(mantissa * 16), exponent - 4))
            short[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return short, scales


def checkpoint(config: Config) -> Tensors:
    """The tensors of a case, as its file holds them."""
    c = text_config(config)
    zero_centred = family(c) in ("qwen3_next", "qwen3_5")
    fp8 = config.get("quantization_config")
    stored = torch.float16 if config.get("dtype") == "float16" else torch.bfloat16
    tensors: Tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("embed_tokens.weight"):
            tensor = embedding(shape[1])
        elif name.endswith("shared_head.head.weight"):
            tensor = head(shape[1])
        else:
            tensor = draw(name, shape, zero_centred)
        if fp8 and name.endswith("_proj.weight") and "eh_proj" not in name:
            tensors[name], scales = to_fp8(tensor)
            # DeepSeek's scales are float32, Qwen's bfloat16.
            tensors[f"{name}_scale_inv"] = scales.bfloat16() if zero_centred else scales
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = tensor
        else:
            tensors[name] = tensor.to(stored)
            if not torch.equal(tensors[name].float(), tensor):
                raise ValueError(f"{name} is not exact in {stored}")
    return tensors
