"""speculators (vllm-project/speculators), the format of RedHatAI's heads and vLLM's own.

The decoder layer's config is nested in `transformer_layer_config`, in either spelling of RoPE; the
switches stand beside it. Ids are inputs of layers, n being the end of the last one; repositories
that `speculators convert` made may carry output ids, which the rules of `conventions` tell.
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, lift


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the model type."""
    return config.get("speculators_model_type") == "eagle3"


def flatten(config: Config) -> Config:
    """Lifts the layer's config; the speculator's own keys win."""
    own = {key: value for key, value in config.items() if key != "transformer_layer_config"}
    nested = config.get("transformer_layer_config")
    return lift((nested if isinstance(nested, dict) else {}) | own, "eagle_config")


BOOKKEEPING = frozenset(
    "speculators_model_type speculators_version speculators_config algorithm "
    "embed_requires_grad".split()
)

SPECULATORS = Dialect(
    "speculators",
    recognises,
    flatten=flatten,
    tap_ids="input",
    bookkeeping=BOOKKEEPING,
    defaults={
        "norm_before_residual": (True, "vLLM runs speculators heads without the key so"),
    },
)
