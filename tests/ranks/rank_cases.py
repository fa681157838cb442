"""Answers of tiny targets with every kind of drafter: of one process, or of several ranks.

As a program (`python rank_cases.py OUT pipeline|shard FAMILY …`) it is one of the ranks.
"""

import json
import sys
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import families
from mlx_drift.drafters.block import block_keys
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.load import build_drafter, build_network
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.generate import stream_generate
from mlx_drift.ranks.cut import shard, spread
from mlx_drift.ranks.world import world
from mlx_drift.target.model import Target
from tiny import NoText, tiny_drafter

FAMILIES = ["llama", "qwen3", "qwen3_moe", "gpt_oss"]
DRAFTERS = ["eagle3.1", "mtp", "draft model"]
WAYS = [(k, temp) for k in (1, 3) for temp in (0.0, 0.8)]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
TOKENS = 32


def mtp_head(model: nn.Module) -> Drafter:
    """A random MTP head with a block of Qwen3's."""
    shape = Target(model).shape
    values = {
        "format_version": 1,
        "drafter_type": "mtp",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "taps": [shape.num_layers + 1],
        "feedback": "post",
        "hidden_size": shape.hidden_size,
        "target": vars(shape),
        "block": block_keys("qwen3", families.BASE, False),
    }
    config = config_from_dict(values)
    mx.random.seed(7)
    network = build_network(config, Path("x"))
    network.apply(lambda x: x if x.ndim == 1 else 0.3 * mx.random.normal(x.shape))
    mx.eval(network.parameters())
    return build_drafter(config, network, Target(model, config.taps), None)


def spoilt(family: str) -> nn.Module:
    """The target itself with a little noise: often right, and not always."""
    model = families.build(family)
    mx.random.seed(11)
    model.apply(lambda x: x + 0.02 * mx.random.normal(x.shape))
    mx.eval(model.parameters())
    return model


def drafter_of(kind: str, family: str, model: nn.Module) -> Drafter:
    if kind == "draft model":
        return DraftModelDrafter(spoilt(family), model)
    return mtp_head(model) if kind == "mtp" else tiny_drafter(model)


def answers(family: str, model: nn.Module) -> dict[str, list[int]]:
    """The tokens of every case, by its name; `accepted` counts the drafts that were."""
    told: dict[str, list[int]] = {}
    for kind, (k, temp) in product(DRAFTERS, WAYS):
        responses = stream_generate(
            model,
            NoText(),
            PROMPT,
            TOKENS,
            drafter=drafter_of(kind, family, model),
            num_draft_tokens=k,
            temp=temp,
            seed=5,
            prefill_step_size=5,
        )
        told[f"{kind} K={k} temp={temp}"] = [response.token for response in responses]
    return told


def taps(model: nn.Module) -> mx.array:
    """What every tap captures of the prompt, `[M, layers + 2, hidden_size]`."""
    count = Target(model).shape.num_layers
    target = Target(model, range(count + 2))
    logits, captured = target.verify(mx.array(PROMPT), target.make_cache())
    mx.eval(logits, captured)
    return captured


def main(out: str, way: str, *names: str) -> None:
    ranks = world()
    told, captured = {}, {}
    for family in names:
        model = families.build(family)
        if way == "shard":
            shard(model, ranks)
        else:
            spread(model, ranks)
        told[family] = answers(family, model)
        captured[family] = taps(model)
    ranks.finish()
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(told))
        mx.save_safetensors(f"{out}.taps.safetensors", captured)


if __name__ == "__main__":
    main(*sys.argv[1:])
