"""How the fuzz mutates what a checkpoint's files say, and with what."""

import math
import random
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from fuzz_bases import Config, Stored, Tensors
from mlx_drift.convert.read.stored import DTYPES, itemsize
from mlx_drift.convert.rope import KINDS
from torch_files import Global, tensor

Random = random.Random


@dataclass(frozen=True)
class Odd:
    """What stands in a file's place: a `fifo`, a `folder`, or a `link` to a path."""

    kind: str
    link: str = ""


KEYS = """
    architectures attention_factor block_size draft_vocab_size drafter_type eagle_config
    eagle_aux_hidden_state_layer_ids fc fc_bias fc_norm feedback format_version
    full_attention_layers head_dim hidden_act hidden_norm hidden_size layer_types
    max_position_embeddings model_type norm_before_fc norm_before_residual norm_output
    num_attention_heads num_key_value_heads num_layers own_embedding own_head parallel_draft_step
    partial_rotary_factor provenance qk_norm quantization return_hidden_post_norm rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_attention sliding_window source
    speculators_config speculators_model_type taps target target_hidden_size
    target_num_hidden_layers text_config transformer_layer_config use_aux_hidden_state
    use_sliding_window block hidden_first kv_lora_rank mlx_lm_extra_tensors mtp_file mtp_feedback
    n_routed_experts num_experts num_experts_per_tok moe_intermediate_size num_hidden_layers
    qk_nope_head_dim v_head_dim vocab_size weight_map __metadata__ dtype shape data_offsets model
    added_tokens rope_type type factor repo path sha256 \ud800 \x1b[31m
    num_heads num_blocks num_candidates candidate_rank input_norm hydra_num_heads hydra_head_arch
    hidden_state_offset efficient_lm_head_config rank markov confidence slots mask_token_id
    causal_layers window_rule markov_rank max_drafts block_bias candidate_rank dflash_config
    is_causal causal sliding_window_non_causal sample_from_anchor shift_label projector_type
    markov_head_type ptd_token_id parallel_drafting num_target_layers medusa medusa_num_heads
    logit_scale original_lm_head attention_sink_bias input_embedding_scale grounded_heads
""".split()
NAMES = """
    d2t t2d fc.bias fc.weight input_norm.weight embed_tokens.weight lm_head.weight norm.weight
    lm_head.bias layers.1.mlp.up_proj.weight midlayer.mlp.up_proj.weight model.norm.weight
    layers.0.hidden_norm.weight layers.0.self_attn.q_norm.weight layers.0.self_attn.q_proj.bias
    fc_norm.1.weight fc_norm.9.weight midlayer.1.norm.weight mtp.x layers layers. layers.x.y
    mtp.layers.0.mlp.experts.0.up_proj.weight mtp.layers.0.mlp.experts.gate_up_proj
    model.layers.12.self_attn.kv_b_proj.weight model.layers.12.eh_proj.weight_scale_inv
    model.mtp_layers.1.fc.weight mtp.layers.0.self_attn.q_norm.weight mtp.fc.scales mtp.norm.weight
    layers.0.mlp.up_proj.scales verifier_norm.weight rotary_emb.inv_freq [/] \x1b[31m \ud800
    heads.0.linear.weight heads.0.residual.weight hydra_mlp.0.2.linear.bias hydra_lm_head.3.bias
    hydra_mlp.0.0.res_connection.weight attn.self_attn.q_proj.weight candidate_up.weight
    prefix_embeding_layer.norm.weight efficient_lm_head.weight efficient_lm_head_down_proj.weight
    mask_hidden context_norm.weight markov_head.markov_w1.weight markov_head.gate_proj.weight
    markov.joint.weight markov.w2.weight confidence.weight confidence_head.proj.bias token_map
    heads.0.blocks.2.weight heads.7.lm_head.weight lm_heads.1.weight medusa_heads.1.0.linear.bias
""".split()
RAW = {  # JSON that json.dumps does not write, by a string that stands for it
    "@nested": "[" * 300 + "]" * 300,
    "@nested objects": '{"a":' * 200 + "1" + "}" * 200,
    "@nested far": "[" * 100_000 + "]" * 100_000,
    "@many lists": "[" + ",".join(["[]"] * 10**5) + "]",
    "@many keys": "{" + ",".join(f'"k{i}":{i}' for i in range(10**4)) + "}",
    "@10**4299": "1" + "0" * 4299,
    "@10**5000": "1" + "0" * 5000,
    "@1e999": "1e999",
}
NUMBERS = [0, -1, 1, 2, 3, 5, 8, 31, 33, 64, 10_001, 2**24, 2**31, 2**53, 2**63, -(2**63), 10**400]
FLOATS = [0.5, -0.0, 1e-320, 1e18, 1e308, math.nan, math.inf, -math.inf]
STRINGS = ["", "x", "32", "\0\x1b[31m\n", "\u2028\ud800", "[/]", "..", "/etc/passwd", "x" * 10**5]
PLAIN = [None, True, False, *NUMBERS, *STRINGS, [], {}]
EVIL = [
    *(*PLAIN, *FLOATS, *RAW, "full_attention", {"a": 1}, list(range(3000))),
    *([None], [1, 2, 3], [[1, 2], [3]], [0.5], ["x"], ["sliding_attention"]),
]
PICKLED = [*PLAIN, (), (1,), (2, 3), Global("os", "system"), Global("torch", "Size"), tensor()]
SHARDS = [*EVIL, "../model.safetensors", "./model.safetensors", "/etc/hosts", "model-9.safetensors"]
ODD = [
    *(Odd("fifo"), Odd("folder"), Odd("link", "../outside"), Odd("link", "../pipe")),
    *(Odd("link", "config.json"), Odd("link", "missing"), Odd("link", "/dev/zero")),
]


