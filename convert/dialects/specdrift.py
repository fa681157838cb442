"""SpecDrift, the heads of the Attention Drift paper (Dogacel/specdrift-*): `fcs.*` or `aux_norm_*`.

The norms of the taps are vectors under the name of linear layers, `fcs.{i}.weight`, or
`aux_norm_low/mid/high.weight` in the earliest ones (`use_aux_norm`). Such heads are normalized
through and through, so the normed state is fed back unless the config denies it.
"""

import re

from mlx_drift.convert.dialects import Config, Dialect, Names


def recognises(config: Config, names: Names) -> bool:
    """Tells it by the names of the tap norms."""
    return any(re.search(r"(^|\.)(fcs|aux_norm_(low|mid|high))\.", name) for name in names)


WHY = "heads with fcs.* or aux_norm_* are normalized in both places"

SPECDRIFT = Dialect(
    "SpecDrift",
    recognises,
    renames=(
        (r"^fcs\.", "fc_norm."),
        (r"^aux_norm_low\.", "fc_norm.0."),
        (r"^aux_norm_mid\.", "fc_norm.1."),
        (r"^aux_norm_high\.", "fc_norm.2."),
    ),
    tap_ids="output",
    defaults={"norm_output": (True, WHY)},
)
