"""The model card of a converted drafter."""

import re

from huggingface_hub import ModelCardData

from mlx_drift.drafters.config import (
    DFlashConfig,
    DSparkConfig,
    Eagle3Config,
    MTPConfig,
    PEagleConfig,
)
from mlx_drift.drafters.schema import DrafterConfig

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # what may stand in a command to copy

BODY = """
# {name}

{what} for a target of hidden size {hidden} and a vocabulary of {vocab}{layers}, converted from
`{source}` (sha256 `{sha256}`) with `mlx-drift convert`.

```bash
mlx-drift generate --model {target} --drafter {name} -p "…"
```

| convention | value | from |
|---|---|---|
{conventions}
"""


def model_card(name: str, config: DrafterConfig) -> str:
    """Writes `README.md`.

    Args:
        name: The drafter's repository, or else its folder's name.
        config: Its config.
    """
    values = config.to_dict()
    kind, tag = "An EAGLE-1/2 drafter", "eagle"
    if isinstance(config, Eagle3Config):
        kind, tag = "An EAGLE-3 drafter", "eagle3"
        if config.fc_norm and config.feedback == "post":
            kind = "An EAGLE-3.1 (normalized) drafter"
    if isinstance(config, PEagleConfig):
        kind, tag = "A P-EAGLE drafter", "p-eagle"
    if isinstance(config, DFlashConfig):
        kind, tag = "A DFlash drafter", "dflash"
    if isinstance(config, DSparkConfig):
        kind, tag = "A DSpark drafter", "dspark"
    if isinstance(config, MTPConfig):
        kind, tag = "A multi-token-prediction (MTP) head", "mtp"
    repo = config.source.get("repo", "")
    source = repo if _REPOSITORY.fullmatch(repo) else None
    data = ModelCardData(
        library_name="mlx",
        base_model=source,
        base_model_relation="quantized" if config.quantization and source else None,
        tags=["mlx", "mlx-drift", "speculative-decoding", tag],
    )
    target = config.source.get("target", "")
    num_layers = config.target.num_layers
    body = BODY.format(
        name=name,
        what=kind,
        hidden=config.target.hidden_size,
        vocab=config.target.vocab_size,
        layers="" if num_layers is None else f" and {num_layers} layers",
        source=source or config.source.get("path"),
        sha256=config.source.get("sha256"),
        target=target if _REPOSITORY.fullmatch(target) else "TARGET",
        conventions="\n".join(
            f"| `{key}` | `{in_short(values[key])}` | {origin} |"
            for key, origin in sorted(config.provenance.items())
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def in_short(value: object) -> object:
    """Shows of a block's keys only the family; every other value as it is."""
    return value.get("model_type", value) if isinstance(value, dict) else value
