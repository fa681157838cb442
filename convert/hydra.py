"""Understands Hydra heads: counted from the tensors, whatever the config says."""

from typing import Any

from mlx_drift.convert.conventions import TapConvention, Undecided, Values
from mlx_drift.convert.heads import count_heads, read_last_state, take_of_base
from mlx_drift.convert.layers import Overrides, Tensors, read_layers
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape


def understand_hydra(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of a `HydraConfig`; arguments and results as `understand_eagle3`'s.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such heads
            have not.
    """
    overrides.refuse(
        f"{weights} holds Hydra heads, which look back at nothing", "rope_theta", "window"
    )
    fields, undecided = _heads(values, tensors, weights, target, overrides)
    return fields | {"drafter_type": "hydra"}, undecided


def understand_hydra_prefix(
    values: Values,
    tensors: Tensors,
    weights: str,
    tap_ids: TapConvention | None,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves every field of a `HydraPrefixConfig`; as `understand_hydra`."""
    fields, undecided = _heads(values, tensors, weights, target, overrides)
    take_of_base(values, target)
    layers = {key: value for key, value in tensors.items() if not key.startswith("heads.")}
    return read_layers(values, layers, overrides) | fields | {
        "drafter_type": "hydra-prefix"
    }, undecided


def _heads(
    values: Values,
    tensors: Tensors,
    weights: str,
    target: TargetShape | None,
    overrides: Overrides,
) -> tuple[dict[str, Any], Undecided | None]:
    """Resolves what both kinds have."""
    overrides.refuse(
        f"{weights} holds Hydra heads, which have one tap and feed no state back",
        *("taps", "feedback", "slots"),
    )
    heads, blocks = count_heads(tensors, weights, "Hydra")
    if "heads.0.residual.weight" not in tensors:
        raise DriftError(
            f"{weights} lacks hydra_mlp.0.*.res_connection: heads that do not read the drafts "
            "before theirs (grounded_heads is false) are not run"
        )
    rows, hidden_size = tensors["heads.0.lm_head.weight"].shape
    num_layers = None if target is None else target.num_layers
    taps, undecided = read_last_state(values, num_layers, f"{weights}: a Hydra head")
    vocab = values.size("vocab_size", rows if target is None else target.vocab_size)
    fields = {
        "format_version": 1,
        "hidden_size": hidden_size,
        "num_heads": values.rule("num_heads", heads, "the heads in the file"),
        "num_blocks": values.rule("num_blocks", blocks + 1, "the blocks in the file"),
        "draft_vocab_size": values.rule("draft_vocab_size", rows, "rows of the heads"),
        "target": {"hidden_size": hidden_size, "vocab_size": vocab, "num_layers": num_layers},
    }
    said = values.config.get("hydra_num_heads")
    if said not in (None, heads):
        values.notes.append(f"hydra_num_heads is {brief(said)}, the file has {heads} heads")
    return fields | taps, undecided
