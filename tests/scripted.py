"""A checkpoint that says what a script has it say: calls of tools, reasoning.

A Llama of one layer that adds nothing: what follows a token depends on that token alone. A prompt
that ends in a cue is answered by the cue's script, whose pieces are tokens of its own.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import _byte_decoder

from mlx_drift.demo import TARGET

HIDDEN = 512
TEMPLATE = """\
{%- if tools %}<|system|>Tools: {{ tools | tojson }}
Answer <tool_call>{"name": tool_call.name, "arguments": ...}</tool_call>{{ eos_token }}{% endif -%}
{%- for message in messages -%}
{{ '<|' + message.role + '|>' if message.role != 'tool' else '<|user|>result: ' }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
</tool_call>
{%- endfor -%}
{%- if not loop.last %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and open_thinking and enable_thinking %}<think>{% endif -%}
"""


def scripted_checkpoint(folder: Path, scripts: dict[str, str], parser: str | None = None) -> Path:
    """Writes a checkpoint.

    Args:
        folder: Where.
        scripts: What follows each cue, which is a token from then on.
        parser: mlx-lm's parser of calls, if not the one that the template tells of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TARGET / "tokenizer_config.json", folder)
    tokenizer = json.loads((TARGET / "tokenizer.json").read_text())
    known = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = {**tokenizer["model"]["vocab"]}
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def token(content: str) -> int:
        if content not in known:
            assert content not in tokenizer["model"]["vocab"], content
            known.add(content)
            vocabulary[content] = len(vocabulary)
            tokenizer["added_tokens"].append(
                tokenizer["added_tokens"][0]
                | {"id": vocabulary[content], "content": content, "special": False}
            )
        return vocabulary[content]

    follows: dict[int, int] = {}
    for marker in ("<think>", "</think>", *scripts):
        token(marker)
    for cue, script in scripts.items():
        last = token(cue)
        for piece in pieces(script, vocabulary):
            follows[last] = last = token(piece)
        follows[last] = vocabulary["<|eot|>"]

    size = len(vocabulary)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(size, HIDDEN)).astype(np.float32)
    embedding[: vocabulary["<think>"], 0] += 2 * HIDDEN**0.5  # what has no script ends the answer
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.zeros_like(embedding)
    head[vocabulary["<|eot|>"], 0] = 1
    for before, after in follows.items():
        head[after] += embedding[before]
    zeros = {
        f"model.layers.0.{name}.weight": np.zeros(shape, np.float32)
        for name, shape in {
            "self_attn.q_proj": (16, HIDDEN),
            "self_attn.k_proj": (16, HIDDEN),
            "self_attn.v_proj": (16, HIDDEN),
            "self_attn.o_proj": (HIDDEN, 16),
            "mlp.gate_proj": (32, HIDDEN),
            "mlp.up_proj": (32, HIDDEN),
            "mlp.down_proj": (HIDDEN, 32),
        }.items()
    }
    ones = {
        f"model.{name}.weight": np.ones(HIDDEN, np.float32)
        for name in (
            "norm",
            "layers.0.input_layernorm",
            "layers.0.post_attention_layernorm",
        )
    }
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head} | zeros | ones
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: mx.array(w) for name, w in weights.items()}
    )
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": size,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1 << 18,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    if parser is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tool_parser_type": parser}))
    return folder


def pieces(script: str, taken: dict[str, int]) -> list[str]:
    """Cuts a script into tokens that no other script has, nor the tokenizer: 5 bytes and more."""
    letter = {byte: char for char, byte in _byte_decoder().items()}
    left = "".join(letter.get(byte, chr(byte)) for byte in script.encode())
    cut: list[str] = []
    while left:
        size = next(
            (n for n in range(5, len(left) + 1) if left[:n] not in taken and left[:n] not in cut),
            len(left),
        )
        if len(left) - size < 5:
            size = len(left)
        piece, left = left[:size], left[size:]
        while piece in taken or piece in cut:
            piece = cut.pop() + piece
        cut.append(piece)
    return cut
