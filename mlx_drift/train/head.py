"""Loads a head to be trained: its very checkpoint in float32, neither folded nor packed."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import check_target
from mlx_drift.drafters.eagle4 import Eagle4Drafter
from mlx_drift.drafters.load import WEIGHTS, build_drafter, target_ids
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.train.head_file import read_head
from mlx_drift.train.low_rank import add_low_rank

TRAINED = "EAGLE-1/2, EAGLE-3, EAGLE-3.1, P-EAGLE and MTP heads are trained here"


def load_trainable(folder: Path, model: nn.Module, *, rank: int = 0, seed: int = 0) -> ChainDrafter:
    """Loads a converted head so that it can be trained.

    A quantized one is trained from its dequantized values. Its embedding stays frozen, as it does
    in EAGLE-3's own training (SafeAILab/EAGLE `traineagle3/cnets.py`); all else is trained.

    Args:
        folder: A folder that `convert_drafter` wrote.
        model: The target, as `mlx_lm.load` returns it.
        rank: Train low-rank factors of its linear layers, of this rank, and nothing else; 0 for
            the whole head.
        seed: Of the factors.

    Raises:
        DriftError: If the head is missing, damaged, made for another target, or of a kind that
            drafts no chain.
    """
    head = read_head(folder)
    config, network = head.config, head.network
    target = Target(model, config.taps)
    check_target(config, target.shape, str(folder))
    network.set_dtype(mx.float32)
    if rank:
        add_low_rank(network, rank, seed)
    elif "embed_tokens" in network:
        network.embed_tokens.freeze()
    drafter = build_drafter(config, network, target, target_ids(config, head.d2t, folder / WEIGHTS))
    if not isinstance(drafter, ChainDrafter):
        raise DriftError(
            f"{folder}: a drafter of the type {config.drafter_type!r} drafts no chain; {TRAINED}"
        )
    if isinstance(drafter, Eagle4Drafter):
        raise DriftError(
            f"{folder}: an EAGLE-4 head drafts from candidates alone, which no loss here knows of; "
            f"{TRAINED}"
        )
    mx.eval(network.parameters())
    return drafter
