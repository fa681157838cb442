"""Hydra heads (zankner/Hydra `hydra_lm_head.pt`): `mlp`, `prefix-mlp` and `eagle-attn`.

The file is the state of a module that holds the target's own embedding, and head, beside its own
parts: those two are the target's, and are left to it. Heads behind a prefix layer stand at odd
places, since dropout stands at the even ones.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names

MOST_BLOCKS = 32
PREFIX = "prefix_embeding_layer."  # spelled so


def _renames(first: int, apart: int, head: str) -> tuple[tuple[str, str], ...]:
    """The renames of heads whose blocks stand `apart` places apart, the first one at `first`."""
    return (
        (r"^hydra_head\.", ""),
        (r"^input_embed_fn\..*", ""),
        (rf"^hydra_mlp\.(\d+)\.{first}\.linear\.", r"heads.\1.linear."),
        (rf"^hydra_mlp\.(\d+)\.{first}\.res_connection\.", r"heads.\1.residual."),
        *(
            (
                rf"^hydra_mlp\.(\d+)\.{first + apart * block}\.linear\.",
                rf"heads.\1.blocks.{block - 1}.",
            )
            for block in range(1, MOST_BLOCKS)
        ),
        (rf"^hydra_lm_head\.(\d+)\.{head}", r"heads.\1.lm_head."),
    )


def _has(names: Names, part: str) -> bool:
    return any(part in name for name in names)


def is_prefix(config: Config, names: Names) -> bool:
    """Tells it by the prefix layer."""
    return _has(names, "hydra_mlp.") and _has(names, PREFIX)


def is_mlp(config: Config, names: Names) -> bool:
    """Takes the heads that are left."""
    return _has(names, "hydra_mlp.")


def is_eagle(config: Config, names: Names) -> bool:
    """Tells it by the one decoder layer, which has no number."""
    return "hydra_num_heads" in config and _has(names, "attn.self_attn.q_proj.")


BOOKKEEPING = frozenset(
    "base_model_name_or_path hydra_num_heads hydra_num_layers hydra_head_arch grounded_heads "
    "dropout_rate version".split()
)
"""What the tensors tell, and know better: `grounded_heads` is false by default."""


def _flat(config: Config) -> Config:
    return config


HYDRA_DIALECTS = (
    Dialect(
        "Hydra (prefix-mlp)",
        is_prefix,
        kind="hydra-prefix",
        renames=(
            *_renames(1, 2, r"1\."),
            (rf"^{PREFIX}embed_tokens\..*", ""),  # never used
            (rf"^{PREFIX}", ""),
        ),
        flatten=_flat,
        bookkeeping=BOOKKEEPING,
    ),
    Dialect(
        "Hydra (mlp)",
        is_mlp,
        kind="hydra",
        renames=_renames(0, 1, ""),
        flatten=_flat,
        bookkeeping=BOOKKEEPING,
    ),
    Dialect(
        "Hydra (eagle-attn)",
        is_eagle,
        kind="eagle",
        renames=(
            (r"^hydra_head\.", ""),
            (r"^(input_embed_fn|lm_head)\..*", ""),
            (r"^attn\.", "layers.0."),
        ),
        flatten=_flat,
        bookkeeping=BOOKKEEPING,
    ),
)
