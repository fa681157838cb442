"""A tiny target and head to adapt in no time; as a program, a run that may be killed.

    python adapting.py FOLDER OUT

adapts, telling each event as a line on stdout.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from mlx_drift.demo import TARGET
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.load import build_network
from mlx_drift.target.model import Target
from mlx_drift.train.adapt import adapt_drafter
from mlx_drift.train.answers import Asking
from mlx_drift.train.learner import Recipe
from tiny import tiny_drafter, tiny_llama

VOCABULARY, SPOKEN = 4096, 64
"""Tokens of the tokenizer, and those of them that the target ever says: enough to learn."""

RECIPE = {
    "iters": 24,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "steps": 2,
    "save_every": 3,
    "steps_per_report": 1,
    "steps_per_eval": 8,
    "patience": 0,
    "num_draft_tokens": 2,
}
SIZES = {
    "format_version": 1,
    "taps": [5],
    "hidden_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LAYER = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 500.0,
}
EAGLE3 = {"eagle3.1": {}, "eagle3": {"feedback": "pre", "fc_norm": False}}
BLOCK = LAYER | {"model_type": "llama", "hidden_size": 32, "rms_norm_eps": 1e-5}
KINDS = {
    "eagle": LAYER | {"drafter_type": "eagle", "num_layers": 1, "fc_bias": True},
    "p-eagle": LAYER
    | {"drafter_type": "p-eagle", "num_layers": 1, "taps": [1, 3], "mask_token_id": 1}
    | {"fc_norm": True, "norm_before_fc": False, "norm_before_residual": False}
    | {"draft_vocab_size": VOCABULARY, "own_head": False},
    "mtp": {
        "drafter_type": "mtp",
        "feedback": "post",
        "block": BLOCK | {"num_hidden_layers": 1, "vocab_size": VOCABULARY},
    },
}
ASKING = {"max_tokens": 24, "max_seq_length": 96}


def tiny_pair(**overrides):
    """A target that speaks the embedded tokenizer's language, and that tokenizer."""
    model = tiny_llama(vocab_size=VOCABULARY, **overrides)
    model.lm_head.weight[SPOKEN:] = 0
    mx.eval(model.parameters())
    return model, load_tokenizer(TARGET)


def write_tiny_head(folder: Path, model, kind: str = "eagle3.1") -> Path:
    """Writes a random head of a kind for it."""
    if kind in EAGLE3:
        drafter = tiny_drafter(model, draft_vocab_size=SPOKEN, own_head=True, **EAGLE3[kind])
        config, network = drafter.config, drafter.network
    else:
        config = config_from_dict(SIZES | KINDS[kind] | {"target": vars(Target(model).shape)})
        mx.random.seed(7)
        network = build_network(config, folder / "model.safetensors")
    folder.mkdir()
    weights = dict(tree_flatten(network.parameters()))
    if kind in EAGLE3:
        weights["d2t"] = mx.zeros(SPOKEN, mx.int64)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def write_data(folder: Path, count: int = 12) -> Path:
    """Writes questions."""
    file = folder / "questions.jsonl"
    lines = [json.dumps({"turns": [f"What is {n}?", "And then?"]}) for n in range(count)]
    file.write_text("\n".join(lines))
    return file


def adapt(folder: Path, out: Path, model, tokenizer, **keywords):
    """Adapts the head of a folder."""
    recipe = Recipe(**RECIPE | keywords.pop("recipe", {}))
    asking = Asking(**ASKING | keywords.pop("asking", {}))
    head, data = str(folder / "head"), str(folder / "questions.jsonl")
    given = {"drafter": head, "data": data, "recipe": recipe, "asking": asking}
    return adapt_drafter(model, tokenizer, mlx_path=out, **given | keywords)


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])

    def tell(kind, told):
        print(kind, told.get("iteration", ""), flush=True)

    adapt(folder, out, *tiny_pair(), tell=tell)
