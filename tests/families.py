"""Tiny models of every mlx-lm model file, with random weights, for tests of exactness.

`FAMILIES` is read off mlx-lm's own folder. `CONFIGS` says how each is made small and `LEFT_OUT`
why one is not, so that a model file which a new mlx-lm brings is in `MISSING`; `REFUSED` holds what
mlx-drift says of those it refuses.
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

VOCAB = 64
WINDOW = 8
"""Sliding windows, attention chunks and sparse selections, in rows: every text outgrows them."""


def _families() -> list[str]:
    """Lists the files of mlx-lm that hold a model (the others are helpers), importing none."""
    sources = {path.stem: path.read_text() for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    model = re.compile(r"^(class|from \S+ import) Model\b", re.M)
    arguments = re.compile(r"^class ModelArgs\b", re.M)
    return sorted(n for n, text in sources.items() if model.search(text) and arguments.search(text))


FAMILIES = _families()


def _every(names: str, value: Any) -> Config:
    return dict.fromkeys(names.split(), value)


# One size under each name that the model files have for it: a family reads the keys it knows.
BASE: Config = {
    **_every("vocab_size num_vocab vocab_size_per_layer_input", VOCAB),
    **_every("hidden_size hidden_dim d_model model_dim n_embd block_dim", 64),
    **_every("num_hidden_layers num_layers n_layers n_layer num_transformer_layers", 4),
    **_every("intermediate_size ffn_hidden_size intermediate_size_mlp n_inner", 128),
    **_every("num_attention_heads num_heads n_heads n_head", 4),
    **_every("num_key_value_heads num_kv_heads n_kv_heads num_attention_groups", 2),
    **_every("head_dim hidden_size_per_head", 32),
    **_every("max_position_embeddings n_positions n_ctx block_size model_max_length", 4096),
    **_every("rms_norm_eps norm_eps norm_epsilon layer_norm_eps layer_norm_epsilon", 1e-5),
    **_every("layernorm_epsilon post_norm_eps", 1e-5),
    **_every("tie_word_embeddings attention_bias mlp_bias use_bias conv_bias", False),
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    **_every("sliding_window loop_window_size attention_chunk_size", WINDOW),
    **_every("attention_window_size sliding_window_size", WINDOW),
    # Experts.
    **_every("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_every("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts", 2),
    **_every("n_shared_experts num_shared_experts num_shared_expert", 1),
    **_every("moe_intermediate_size shared_expert_intermediate_size moe_hidden_size", 32),
    **_every("shared_intermediate_size expert_ffn_hidden_size share_expert_dim", 32),
    **_every("moe_shared_expert_intermediate_size", 32),
    **_every("n_group topk_group moe_layer_freq decoder_sparse_step", 1),
    **_every("first_k_dense_replace num_dense_layers moe_layer_start_index", 2),
    "mlp_only_layers": [0, 1],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # Latent attention, sparse attention.
    **_every("q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim", 32),
    "qk_rope_head_dim": 16,
    **_every("mla_scale_q_lora mla_scale_kv_lora use_qk_norm qk_norm", True),
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    # Recurrences and short convolutions.
    **_every("linear_num_key_heads linear_num_value_heads", 2),
    **_every("linear_key_head_dim linear_value_head_dim", 32),
    **_every("linear_conv_kernel_dim conv_kernel mamba_d_conv conv1d_width", 4),
    **_every("mamba_n_heads mamba_num_heads", 4),
    **_every("mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size", 16),
    **_every("mamba_n_groups n_groups mamba_expand", 2),
    **_every("mamba_conv_bias use_conv_bias", True),
    "mamba_proj_bias": False,
    "conv_L_cache": 3,
}

_KINDS = {
    "s": "sliding_attention",
    "f": "full_attention",
    "l": "linear_attention",
    "a": "attention",
    "m": "mamba",
    "c": "conv",
    "x": "conv_mixer",
}


def _layers(pattern: str) -> Config:
    """Spells a pattern such as `"ssfssf"` as a config's layer types."""
    kinds = [_KINDS[letter] for letter in pattern]
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


