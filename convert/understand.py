"""From a checkpoint of any dialect to canonical tensors and resolved values.

Nothing is ignored: a tensor without a place is an error, a config key that nobody reads is
reported, and a convention that the checkpoint does not settle stays undecided until the user, the
target or the probe settles it.
"""

import re
from typing import Any

from mlx_drift.convert.conventions import TAPS_KEY, Values
from mlx_drift.convert.dflash import understand_dflash, understand_dspark
from mlx_drift.convert.dialects import Dialect, Names
from mlx_drift.convert.dialects.angelslim import ANGELSLIM
from mlx_drift.convert.dialects.automodel import AUTOMODEL
from mlx_drift.convert.dialects.dflash import DFLASH_DIALECTS
from mlx_drift.convert.dialects.eagle import EAGLE
from mlx_drift.convert.dialects.eagle4 import EAGLE4_DIALECTS
from mlx_drift.convert.dialects.hydra import HYDRA_DIALECTS
from mlx_drift.convert.dialects.medusa import MEDUSA
from mlx_drift.convert.dialects.modelopt import MODELOPT
from mlx_drift.convert.dialects.p_eagle import P_EAGLE_DIALECTS
from mlx_drift.convert.dialects.refused import REFUSED, is_mtp
from mlx_drift.convert.dialects.safeailab import SAFEAILAB
from mlx_drift.convert.dialects.specdrift import SPECDRIFT
from mlx_drift.convert.dialects.specforge import SPECFORGE
from mlx_drift.convert.dialects.speculators import SPECULATORS
from mlx_drift.convert.dialects.torchspec import TORCHSPEC
from mlx_drift.convert.eagle import understand_eagle
from mlx_drift.convert.eagle3 import understand_eagle3
from mlx_drift.convert.eagle4 import understand_eagle4
from mlx_drift.convert.given import FIELDS, Given, Overrides
from mlx_drift.convert.hydra import understand_hydra, understand_hydra_prefix
from mlx_drift.convert.medusa import understand_medusa
from mlx_drift.convert.mtp.understand import understand_mtp
from mlx_drift.convert.p_eagle import understand_p_eagle
from mlx_drift.convert.read.source import Checkpoint
from mlx_drift.convert.read.stored import StoredTensor
from mlx_drift.convert.resolved import CONVERTED, Resolved
from mlx_drift.drafters.config import CONFIGS, choices_of, config_from_dict
from mlx_drift.drafters.schema import DrafterConfig
from mlx_drift.errors import DriftError, brief
from mlx_drift.target.model import TargetShape

# The first that recognises a checkpoint; SpecForge's layout is what most others started from.
DIALECTS = (
    *HYDRA_DIALECTS,
    MEDUSA,
    *DFLASH_DIALECTS,
    *P_EAGLE_DIALECTS,
    *EAGLE4_DIALECTS,
    SPECULATORS,
    EAGLE,
    SPECDRIFT,
    TORCHSPEC,
    AUTOMODEL,
    ANGELSLIM,
    MODELOPT,
    SAFEAILAB,
    SPECFORGE,
)
UNDERSTAND = {
    "eagle3": understand_eagle3,
    "eagle4": understand_eagle4,
    "p-eagle": understand_p_eagle,
    "dflash": understand_dflash,
    "dspark": understand_dspark,
    "eagle": understand_eagle,
    "medusa": understand_medusa,
    "hydra": understand_hydra,
    "hydra-prefix": understand_hydra_prefix,
}
"""What resolves the fields of each kind."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def understand(
    checkpoint: Checkpoint, target: TargetShape | None, overrides: Overrides
) -> Resolved:
    """Resolves a checkpoint's tensors and every convention.

    Args:
        checkpoint: What was read.
        target: The target's sizes, where the user named one.
        overrides: The user's choices.

    Raises:
        DriftError: If the dialect is unknown or refused, anything is missing, left over or
            contradictory, or an override says what no such drafter has.
    """
    if "drafter_type" in checkpoint.config:
        resolved = _understand_converted(checkpoint, overrides)
    elif checkpoint.wanted is not None:
        resolved = understand_mtp(checkpoint, overrides)
    else:
        resolved = _understand_dialect(checkpoint, target, overrides)
    kind = resolved.fields["drafter_type"]
    choices = choices_of(kind)
    overrides.refuse(
        f"{checkpoint.weights} is a drafter of the kind {kind}, which has no such thing",
        *(flag for flag, field in FIELDS.items() if field not in choices),
    )
    return resolved


def _understand_dialect(
    checkpoint: Checkpoint, target: TargetShape | None, overrides: Overrides
) -> Resolved:
    """Takes a checkpoint in a trainer's own spelling."""
    dialect = _recognise(checkpoint)
    tensors = _rename(checkpoint, dialect)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight") and tensor.ndim != 2:
            raise DriftError(
                f"{checkpoint.weights}: {name} has shape {tensor.shape}, expected a matrix"
            )
    flat = dialect.flatten(checkpoint.config)
    values = Values(flat, checkpoint.config_file, dialect.defaults, overrides.probed)
    values.look(*dialect.bookkeeping)
    given = Given(values, tensors, checkpoint.weights, dialect.tap_ids, target, overrides)
    fields, undecided = UNDERSTAND[dialect.kind](given)
    if "taps" in fields:
        fields["taps"] = list(fields["taps"])
    known = CONFIGS[dialect.kind].__dataclass_fields__
    doubted = () if TAPS_KEY in flat else dialect.traps  # what mlx-drift wrote says what it means
    traps = [t for t in doubted if getattr(overrides, t.field) is None and t.applies(flat)]
    return Resolved(
        dialect=dialect.name,
        config_file=checkpoint.config_file,
        fields=fields,
        provenance={key: origin for key, origin in values.provenance.items() if key in known},
        tensors=tensors,
        unknown_keys=values.unknown(),
        notes=values.notes + [trap.told for trap in traps],
        undecided=undecided,
        origin=_target_name(checkpoint.config),
    )


