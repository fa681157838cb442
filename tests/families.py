"""Tiny models of every mlx-lm model file, with random weights, for tests of exactness.

`FAMILIES` is computed from mlx-lm's own folder; `CONFIGS` says how each is made small, `LEFT_OUT`
why one is not, and a model file that a new mlx-lm brings is in `MISSING` until someone decides.
"""

import copy
import importlib
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map_with_path

Config = dict[str, Any]

WINDOW = 8
"""Sliding windows and attention chunks, in rows: every test text wraps them."""

VOCAB = 64


def _families() -> list[str]:
    """Lists the files of mlx-lm that hold a model (the others are helpers), importing none."""
    sources = {path.stem: path.read_text() for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    own, taken = r"^class Model\b", r"^from \S+ import .*\bModel\b"
    return sorted(
        family
        for family, text in sources.items()
        if re.search(r"^class ModelArgs\b", text, re.M) and re.search(f"{own}|{taken}", text, re.M)
    )


FAMILIES = _families()

# One size under every name the model files have for it. A family reads the keys that its
# `ModelArgs` knows; where it reads one that it must not, its own config says otherwise.
BASE: Config = {
    **dict.fromkeys("vocab_size num_vocab embedding_size".split(), VOCAB),
    **dict.fromkeys("hidden_size hidden_dim d_model model_dim n_embd".split(), 64),
    **dict.fromkeys("num_hidden_layers num_layers n_layers n_layer".split(), 4),
    **dict.fromkeys("intermediate_size ffn_hidden_size mlp_hidden_size n_inner".split(), 128),
    **dict.fromkeys("num_attention_heads num_heads n_heads n_head".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_kv_heads".split(), 2),
    "head_dim": 32,
    **dict.fromkeys("max_position_embeddings n_positions n_ctx block_size".split(), 4096),
    **dict.fromkeys("rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon".split(), 1e-5),
    **dict.fromkeys("norm_epsilon layernorm_epsilon".split(), 1e-5),
    "rope_theta": 10000.0,
    "rope_scaling": None,
    **dict.fromkeys("tie_word_embeddings attention_bias mlp_bias use_bias".split(), False),
    "sliding_window": WINDOW,
    # Experts.
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk".split(), 2),
    **dict.fromkeys("moe_k moe_top_k top_k_experts".split(), 2),
    **dict.fromkeys("n_shared_experts num_shared_experts num_shared_expert".split(), 1),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 32),
    **dict.fromkeys("shared_intermediate_size expert_ffn_hidden_size".split(), 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys("n_group topk_group moe_layer_freq decoder_sparse_step".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_dense_layers".split(), 2),
    "mlp_only_layers": [0, 1],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # Latent attention and its indexer.
    **dict.fromkeys("q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim".split(), 32),
    "qk_rope_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    # Gated delta nets.
    **dict.fromkeys("linear_num_key_heads linear_num_value_heads".split(), 2),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim".split(), 32),
    "linear_conv_kernel_dim": 4,
}

_HYBRID = {"num_hidden_layers": 6, "full_attention_interval": 3}
_GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}
_MLA_YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _layers(pattern: str, **names: str) -> Config:
    """Spells a pattern such as `"ssfssf"` as the layer types of a config."""
    kinds = {"s": "sliding_attention", "f": "full_attention", "l": "linear_attention"} | names
    return {
        "num_hidden_layers": len(pattern),
        "layer_types": [kinds[letter] for letter in pattern],
    }


def _wrapped(text: str, **differences: Any) -> Config:
    """A multimodal wrapper's config around that of its text model."""
    return {"text_config": BASE | CONFIGS[text] | {"model_type": text} | differences}


# What each family needs beyond `BASE`: its own keys, and layers of each of its kinds.
CONFIGS: dict[str, Config] = {
    **{
        name: {}
        for name in """
            Klear cohere deepseek ernie4_5 gemma gemma2 glm gpt_bigcode gpt2
            hunyuan_v1_dense internlm2 internlm3 mimo mixtral nanochat olmo olmo2 olmoe phi phi3
            phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss starcoder2 talkie telechat3
            youtu_llm deepseek_v3 deepseek_v32 bitnet helium dots1 
        """.split()
    },
    "afm7": {"num_layers": 6, "num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 1.5},
    "afmoe": _layers("ssfssf"),
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"num_hidden_layers": 4, "sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_hybrid": {"num_hidden_layers": 6, "layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe": {"topk_group": 1},
    "bailing_moe_linear": {"num_hidden_layers": 6, "layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_v3": {"num_hidden_layers": 6, "layer_group_size": 3, "n_group": 2},
    "cohere2": {"head_dim": 16, "num_hidden_layers": 6, "sliding_window_pattern": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": _MLA_YARN},
    "deepseek_v41": {
        "num_hidden_layers": 6,
        "compress_ratios": (0, 0, 4, 4, 4, 4),
        "kv_source_layer_ids": (2, 4),
        "index_source_layer_ids": (2, 4),
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_topk": 4,
        "o_groups": 2,
        "o_lora_rank": 32,
        "hc_mult": 2,
        "scoring_func": "sqrtsoftplus",
    },
    "ernie4_5_moe": {"moe_layer_start_index": 2},
    "exaone": {"head_dim": 16},
    "exaone4": {"num_hidden_layers": 6, "sliding_window_pattern": "LLG"},
    "exaone_moe": {**_layers("ssfssf"), "is_moe_layer": [False, False, True, True, True, True]},
    "falcon_h1": {
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
    },
    "gear": _layers("csfcsf", c="conv_mixer"),
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window_pattern": 3},
    "gemma3n": {
        "text_config": BASE
        | _layers("ssfssfsf")
        | {
            "model_type": "gemma3n_text",
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "rope_local_base_freq": 1000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.9, 0.9, *[0.0] * 6],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
        }
    },
    # As the small ones: inputs per layer, keys and values shared by the last layers.
    "gemma4_text": {
        **_layers("ssfssfsf"),
        "num_kv_shared_layers": 2,
        "global_head_dim": 64,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"partial_rotary_factor": 0.5, "use_qk_norm": True},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"rope_parameters": _DEFAULT_ROPE},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"intermediate_size": 32},
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,
        **_layers("mmamma", m="mamba", a="attention"),
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 2,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0},
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": {
        "num_hidden_layers": 6,
        "attn_layer_offset": 2,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k3": {
        "num_hidden_layers": 6,
        "linear_attn_config": {
            "kda_layers": [1, 2, 4, 5],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "attn_res_block_size": 2,
        "mla_use_output_gate": True,
    },
    "kimi_linear": {
        "num_hidden_layers": 6,
        "linear_attn_config": {
            "kda_layers": [1, 2, 4, 5],
            "num_heads": 2,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 4096,
    },
    "laguna": _layers("fssfss"),
    "lfm2": {
        **_layers("ccfccf", c="conv"),
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {
        **_layers("ccfccf", c="conv"),
        "conv_bias": False,
        "conv_L_cache": 3,
        "use_expert_bias": True,
    },
    "lille-130m": {},
    "llama": _layers("ssfssf"),
    "llama4": {
        "text_config": BASE
        | {
            "model_type": "llama4_text",
            "num_hidden_layers": 8,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "use_qk_norm": True,
            "num_experts_per_tok": 1,
            "floor_scale": 16,
        }
    },
    "llama4_text": {
        "num_hidden_layers": 5,
        "intermediate_size_mlp": 128,
        "no_rope_layers": [1, 0, 1, 0, 1],
        "use_qk_norm": True,
    },
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
        "ngram_vocab_size_ratio": 2,
    },
    "mamba": {
        "state_size": 16,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_rank": 32,
    },
    "mamba2": {
        "intermediate_size": 128,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": "auto",
    },
    "mellum": {
        **_layers("fssfss"),
        "rope_parameters": {
            "full_attention": _YARN,
            "sliding_attention": _DEFAULT_ROPE,
        },
    },
    "mimo_v2_flash": {
        "num_hidden_layers": 6,
        "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1],
        "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 32},
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
    },
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": {
        "text_config": BASE
        | {
            "dense_intermediate_size": 128,
            "intermediate_size": 32,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "full_attention", "sparse", "sparse"],
            "index_block_size": 4,
            "index_topk_blocks": 3,
        }
    },
    "ministral3": {**_layers("ssfssf"), "rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_glimmer": _layers("sssfssf"),
    "muse_spark": {
        "text_config": BASE
        | _layers("sssfssf")
        | {
            "post_norm_eps": 1e-5,
            "rope_parameters": _DEFAULT_ROPE,
            "layer_rope_theta": [10000.0, 10000.0, 10000.0, 0.0, 10000.0, 10000.0, 0.0],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2", "head_dim": 16},
    "nemotron-nas": {
        "num_hidden_layers": 5,
        "block_configs": [
            {"attention": attention, "ffn": ffn}
            for attention, ffn in (
                ({"n_heads_in_group": 2}, {"ffn_mult": 1.5}),
                ({"no_op": True}, {"ffn_mult": 1.5}),
                ({"n_heads_in_group": 4}, {"no_op": True}),
                ({"replace_with_linear": True}, {"replace_with_linear": True}),
                ({"n_heads_in_group": 2}, {"ffn_mult": 1.5}),
            )
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": list("M*-M*EME"),
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_conv_bias": True,
    },
    "olmo3": _layers("ssfssf"),
    "olmo_hybrid": {**_layers("llfllf"), "linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": 4,
        "ffn_dim_divisor": 32,
        "num_query_heads": [2, 4, 4, 4],
        "num_kv_heads": [1, 2, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 1.5, 2.0],
    },
    "phixtral": {"rotary_dim": 16},
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "num_hidden_layers": 4,
        "hidden_size_per_head": 32,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
    },
    "plamo3": {"num_hidden_layers": 6, "sliding_window_pattern": 3},
    "qwen": {"kv_channels": 16},
    "qwen3_next": {**_HYBRID, "partial_rotary_factor": 0.5},
    "recurrent_gemma": {
        "num_hidden_layers": 6,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 64,
        "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "solar_open": {"partial_rotary_factor": 0.5},
    "spark2_5": {
        **_layers("ssfssf"),
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _DEFAULT_ROPE),
    },
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "step3p5": {
        **_layers("fssfss"),
        "num_attention_groups": 2,
        "moe_layers_enum": "2,3,4,5",
        "share_expert_dim": 32,
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
}
CONFIGS |= {
    "gemma3": _wrapped("gemma3_text") | {"vocab_size": VOCAB},
    # As the large ones: experts, and full attention whose values are its keys.
    "gemma4": {
        "vocab_size": VOCAB,
        "text_config": BASE
        | _layers("ssfssf")
        | {
            "model_type": "gemma4_text",
            "num_kv_shared_layers": 0,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
        },
    },
    "kimi_k25": _wrapped("deepseek_v3"),
    "kimi_vl": _wrapped("deepseek_v3"),
    "lfm2-vl": _wrapped("lfm2"),
    "mistral3": _wrapped("ministral3"),
    "pixtral": _wrapped("llama"),
    "qwen2_vl": _wrapped("qwen2"),
    "qwen3_vl": _wrapped("qwen3"),
    "qwen3_vl_moe": _wrapped("qwen3_moe"),
    "qwen3_5": {"text_config": BASE | _HYBRID | {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": BASE | _HYBRID},
    "prism_hadamard_qwen35": {
        "text_config": BASE
        | _HYBRID
        | {"hidden_size": 128, "intermediate_size": 512, "num_experts": 0},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": embedding, "dtype": "float16", "block": block}
            for path, embedding, block in (
                ("model.embed_tokens", True, 0),
                *((f"model.layers.{i}.mlp.down_proj", False, 512) for i in range(6)),
                *((f"model.layers.{i}.mlp.up_proj", False, 0) for i in range(6)),
            )
        ],
    },
}

LEFT_OUT: dict[str, str] = {
    "olmo": "needs the package ai2-olmo, and takes no more than one row (adds 'causal' to scores)",
    "phi3small": "not causal in mlx-lm: a row of a block sees the rows after it",
}
"""Model files that are not built, with the reason."""
if not mx.metal.is_available():
    LEFT_OUT |= dict.fromkeys(("bitnet", "muse_spark"), "runs in Metal kernels only")

SEEDS: dict[str, int] = {}

MISSING = sorted(set(FAMILIES) - CONFIGS.keys() - LEFT_OUT.keys())


def build(family: str, dtype: mx.Dtype = mx.float32, bits: int | None = None) -> nn.Module:
    """Builds a family's tiny model, the same one each time.

    Args:
        family: A key of `CONFIGS`.
        dtype: What to cast the parameters to, but for those that mlx-lm leaves as they are.
        bits: Quantizes as `mlx_lm.convert` does, in groups of 32.
    """
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = BASE | {"model_type": family} | CONFIGS[family]
    mx.random.seed(SEEDS.get(family, 3))
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    _randomize(model)
    casts = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if _is_float(value) and casts(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    if bits is not None:
        chosen = getattr(model, "quant_predicate", None) or (lambda path, part: True)
        nn.quantize(
            model,
            group_size=32,
            bits=bits,
            class_predicate=lambda path, part: (
                hasattr(part, "to_quantized")
                and part.weight.shape[-1] % 32 == 0
                and chosen(path, part)
            ),
        )
    mx.eval(model)
    return model.eval()


def _randomize(model: nn.Module) -> None:
    """Gives every parameter a value with which greedy text stays lively and nothing overflows.

    Matrices get a gain of 2.5, embeddings one of 1 (tied ones else repeat their own token), and
    all else (norms, biases, decays, gates) a nudge off mlx-lm's initial value. Normed queries and
    keys are doubled: attention to everything alike settles into one token.
    """
    tables = {
        f"{path}.weight" for path, part in model.named_modules() if isinstance(part, nn.Embedding)
    }

    def draw(path: str, value: mx.array) -> mx.array:
        if not _is_float(value):  # packed weights
            bytes_ = (*value.shape[:-1], value.shape[-1] * value.dtype.size)
            return mx.random.randint(0, 256, bytes_).astype(mx.uint8).view(value.dtype)
        noise = mx.random.normal(value.shape)
        if value.ndim > 1 and path.endswith(_MATRICES) and "norm" not in path:
            fan_in = next(size for size in reversed(value.shape) if size > 1)
            return noise * ((1.0 if path in tables else 2.5) / math.sqrt(fan_in))
        if value.ndim == 0 or path.endswith("signs"):
            return value
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            value = 2 * value
        return value + (0.1 if path.endswith("bias") else 0.5) * noise

    model.update(tree_map_with_path(draw, model.parameters()))


_MATRICES = ("weight", "fn", "lm_head", "conv_k", "conv_v")


def _is_float(value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating)
