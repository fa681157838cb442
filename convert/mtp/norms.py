"""Whether a Qwen head's norms lack their 1: PyTorch stores w of 1 + w, mlx-lm's files hold 1 + w.

A file says which it is by its `format`, but sidecars are known that say it wrongly, that lack it in
some norms, or that have it twice (youssofal/MTPLX #301 and #511, jundot/omlx #1507 and #3750). What
training leaves, by those threads' figures of Qwen3.5 and Qwen3.6:

| | w | 1 + w |
|---|---|---|
| input_layernorm, post_attention_layernorm | 0.0 to 0.3 | 1.0 to 1.3 |
| q_norm, k_norm | 0.7 to 0.8 | 1.7 to 1.8 |
| pre_fc_norm_embedding, pre_fc_norm_hidden | −0.5 to −0.1 | 0.3 to 0.9 |
| norm | 1.2 to 2.6 | 2.2 to 3.6 |

So the layer's own two norms tell the two apart, the queries' and keys' tell if they are otherwise
than those, and the last three follow: by their size alone they could be either.
"""

import mlx.core as mx

from mlx_drift.convert.derive import plus_one
from mlx_drift.convert.read.stored import StoredTensor, to_mlx

Tensors = dict[str, StoredTensor]

LAYER = "layers.0.input_layernorm", "layers.0.post_attention_layernorm"
HEADS = "layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm"
UNTOLD = "embedding_norm", "hidden_norm", "norm"

LACKING, TWICE = 0.6, 2.25
"""Below the first a norm lacks its 1, above the second one of `HEADS` has it twice."""


def with_their_1(tensors: Tensors, where: str) -> tuple[Tensors, list[str]]:
    """Adds 1 to the gains that lack it.

    Args:
        tensors: The head's, under canonical names.
        where: Their file, for messages.

    Returns:
        The tensors, and what the user should know, a line each.
    """
    names = [f"{name}.weight" for name in (*LAYER, *HEADS, *UNTOLD)]
    names = [name for name in names if name in tensors and tensors[name].ndim == 1]
    told_by = [name for name in names if name.removesuffix(".weight") in LAYER]
    if not told_by:
        return tensors, []
    lacks = all(_mean(tensors[name]) < LACKING for name in told_by)
    said = {tensors[name].file_format for name in names}
    notes = []
    if lacks and said == {"mlx"}:
        notes.append(
            f"{where} calls itself an mlx file, but its norms are PyTorch's, zero-centred: 1 was "
            "added to them"
        )
    if not lacks and said == {"pt"}:
        notes.append(
            f"{where} calls itself a PyTorch file, but its norms are mlx's, which have their 1: "
            "nothing was added to them"
        )
    lacking = set(names) if lacks else set()
    for name in names:
        if name.removesuffix(".weight") not in HEADS:
            continue
        mean = _mean(tensors[name])
        if lacks and mean > 1 + LACKING:
            lacking.remove(name)
            notes.append(f"{where}: {name} has its 1, though other norms lack it")
        elif not lacks and mean < LACKING:
            lacking.add(name)
            notes.append(f"{where}: {name} lacks its 1, though other norms have it: it was added")
        elif not lacks and mean > TWICE:
            notes.append(
                f"{where}: {name} averages {mean:.2f}, as if 1 had been added twice, perhaps to "
                "norm.weight too. If little is accepted, take the head from the original repository"
            )
    return tensors | {name: plus_one(tensors[name]) for name in lacking}, notes


def _mean(tensor: StoredTensor) -> float:
    blocks = (to_mlx(block, tensor.dtype).astype(mx.float32) for block in tensor.blocks())
    return sum(float(block.sum()) for block in blocks) / max(1, tensor.size)