def _understand_converted(checkpoint: Checkpoint, overrides: Overrides) -> Resolved:
    """Takes a drafter that mlx-drift converted: its config is resolved already."""
    try:
        config: DrafterConfig = config_from_dict(checkpoint.config)
    except DriftError as error:
        raise DriftError(f"{checkpoint.config_file}: {error}") from None
    if overrides.taps is not None and "taps" not in overrides.probed:
        raise DriftError(
            f"{checkpoint.config_file} is of a converted drafter, whose taps are resolved: --taps "
            "has nothing to say. Convert the original again"
        )
    fields, provenance = config.to_dict(), dict(config.provenance)
    for flag in ("feedback", "rope_theta", "window", "slots"):
        value, key = getattr(overrides, flag), FIELDS[flag]
        if value is not None and key in choices_of(config.drafter_type):
            fields[key] = None if (flag, value) == ("window", 0) else value
            provenance[key] = "probe" if flag in overrides.probed else "override"
    if overrides.window is not None and "full_attention_layers" in fields:
        fields["full_attention_layers"] = []
    return Resolved(
        dialect=CONVERTED,
        config_file=checkpoint.config_file,
        fields=fields,
        provenance=provenance,
        tensors=checkpoint.tensors,
        unknown_keys=[],
        notes=[],
        origin=dict(config.source),
    )


def drafts_blocks(checkpoint: Checkpoint) -> bool:
    """Tells whether a checkpoint is of a head whose slots may be read in two ways."""
    converted = "drafter_type" in checkpoint.config or checkpoint.wanted is not None
    return not converted and _recognise(checkpoint).kind in ("dflash", "dspark")


def _target_name(config: dict[str, Any]) -> dict[str, str]:
    """Reads the target's name from a speculators config, the only one that holds it."""
    match config.get("speculators_config"):
        case {"verifier": {"name_or_path": str(name)}} if REPOSITORY.fullmatch(name):
            return {"target": name}
    return {}


def _recognise(checkpoint: Checkpoint) -> Dialect:
    names: Names = checkpoint.tensors.keys()
    if is_mtp(checkpoint.config, names):
        raise DriftError(
            f"{checkpoint.weights} holds a multi-token-prediction (MTP) head: take it out with "
            "mlx-drift convert --mtp"
        )
    for refused in REFUSED:
        if refused.recognises(checkpoint.config, names):
            raise DriftError(
                f"{checkpoint.weights} is {refused.name}, which mlx-drift does not run. "
                f"{refused.instead}"
            )
    for dialect in DIALECTS:
        if dialect.recognises(checkpoint.config, names):
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    what = checkpoint.config.get("speculators_model_type") or checkpoint.config.get("architectures")
    raise DriftError(
        f"{checkpoint.weights}: not a drafter of a layout this version reads ({known}); its "
        f"config says {brief(what)}, its tensors are {', '.join(sorted(names)[:4])}, …"
    )


def _rename(checkpoint: Checkpoint, dialect: Dialect) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        canonical = dialect.rename(name)
        if not canonical:
            continue
        if canonical in tensors:
            raise DriftError(
                f"{checkpoint.weights}: {name} and another tensor both mean {canonical}"
            )
        tensors[canonical] = tensor
    return tensors
