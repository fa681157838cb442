"""Makes a loaded network cheaper to launch: gains folded into weights, projections packed.

A drafter's step is bound by the launches of small kernels, not by its bytes (mlxcel #1194), so:
- the norms of the taps become one weightless `mx.fast.rms_norm` over all of them, and so do those
  of the embedding and the hidden state in the first layer: a norm's gain multiplies the columns of
  the matrix that reads it;
- queries (with their gates), keys and values are one matrix, and so are gate and up; queries and
  keys without norms or gates of their own are rotated as one.

Of the embedded EAGLE-3.1 drafter, an ingested row with the draft after it takes 39 kernels in place
of 47, and a chained draft 39 in place of 44 (`pytest -n 0 -s tests/drafters/test_fold.py`: copies
and arithmetic, norms and rotations as the one kernel each that they are on Metal, attention written
out as on a CPU).

The numbers are the same but for rounding, and the file on disk stays as it is. Gains are folded
only into matrices that are not quantized: the groups of one share their scales over columns.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.drafters.dflash import DFlashNetwork
from mlx_drift.drafters.eagle3 import Eagle3Network, FirstLayer
from mlx_drift.drafters.hydra import HydraNetwork
from mlx_drift.drafters.medusa import MedusaNetwork
from mlx_drift.drafters.mtp import MTPNetwork

PER_ROW = ("weight", "scales", "biases", "bias")
"""What a linear layer, quantized or not, has one row of for each output."""


def fold(network: nn.Module) -> None:
    """Folds and packs a network in place, as far as its layers are not quantized.

    The block of an MTP head is mlx-lm's and stays as it is.
    """
    if isinstance(network, MTPNetwork):
        _fold_projection(network)
        return
    if isinstance(network, MedusaNetwork) or type(network) is HydraNetwork:  # which have neither
        return
    if isinstance(network, DFlashNetwork):  # its context reads keys and values alone
        for layer in network.layers:
            _pack(layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"))
        return
    if isinstance(network, Eagle3Network):
        _fold_taps(network)
    for layer in network.layers:
        if isinstance(layer, FirstLayer):
            _fold_inputs(layer)
        _pack(layer.self_attn, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        _pack(layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"))


def _fold_taps(network: Eagle3Network) -> None:
    """Folds the gains of the tap norms into `fc`, unless another norm stands between them."""
    if "fc_norm" not in network or "input_norm" in network or type(network.fc) is not nn.Linear:
        return
    norms = network.fc_norm
    _scale_columns(network.fc, mx.concatenate([norm.weight for norm in norms]))
    network.tap_eps = norms[0].eps
    del network.fc_norm


def _fold_projection(network: MTPNetwork) -> None:
    """Folds the gains of an MTP head's embedding and hidden state into its projection."""
    norms = [network.embedding_norm, network.hidden_norm]
    gains = [norm.weight for norm in (reversed(norms) if network.hidden_first else norms)]
    _scale_columns(network.fc, mx.concatenate(gains))
    network.input_eps = network.hidden_norm.eps
    del network.embedding_norm, network.hidden_norm


def _fold_inputs(layer: FirstLayer) -> None:
    """Folds the gains of embedding and hidden state into queries, keys and values."""
    attention = layer.self_attn
    readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    if "hidden_norm" not in layer or any(type(reader) is not nn.Linear for reader in readers):
        return
    gain = mx.concatenate([layer.input_layernorm.weight, layer.hidden_norm.weight])
    for reader in readers:
        _scale_columns(reader, gain)
    layer.input_eps = layer.input_layernorm.eps
    layer.residual_gain = layer.hidden_norm.weight
    del layer.input_layernorm, layer.hidden_norm


def _scale_columns(linear: nn.Linear, gain: mx.array) -> None:
    """Multiplies the columns of a matrix, in float32."""
    weight = linear.weight.astype(mx.float32) * gain.astype(mx.float32)
    linear.weight = weight.astype(linear.weight.dtype)


def _pack(module: nn.Module, name: str, parts: Sequence[str]) -> None:
    """Puts linear layers of the same input into one, the rows of one after those of another."""
    linears = [module[part] for part in parts]
    for key in PER_ROW:
        if key in linears[0]:
            linears[0][key] = mx.concatenate([linear[key] for linear in linears])
    module[name] = linears[0]
    for part in parts:
        del module[part]
