"""SafeAILab (SafeAILab/EAGLE), the reference implementation: `.bin`, one `midlayer.*`.

Its config names no tap layers as a rule; where it does they are inputs (`ea_model.py`).
"""

from mlx_drift.convert.dialects import Config, Dialect, Names, architecture, has


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the plain architecture string, and by `midlayer`."""
    plain = architecture(config) in ("LlamaForCausalLM", "")
    return plain and has(names, "midlayer.hidden_norm.weight")


SAFEAILAB = Dialect("SafeAILab", recognises, tap_ids="input")
