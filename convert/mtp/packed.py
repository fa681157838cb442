"""Heads that mlx quantized: how, is read off the tensors, since configs tell of the trunk.

A layer's width is known from its network, so the number of scales gives the group size exactly, and
the width of a packed row the bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_drift.convert.derive import dequantized
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.drafters.schema import Quantization
from mlx_drift.errors import DriftError

Tensors = Mapping[str, StoredTensor]

WITHOUT_BIASES = {(32, 4): "mxfp4", (32, 8): "mxfp8", (16, 4): "nvfp4"}
"""mlx's modes that have scales alone, by group size and bits."""
AFFINE_GROUPS, AFFINE_BITS = (32, 64, 128), (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Packed:
    """A layer that mlx quantized.

    Attributes:
        parts: The packed weights, the scales, and the biases if the mode has them.
        how: The parameters.
    """

    parts: tuple[StoredTensor, ...]
    how: Quantization

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of what was packed: that of its scales, where they are floats."""
        scales = self.parts[1].dtype
        return scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16

    def unpacked(self, dtype: mx.Dtype) -> StoredTensor:
        """The weights."""
        return dequantized(self.parts, self.how.group_size, self.how.bits, self.how.mode, dtype)


def packed_layers(tensors: Tensors, widths: Mapping[str, int], where: str) -> dict[str, Packed]:
    """Finds the quantized layers.

    Args:
        tensors: A head's, under canonical names.
        widths: How wide the rows of each layer are, unpacked.
        where: Their file, for messages.

    Raises:
        DriftError: If one is quantized in no way that mlx knows.
    """
    layers = {}
    for name in tensors:
        layer = name.removesuffix(".scales")
        if layer != name and layer in widths:
            layers[layer] = _packed(tensors, layer, widths[layer], where)
    return layers


def _packed(tensors: Tensors, layer: str, width: int, where: str) -> Packed:
    names = [f"{layer}.{kind}" for kind in ("weight", "scales", "biases")]
    parts = tuple(tensors[name] for name in names if name in tensors)
    shapes = [part.shape for part in parts]
    rows = {shape[:-1] for shape in shapes}
    if len(parts) > 1 and len(rows) == 1 and min(map(len, shapes)) > 1 and shapes[1][-1]:
        group_size, bits = width // shapes[1][-1], shapes[0][-1] * 32 // width
        whole = (group_size * shapes[1][-1], bits * width) == (width, shapes[0][-1] * 32)
        affine = len(parts) == 3 and shapes[2] == shapes[1] and bits in AFFINE_BITS
        mode = "affine" if affine and group_size in AFFINE_GROUPS else None
        if len(parts) == 2 and parts[1].dtype == mx.uint8:
            mode = WITHOUT_BIASES.get((group_size, bits))
        if whole and mode is not None and parts[0].dtype == mx.uint32:
            return Packed(parts, Quantization(group_size=group_size, bits=bits, mode=mode))
    raise DriftError(
        f"{where}: {layer} is quantized in no way that mlx knows: "
        f"{', '.join(f'{part.stored} {part.shape}' for part in parts)} for rows of {width}"
    )


def unpack(
    tensors: Tensors, layers: Mapping[str, Packed], dtype: mx.Dtype | None = mx.bfloat16
) -> dict[str, StoredTensor]:
    """Unpacks some layers.

    Args:
        tensors: A head's, under canonical names.
        layers: Which of its layers.
        dtype: What they become; None for the dtype of each one's scales.
    """
    floats = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in layers}
    biases = {name: t for name, t in tensors.items() if name.endswith(".bias")}
    unpacked = {f"{name}.weight": p.unpacked(dtype or p.dtype) for name, p in layers.items()}
    return floats | biases | unpacked