_SLIDING = _layers("ssfssf")
_SIX = {"num_hidden_layers": 6}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
_MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}
_KIMI = {
    **_SIX,
    "linear_attn_config": {
        "kda_layers": [1, 2, 4, 5],
        "num_heads": 2,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
}

CONFIGS: dict[str, Config] = {
    **{
        family: {}
        for family in """
        Klear bailing_moe bitnet cohere deepseek deepseek_v3 deepseek_v32 dots1 ernie4_5
        ernie4_5_moe gemma gemma2 glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode helium
        hunyuan_v1_dense internlm2 internlm3 iquestloopcoder lille-130m mimo mixtral nanochat olmo2
        olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss solar_open starcoder2 talkie
        telechat3 youtu_llm
        """.split()
    },
    "afm7": {"num_layers": 6, "num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 2.0},
    "afmoe": _SLIDING,
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_hybrid": {**_SIX, "layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_linear": {**_SIX, "layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_v3": {**_SIX, "layer_group_size": 3, "n_group": 2},
    "cohere2": {**_SIX, "sliding_window_pattern": 3, "head_dim": 16},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": {**_YARN, "type": "yarn"}},
    "deepseek_v41": {
        **_SIX,
        "compress_ratios": [0, 0, 4, 4, 4, 4],
        **_every("kv_source_layer_ids index_source_layer_ids", [2, 4]),
        "candidate_source_layer_id": 2,
        **_every("candidate_topk_blocks candidate_block_size o_groups hc_mult", 2),
        "o_lora_rank": 32,
        "index_topk": 4,
        "scoring_func": "sqrtsoftplus",
    },
    "exaone": {"head_dim": 16},
    "exaone4": {**_SIX, "sliding_window_pattern": "LLG"},
    "exaone_moe": {**_SLIDING, "is_moe_layer": [False, False, True, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gear": _layers("xsfxsf"),
    "gemma3_text": {**_SIX, "sliding_window_pattern": 3},
    # Like Gemma 4's small models: inputs per layer, and layers that reuse others' keys and values.
    "gemma4_text": {
        **_layers("ssfssfsf"),
        "num_kv_shared_layers": 2,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 32,
    },
    "glm_moe_dsa": {"rope_parameters": _ROPE},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"intermediate_size": 32},
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {**_GRANITE, **_layers("mmamma")},
    "hunyuan": {
        "use_cla": True,
        "cla_share_factor": 2,
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0},
    },
    "jamba": {
        **_SIX,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_k3": {
        **_KIMI,
        "attn_res_block_size": 2,
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": 32,
        "latent_moe_use_norm": True,
    },
    "kimi_linear": _KIMI,
    "laguna": _layers("fssfss"),
    "lfm2": {
        **_layers("ccfccf"),
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {**_layers("ccfccf"), "use_expert_bias": True},
    "llama": _SLIDING,
    "llama4_text": {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 0, 1]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {"time_step_rank": 32},
    "mamba2": {"time_step_rank": "auto", "time_step_limit": [0.001, 100.0]},
    "mellum": {
        **_layers("fssfss"),
        "rope_parameters": {"full_attention": _YARN, "sliding_attention": _ROPE},
    },
    "mimo_v2_flash": {
        **_SIX,
        "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1],
        "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_rope_theta": 1000.0,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "minicpm": _MINICPM,
    "minicpm3": {**_MINICPM, "rope_scaling": {"original_max_position_embeddings": 32}},
    "minimax": {"rotary_dim": 16},
    "ministral3": {**_SLIDING, "rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_glimmer": _SLIDING,
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2", "head_dim": 16},
    "nemotron-nas": {
        "num_hidden_layers": 5,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
        ],
    },
    "nemotron_h": {"hybrid_override_pattern": list("M*-EM*-E")},
    "olmo3": _SLIDING,
    "olmo_hybrid": {**_layers("llfllf"), "linear_allow_neg_eigval": True},
    "openelm": {
        "num_query_heads": [2, 4, 4, 4],
        "num_kv_heads": [1, 2, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 1.5, 2.0],
        "ffn_dim_divisor": 32,
    },
    "phixtral": {"rotary_dim": 16},
    "plamo": {"n_shared_head": 2},
    "plamo2": {},
    "plamo3": {**_SIX, "sliding_window_pattern": 3},
    "qwen": {"kv_channels": 16},
    "qwen3_next": {**_SIX, "full_attention_interval": 3},
    "recurrent_gemma": {
        **_SIX,
        "block_types": ["recurrent", "recurrent", "attention"],
        "logits_soft_cap": 30.0,
    },
    "rwkv7": _every("a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim", 64),
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "spark2_5": {
        **_SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        **_layers("fssfss"),
        "moe_layers_enum": "2,3,4,5",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
}


def _wrapped(text: str, **keys: Any) -> Config:
    """The config of a multimodal wrapper, which mlx-lm runs through its text model."""
    return {"text_config": {**BASE, "model_type": text, **CONFIGS.get(text, {}), **keys}}


CONFIGS |= {
    "gemma3": _wrapped("gemma3_text"),
    "gemma3n": _wrapped(
        "gemma3n_text",
        **_layers("ssfssfsf"),
        num_kv_shared_layers=2,
        rope_local_base_freq=1000.0,
        final_logit_softcapping=30.0,
        activation_sparsity_pattern=[0.9, 0.9, *[0.0] * 6],
        hidden_size_per_layer_input=32,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=32,
    ),
    # Like Gemma 4's large models: experts, and full attention whose values are its keys.
    "gemma4": _wrapped(
        "gemma4_text",
        **_SLIDING,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        enable_moe_block=True,
    ),
    "kimi_k25": _wrapped("deepseek_v3"),
    "kimi_vl": _wrapped("deepseek_v3"),
    "lfm2-vl": _wrapped("lfm2"),
    "llama4": _wrapped(
        "llama4_text",
        num_hidden_layers=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        floor_scale=16,
    ),
    "minimax_m3_vl": _wrapped(
        "minimax_m3_text",
        intermediate_size=32,
        dense_intermediate_size=128,
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
        layer_types=["full_attention", "sparse", "full_attention", "sparse"],
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "mistral3": _wrapped("ministral3"),
    "muse_spark": _wrapped(
        "muse_spark_text",
        **_SLIDING,
        rope_parameters=_ROPE,
        layer_rope_theta=[10000.0, 10000.0, 0.0] * 2,
        final_logit_softcapping=20.0,
        output_multiplier=1.0,
        num_shared_experts=0,
    ),
    "pixtral": _wrapped("llama"),
    "prism_hadamard_qwen35": {
        "text_config": {**BASE, **_SIX, "full_attention_interval": 3, "num_experts": 0}
        | {"hidden_size": 128, "intermediate_size": 512},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": "embed" in path, "dtype": "float16", "block": block}
            for path, block in (
                ("model.embed_tokens", 0),
                *((f"model.layers.{layer}.mlp.up_proj", 0) for layer in range(6)),
                *((f"model.layers.{layer}.mlp.down_proj", 512) for layer in range(6)),
            )
        ],
    },
    "qwen2_vl": _wrapped("qwen2"),
    "qwen3_5": _wrapped("qwen3_5_text", **_SIX, full_attention_interval=3, num_experts=0),
    "qwen3_5_moe": _wrapped("qwen3_5_moe_text", **_SIX, full_attention_interval=3),
    "qwen3_vl": _wrapped("qwen3"),
    "qwen3_vl_moe": _wrapped("qwen3_moe"),
}

LEFT_OUT: dict[str, str] = {
    "olmo": "needs the package ai2-olmo, and takes no more than one row (adds 'causal' to scores)",
    "phi3small": "not causal in mlx-lm: every row of a block sees the rows after it",
}
if not mx.metal.is_available():
    LEFT_OUT |= _every("bitnet muse_spark", "runs in Metal kernels only")

REFUSED: dict[str, str] = {
    "deepseek_v41": "keeps its state in LayerCache",
    "gemma3n": "does not hand a plain hidden state",  # four streams
    "iquestloopcoder": "does not hand a plain hidden state",  # its layers run twice
    "kimi_k3": "hands its recurrent layers a",
    "longcat_flash_ngram": "has no embedding and layers side by side",
    "nanbeige": "does not hand a plain hidden state",  # its layers run twice
    "nanochat": "has no final norm",
    "phixtral": "has no embedding and layers side by side",
    "plamo3": "cannot be verified exactly",
    "talkie": "has no final norm",
}
BUILT = [family for family in CONFIGS if family not in LEFT_OUT and family not in REFUSED]
MISSING = sorted({*FAMILIES} - {*CONFIGS} - {*LEFT_OUT})

SEEDS = {
    "bailing_moe": 1,
    "cohere": 12,
    "gemma3n": 1,
    "gptj": 2,
    "nanochat": 20,
    "phi": 5,
    "plamo2": 1,
    "rwkv7": 1,
    "talkie": 9,
}
"""Where the text of seed 3 settles into a loop."""


def build(family: str, dtype: mx.Dtype = mx.float32, bits: int | None = None) -> nn.Module:
    """Builds a family's tiny model, the same one each time.

    Args:
        family: A key of `CONFIGS` that is not in `LEFT_OUT`.
        dtype: What to cast the parameters to, but for those that mlx-lm leaves as they are.
        bits: Quantizes as `mlx_lm.convert` does, in groups of 32.
    """
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = copy.deepcopy({**BASE, "model_type": family, **CONFIGS[family]})
    mx.random.seed(SEEDS.get(family, 3))
    model = module.Model(module.ModelArgs.from_dict(config))
    _randomize(model)
    casts = getattr(model, "cast_predicate", lambda path: True)
    model.update(
        tree_map_with_path(
            lambda path, value: value.astype(dtype) if _is_float(value) and casts(path) else value,
            model.parameters(),
        )
    )
    if bits is not None:
        chosen = getattr(model, "quant_predicate", None) or (lambda path, part: True)

        def quantizes(path: str, part: nn.Module) -> bool | Config:
            fits = hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0
            return fits and chosen(path, part)

        nn.quantize(model, group_size=32, bits=bits, class_predicate=quantizes)
    mx.eval(model)
    return model.eval()


def _randomize(model: nn.Module) -> None:
    """Gives every parameter a value with which greedy text stays lively and nothing overflows.

    - Matrices have a gain of 2.5; embeddings of 1, or else tied ones repeat their own token.
    - Norms, decays, gates and biases stay near mlx-lm's own initial values.
    - Normed queries and keys are doubled: attention to all rows alike settles into one token.
    """
    tables = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def draw(path: str, value: mx.array) -> mx.array:
        if not _is_float(value):  # packed weights
            width = value.shape[-1] * value.dtype.size
            octets = mx.random.randint(0, 256, (*value.shape[:-1], width))
            return octets.astype(mx.uint8).view(value.dtype)
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