def mutated(tree: Any, rng: Random, evil: list[Any]) -> Any:
    """Replaces, leaves out, doubles, renames, swaps or adds a node of a tree, seldom its root."""
    how = rng.randrange(20)
    if isinstance(tree, dict) and tree and how:
        key, other = rng.choices(list(tree), k=2)
        if how == 1:
            return {k: value for k, value in tree.items() if k != key}
        if how == 2:
            return tree | {key: tree[other]}
        if how == 3:
            return {rng.choice(KEYS) if k == key else k: value for k, value in tree.items()}
        if how in (4, 5):
            return tree | {rng.choice(KEYS): rng.choice(evil)}
        return tree | {key: mutated(tree[key], rng, evil)}
    if isinstance(tree, list | tuple) and tree and how:
        items, i = list(tree), rng.randrange(len(tree))
        if how == 1:
            del items[i]
        elif how == 2:
            items[i] = rng.choice(items)
        elif how == 3:
            items.insert(i, rng.choice(items))
        else:
            items[i] = mutated(items[i], rng, evil)
        return type(tree)(items)
    if is_dataclass(tree) and how:
        name = rng.choice(fields(tree)).name
        return replace(tree, **{name: mutated(getattr(tree, name), rng, evil)})
    if type(tree) is int and how < 8:
        return rng.choice([tree + 1, tree - 1, -tree, 2 * tree, tree * 10**6])
    return rng.choice(evil)


def mutated_config(config: Any, rng: Random) -> Any:
    if not isinstance(config, dict) or rng.random() < 0.85:
        return mutated(config, rng, EVIL)
    kinds = {"full_attention": rope(rng), "sliding_attention": rope(rng)}
    return config | {
        "rope_scaling": rng.choice([None, rope(rng)]),
        "rope_parameters": rng.choice([None, rope(rng), kinds]),
    }


def rope(rng: Random) -> Config:
    """A RoPE scaling of some kind, most of its values of the right type."""
    lists = [[1.0] * 4, [2, 1, 1], [0.0] * 5]
    kind = rng.choice([*KINDS, "x"])
    scaling: Config = {rng.choice(["rope_type", "type"]): kind}
    for key in [*sorted(KINDS.get(kind, ())), "attention_factor", "truncate"]:
        if rng.random() < 0.8:
            likely = lists if key in ("short_factor", "long_factor", "mrope_section") else NUMBERS
            scaling[key] = rng.choice(likely if rng.random() < 0.8 else [*FLOATS, *lists, True])
    return mutated(scaling, rng, EVIL) if rng.random() < 0.3 else scaling


def mutated_tensors(tensors: Tensors, rng: Random) -> Tensors:
    """Drops, renames, doubles, retypes, reshapes, fills or replaces a tensor of a whole file."""
    name = rng.choice(list(tensors))
    one, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    as_wide = [dtype for dtype in DTYPES if itemsize(dtype) == itemsize(one.dtype)]
    dtype = rng.choice([*as_wide, *DTYPES, "F8_E8M0"])
    shapes = [(), one.shape[::-1], (*one.shape, 1), (0, *one.shape), (1,) * 32, (2**31 - 1, 0)]
    new_name = rng.choice([*NAMES, *tensors, f"model.{name}", f"layers.1.{name}"])
    return rng.choice(
        [
            rest,
            rest | {new_name: one},
            tensors | {new_name: one},
            tensors | {name: sized(dtype, one.shape, one.data)},
            tensors | {name: sized(one.dtype, rng.choice(shapes), one.data)},
            tensors | {name: replace(one, data=rng.randbytes(len(one.data)))},
            tensors | {name: rng.choice(list(tensors.values()))},
        ]
    )


def sized(dtype: str, shape: tuple[int, ...], data: bytes) -> Stored:
    """Repeats or cuts the data to what shape and dtype ask for."""
    size = math.prod(shape) * (itemsize(dtype) if dtype in DTYPES else 1)
    return Stored(dtype, shape, (data * (size // max(1, len(data)) + 1))[:size])


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Cuts, replaces, inserts, takes out or flips bytes, most of them where headers are."""
    at = min(rng.randrange(len(data) + 1), rng.randrange(2000))
    bits = [b"{", b"[", b'"', b"1e999,", b"\xff", b"\0", b"PK\3\4", b"\x80\2"]
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 5) if data else 0):
        flipped[rng.randrange(len(data)) if rng.random() < 0.5 else at - 1] = rng.randrange(256)
    return rng.choice(
        [
            *([bytes(flipped)] * 3),
            data[:at],
            data[:at] + rng.choice(bits) + data[at:],
            data[:at] + data[at + rng.randrange(1, 100) :],
            rng.randbytes(rng.choice([0, 1, 8, 100, 10_000])),
        ]
    )
