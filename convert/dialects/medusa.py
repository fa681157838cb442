"""Medusa heads: FasterDecoding's, vLLM's, NVIDIA ModelOpt's and TensorRT-LLM's names.

A file of heads alone, or a whole model with the heads beside it (Medusa-2, where the model was
trained anew with them, so that they fit no other). In FasterDecoding's and ModelOpt's names the
parts of a head are counted: the last one is the layer over the vocabulary.
"""

import re

from mlx_drift.convert.dialects import Config, Dialect, Names, architecture

NUMBERED = re.compile(r"^(?:.*\.)?(?:medusa_heads?\.)?\d+\.\d+(\.linear)?\.(weight|bias)$")
IN_A_MODEL = re.compile(r"(^|\.)medusa_heads?\.")

BLOCK = r"heads.\1.blocks.\2."
RENAMES = (
    (r"^(?!(?:.*\.)?medusa_heads?\.|\d+\.|blocks\.|lm_heads\.|token_map$).*$", ""),  # the model
    (r"^(?:.*\.)?medusa_heads?\.", ""),
    (r"^(\d+)\.(\d+)\.linear\.", BLOCK),
    (r"^(\d+)\.medusa_layers\.(\d+)\.linear\.", BLOCK),
    (r"^blocks\.(\d+)\.layers\.(\d+)\.", BLOCK),
    (r"^(\d+)\.\d+\.weight$", r"heads.\1.lm_head.weight"),
    (r"^(\d+)\.lm_head\.", r"heads.\1.lm_head."),
    (r"^lm_heads\.(\d+)\.", r"heads.\1.lm_head."),
    (r"^token_map$", "d2t"),
)


def is_medusa(config: Config, names: Names) -> bool:
    """Tells it by how the tensors are called; a config may say so and be of something else."""
    known = {"medusa_num_heads", "medusa"} & config.keys() or "Medusa" in architecture(config)
    numbered = names and all(NUMBERED.match(name) for name in names)
    spelt = any(name.startswith("lm_heads.") for name in names)
    return any(IN_A_MODEL.search(name) for name in names) or bool(known and (numbered or spelt))


MEDUSA = Dialect(
    "Medusa",
    is_medusa,
    kind="medusa",
    renames=RENAMES,
    flatten=lambda config: config,
    bookkeeping=frozenset(
        "medusa medusa_num_heads medusa_num_layers base_model_name_or_path num_heads "
        "num_hidden_layers truncated_vocab_size medusa_fc_bias max_paths topk medusa_choices "
        "num_medusa_heads num_medusa_layers version".split()
    ),
)
