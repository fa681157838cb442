"""Understands Hydra heads: counted from the tensors, whatever the config says."""

from mlx_drift.convert.given import Given, Understood
from mlx_drift.convert.heads import read_heads, take_of_base
from mlx_drift.convert.layers import read_layers
from mlx_drift.errors import DriftError


def understand_hydra(given: Given) -> Understood:
    """Resolves every field of a `HydraConfig`.

    Raises:
        DriftError: If anything is missing or contradictory, or an override says what such heads
            have not.
    """
    given.overrides.refuse(
        f"{given.weights} holds Hydra heads, which look back at nothing", "rope_theta", "window"
    )
    return _heads(given)


def understand_hydra_prefix(given: Given) -> Understood:
    """Resolves every field of a `HydraPrefixConfig`; as `understand_hydra`."""
    fields, undecided = _heads(given)
    take_of_base(given.values, given.target)
    layers = {name: tensor for name, tensor in given.tensors.items() if name[:6] != "heads."}
    fields |= read_layers(given.values, layers, given.overrides) | {"drafter_type": "hydra-prefix"}
    return fields, undecided


def _heads(given: Given) -> Understood:
    """Resolves what both kinds have; the block that narrows what a head reads is one of its own."""
    num_layers = None if given.target is None else given.target.num_layers
    fields, undecided = read_heads(given, "Hydra", num_layers)
    if "heads.0.residual.weight" not in given.tensors:
        raise DriftError(
            f"{given.weights} lacks hydra_mlp.0.*.res_connection: heads that do not read the "
            "drafts before theirs (grounded_heads is false) are not run"
        )
    return fields | {"num_blocks": fields["num_blocks"] + 1}, undecided
