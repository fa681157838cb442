"""The model card of a converted drafter."""

import re
from collections.abc import Sequence

from huggingface_hub import ModelCardData

from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.schema import DrafterConfig

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # what may stand in a command to copy

KINDS = {
    "eagle": ("An EAGLE-1/2 drafter", "eagle"),
    "eagle3": ("An EAGLE-3 drafter", "eagle3"),
    "eagle4": ("An EAGLE-4 drafter", "eagle4"),
    "p-eagle": ("A P-EAGLE drafter", "p-eagle"),
    "dflash": ("A DFlash drafter", "dflash"),
    "dspark": ("A DSpark drafter", "dspark"),
    "medusa": ("A set of Medusa heads", "medusa"),
    "hydra": ("A set of Hydra heads", "hydra"),
    "hydra-prefix": ("A set of Hydra heads behind a prefix layer (Hydra++)", "hydra"),
    "mtp": ("A multi-token-prediction (MTP) head", "mtp"),
}
"""What each type of drafter is, in words and as a tag."""

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
    kind, tag = kind_of(config)
    source = repository_of(config)
    data = ModelCardData(
        library_name="mlx",
        base_model=source,
        base_model_relation="quantized" if config.quantization and source else None,
        tags=["mlx", "mlx-drift", "speculative-decoding", tag],
    )
    target = config.source.get("target", "")
    body = BODY.format(
        **_sizes(name, kind, config, source),
        target=target if _REPOSITORY.fullmatch(target) else "TARGET",
        conventions="\n".join(
            f"| `{key}` | `{in_short(values[key])}` | {origin} |"
            for key, origin in sorted(config.provenance.items())
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


EXPORTED = """
# {name}

{what} for a target of hidden size {hidden} and a vocabulary of {vocab}{layers}, as a
PyTorch checkpoint in the format of {form}, exported with `mlx-drift export` from `{source}`
(sha256 of the weights it was converted from: `{sha256}`).

`mlx-drift convert` reads it back as the same drafter.
{notes}
"""


def export_card(name: str, config: DrafterConfig, form: str, notes: Sequence[str]) -> str:
    """Writes the `README.md` of an exported drafter.

    Args:
        name: The drafter's repository, or else its folder's name.
        config: The config of the drafter that was exported.
        form: The name of the format.
        notes: What the user should know, a line each.
    """
    kind, tag = kind_of(config)
    source = repository_of(config)
    data = ModelCardData(base_model=source, tags=["speculative-decoding", tag, "mlx-drift"])
    body = EXPORTED.format(
        **_sizes(name, kind, config, source),
        form=form,
        notes="".join(f"\n- {note}" for note in notes),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def kind_of(config: DrafterConfig) -> tuple[str, str]:
    """Says what a drafter is, in words and as a tag."""
    what, tag = KINDS[config.drafter_type]
    if type(config) is Eagle3Config and config.fc_norm and config.feedback == "post":
        what = "An EAGLE-3.1 (normalized) drafter"
    return what, tag


def repository_of(config: DrafterConfig) -> str | None:
    """Returns the repository a drafter came from, if it is one."""
    repo = config.source.get("repo", "")
    return repo if _REPOSITORY.fullmatch(repo) else None


def _sizes(name: str, kind: str, config: DrafterConfig, source: str | None) -> dict[str, object]:
    num_layers = config.target.num_layers
    return {
        "name": name,
        "what": kind,
        "hidden": config.target.hidden_size,
        "vocab": config.target.vocab_size,
        "layers": "" if num_layers is None else f" and {num_layers} layers",
        "source": source or config.source.get("path"),
        "sha256": config.source.get("sha256"),
    }


def in_short(value: object) -> object:
    """Shows of a block's keys only the family; every other value as it is."""
    return value.get("model_type", value) if isinstance(value, dict) else value
