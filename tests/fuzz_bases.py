"""What the fuzz mutates: a head in every spelling, and converted ones."""

import itertools
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from block_dialects import BLOCK_VARIANTS
from dialects import EAGLE4, LAYERS, VARIANTS
from hydra_heads import ARCHITECTURES as HYDRA_KINDS
from hydra_heads import BASE as HYDRA_BASE
from hydra_heads import write_hydra
from medusa_heads import CONFIGS as MEDUSA_SPELLINGS
from medusa_heads import medusa, write_medusa
from mlx_drift.convert import convert_drafter
from mlx_drift.convert.read.source import read_checkpoint
from mlx_drift.target.model import TargetShape
from mtp_heads import FAMILIES, config_of, head, write_repository, written
from tiny import HIDDEN, VOCAB

MTP = "mtp "  # what the names of heads begin with that `mtp=True` takes out of their files
SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
TARGET = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "</s>"}]}


Config = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Stored]


@cache
def bases() -> dict[str, tuple[Config, Tensors]]:
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, variant in (VARIANTS | BLOCK_VARIANTS | {"eagle4": EAGLE4}).items():
            variant.spell(variant.made, Path(root, name))
            found[name] = read_back(Path(root, name))
        for name in MEDUSA_SPELLINGS:
            write_medusa(medusa(), Path(root, f"medusa {name}"), name)
            found[f"medusa {name}"] = read_back(Path(root, f"medusa {name}"))
        for name in HYDRA_KINDS:
            write_hydra(name, Path(root, f"hydra {name}"), **HYDRA_BASE)
            found[f"hydra {name}"] = read_back(Path(root, f"hydra {name}"))
        heads = (
            "medusa vllm",
            "hydra mlp",
            "hydra prefix-mlp",
            "hydra eagle-attn",
            "eagle4",
            "specforge 3.1",
            "specforge with embedding",
            "modelopt no aux state",
            "eagle-1 bin",
            "p-eagle speculators",
            "dflash z-lab sliding",
            "dflash speculators",
            "dspark speculators",
            "dspark deepspec",
            "dspark modelopt",
        )
        for name, quantize in itertools.product(heads, (False, True)):
            out = Path(root, f"converted {name}{' -q' * quantize}")
            how = {"quantize": True, "q_group_size": 32} if quantize else {}
            convert_drafter(f"{root}/{name}", out, target=SHAPE, **how)
            found[out.name] = read_back(out)
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
        for name in FAMILIES:
            source, out = Path(root, MTP + name), Path(root, f"converted {MTP}{name}")
            tensors = written(name, head(name, **sizes), **sizes)
            write_repository(source, config_of(name, **sizes), tensors)
            how = {"quantize": True, "q_group_size": 32} if "moe" in name else {}
            convert_drafter(str(source), out, mtp=True, **how)
            found |= {folder.name: read_back(folder) for folder in (source, out)}
    return found


def read_back(folder: Path) -> tuple[Config, Tensors]:
    checkpoint = read_checkpoint(str(folder))
    return checkpoint.config, {
        name: Stored(stored.stored, stored.shape, np.array(stored.whole()).tobytes())
        for name, stored in checkpoint.tensors.items()
    }
