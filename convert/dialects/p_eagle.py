"""P-EAGLE heads (arXiv 2602.01469): EAGLE-3's layout, and `mask_hidden` beside it.

Three trainers write them: speculators (ids are inputs of layers), SpecForge (ids are outputs; the
mask token may be in the training's own config alone), and Amazon's, in the form vLLM serves
(`parallel_drafting`, `ptd_token_id`), of which it is not known what ids mean.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, architecture, has
from mlx_drift.convert.dialects.speculators import BOOKKEEPING, flatten


def of_speculators(config: Config, names: Names) -> bool:
    """Tells it by the model type."""
    return config.get("speculators_model_type") == "peagle"


def of_specforge(config: Config, names: Names) -> bool:
    """Tells it by the architecture string."""
    return architecture(config) == "PEagleDraftModel" and has(names, "mask_hidden")


def of_vllm(config: Config, names: Names) -> bool:
    """Takes what is left: the vector in the taps' place shows it."""
    return has(names, "mask_hidden")


P_EAGLE_DIALECTS = (
    Dialect(
        "P-EAGLE of speculators",
        of_speculators,
        kind="p-eagle",
        flatten=flatten,
        tap_ids="input",
        bookkeeping=BOOKKEEPING,
    ),
    Dialect("P-EAGLE of SpecForge", of_specforge, kind="p-eagle", tap_ids="output"),
    Dialect("P-EAGLE of vLLM", of_vllm, kind="p-eagle"),
)
