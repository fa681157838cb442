"""What heads have in common that read the target's last state: Medusa's, Hydra's, EAGLE-1/2's."""

import re

from mlx_drift.convert.conventions import Undecided, Values
from mlx_drift.convert.given import Given, Tensors, Understood
from mlx_drift.convert.target import TargetConfig
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape

PART = re.compile(
    r"heads\.(\d{1,3})\.(?:blocks\.(\d{1,3})|linear|residual|lm_head)\.(?:weight|bias)"
)


def count_heads(tensors: Tensors, weights: str, whose: str) -> tuple[int, int]:
    """Counts heads, and blocks of each that are as wide as the target.

    Args:
        tensors: The tensors under canonical names; what belongs to no head is not looked at.
        weights: The file they came from, for messages.
        whose: What such heads are called.

    Raises:
        DriftError: If there are none, or one is not counted through.
    """
    found: dict[int, set[int]] = {}
    for name in tensors:
        part = PART.fullmatch(name)
        if part is None and name.startswith("heads."):
            raise DriftError(f"{weights} has the tensor {name}, which no {whose} head has")
        if part is not None:
            found.setdefault(int(part[1]), set()).update([int(part[2])] if part[2] else [])
    blocks = len(found.get(0, ()))
    for head in range(max(found, default=0) + 1):
        whole = found.get(head) == set(range(blocks))
        layer = tensors.get(f"heads.{head}.lm_head.weight")
        if not whole or layer is None or layer.ndim != 2:
            raise DriftError(
                f"{weights}: head {head} is not like head 0; expected {blocks} blocks and a matrix "
                "over the vocabulary in each"
            )
    return len(found), blocks


def read_heads(given: Given, whose: str, num_layers: int | None) -> Understood:
    """Resolves what the configs of Medusa and Hydra heads have in common.

    Args:
        given: The checkpoint.
        whose: What such heads are called.
        num_layers: The target's number of layers, if known.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what no such head
            has.
    """
    values = given.values
    given.overrides.refuse(
        f"{given.weights} holds {whose} heads, which have one tap and feed no state back",
        *("taps", "feedback", "slots"),
    )
    heads, blocks = count_heads(given.tensors, given.weights, whose)
    rows, hidden_size = given.tensors["heads.0.lm_head.weight"].shape
    key = f"{whose.lower()}_num_heads"
    if values.config.get(key) not in (None, heads):
        values.notes.append(f"{key} is {brief(values.config[key])}, the file has {heads} heads")
    vocab = rows if given.target is None else given.target.vocab_size
    taps, undecided = read_last_state(values, num_layers, f"{given.weights}: a {whose} head")
    return {
        "drafter_type": whose.lower(),
        "format_version": 1,
        "hidden_size": hidden_size,
        "num_heads": values.rule("num_heads", heads, "the heads in the file"),
        "num_blocks": values.rule("num_blocks", blocks, "the blocks in the file"),
        "draft_vocab_size": values.rule("draft_vocab_size", rows, "rows of the heads"),
        "target": {
            "hidden_size": hidden_size,
            "vocab_size": values.size("vocab_size", vocab),
            "num_layers": num_layers,
        },
    } | taps, undecided


def read_last_state(
    values: Values, num_layers: int | None, head: str
) -> tuple[dict[str, tuple[int, ...]], Undecided | None]:
    """Resolves `taps`: the target's final norm, or so many layers back as Hydra's configs say.

    Args:
        values: The config.
        num_layers: The target's number of layers, if known.
        head: Where it is and what, for messages.

    Returns:
        The field, and what keeps it undecided, if anything does.

    Raises:
        DriftError: If `hidden_state_offset` is no number of layers.
    """
    offset = values.take("hidden_state_offset", 0, name="taps")
    if type(offset) is not int or not 0 <= offset <= (num_layers or offset):
        raise DriftError(
            f"{values.file}: hidden_state_offset is {brief(offset)}; expected a number of layers"
        )
    if num_layers is None:
        return {}, Undecided(
            f"{head} reads the target's last state; which tap that is depends on the target's "
            "number of layers. Give the target: --target MODEL"
        )
    if offset:  # counted in transformers' hidden states, of which the last is the normed one
        why = f"hidden_state_offset is {offset}"
        return {"taps": values.rule("taps", (num_layers - offset,), why)}, None
    why = "such a head reads the target's final normed state"
    return {"taps": values.rule("taps", (num_layers + 1,), why)}, None


OF_THE_BASE = (
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "vocab_size",
)
"""What the layer of a Hydra head has of its base model, whose config the checkpoint leaves out."""


def take_of_base(values: Values, target: TargetShape | None) -> None:
    """Lets a layer's sizes be the target's, where the checkpoint leaves them out.

    Raises:
        DriftError: If neither says them.
    """
    base = target.config if isinstance(target, TargetConfig) else {}
    why = "the base model's, whose layer it is"
    given = {key: (base[key], why) for key in OF_THE_BASE if base.get(key) is not None}
    values.defaults = {**given, **values.defaults}
    if values.config.get("num_attention_heads") is None and "num_attention_heads" not in given:
        raise DriftError(
            f"{values.file} does not say how many attention heads the layer has: as many as its "
            "base model's. Give that model: --target MODEL"
        )
