"""The spellings of one drafter: a dialect is a small file that recognises, renames and flattens.

Every trainer's checkpoint is the same few tensors under other names. The renames that mean the same
wherever they occur are here, once; a dialect adds its own, and what its config leaves unsaid.
"""

import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from mlx_drift.convert.conventions import TapConvention

Config = dict[str, Any]
Names = AbstractSet[str]

RENAMES: tuple[tuple[str, str], ...] = (
    (r"^midlayer\.(\d+)\.", r"layers.\1."),
    (r"^midlayer\.", "layers.0."),
    (r"^(layers\.[1-9]\d*)\.hidden_norm\.", r"\1.input_layernorm."),  # SGLang's, Megatron's name
    (r"^fc_norms\.", "fc_norm."),  # the attribute's name in speculators
    (r"^eagle_lm_head\.", "lm_head."),
    (r"^(draft_id_to_target_id|hot_token_offset)$", "d2t"),
    (r"^target_vocab_mask$", "t2d"),
)

WRAPPERS = re.compile(r"^((eagle_module|draft_model|module|model)\.)+")
"""What training code puts before every name."""

DROPPED = re.compile(r"rotary_emb\.inv_freq$|\.[kv]_scale$|^verifier_(norm|lm_head)\.")
"""What carries nothing of the drafter: RoPE tables, scales of an 8-bit cache, the target's head."""


@dataclass(frozen=True)
class Trap:
    """A value that is known to be wrong in some files of a dialect, which the file cannot tell.

    Attributes:
        field: The override that answers it, under its name in `Overrides`.
        applies: Whether a flattened config may be such a file's.
        told: What the user is told, unless they override the value.
    """

    field: str
    applies: Callable[[Config], bool]
    told: str


@dataclass(frozen=True)
class Dialect:
    """How one family of trainers writes a checkpoint.

    Attributes:
        name: What the user sees.
        recognises: Whether a checkpoint is of this dialect, from its config and tensor names.
        kind: The kind of drafter, a key of `mlx_drift.drafters.config.CONFIGS`.
        renames: Its own renames, pattern and replacement, tried before the common ones.
        flatten: The config as one level of keys, under the names of SpecForge's.
        tap_ids: What layer ids mean to this producer; None if it is not known.
        defaults: For keys its config may leave out: the value, and why.
        bookkeeping: Its keys that say nothing about the arithmetic of a drafter.
        traps: What the file says, but the trainer is known to have done otherwise.
    """

    name: str
    recognises: Callable[[Config, Names], bool]
    kind: str = "eagle3"
    renames: tuple[tuple[str, str], ...] = ()
    flatten: Callable[[Config], Config] = lambda config: lift(config, "eagle_config")
    tap_ids: TapConvention | None = None
    defaults: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    bookkeeping: frozenset[str] = frozenset()
    traps: tuple[Trap, ...] = ()

    def rename(self, name: str) -> str | None:
        """Returns a tensor's canonical name; None for a tensor that carries nothing to keep."""
        if DROPPED.search(name):
            return None
        name = WRAPPERS.sub("", name)
        for pattern, replacement in (*self.renames, *RENAMES):
            name = re.sub(pattern, replacement, name)
        return name


def lift(config: Config, key: str) -> Config:
    """Lifts the keys of a nested object to the top level, where they win over their namesakes."""
    nested = config.get(key)
    if not isinstance(nested, dict):
        return config
    return {k: value for k, value in config.items() if k != key} | nested


def architecture(config: Config) -> str:
    """Returns the first architecture string, or an empty one."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def other_theta(config: Config) -> bool:
    """Tells whether the base of RoPE is another than 10000."""
    parameters = lift(config, "rope_parameters")
    return parameters.get("rope_theta") not in (None, 10000)


def has(names: Names, *endings: str) -> bool:
    """Tells whether a tensor ends in each of some names, whatever stands before them."""
    return all(any(name.endswith(ending) for name in names) for ending in endings)
