"""The embedded pair: a tiny chat target and its drafters, so that everything can be tried at once.

The target was trained on the Python standard library's documentation, the drafters on what the
quantized target itself answers; `README.md` beside this file is its model card, the recipe is
`examples/train_demo_pair/` in the repository.
"""

from pathlib import Path
from typing import Literal

import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.load import load_converted

DEMO = Path(__file__).parent
TARGET = DEMO / "target"
CHAINS = ("eagle3.1", "eagle3", "mtp")  # the normalized one first: it is the default
DRAFTERS = (*CHAINS, "dflash", "medusa")
NAME = "mlx-drift-demo"
QUESTION = "Show me the source of `shlex.quote`."
"""What the command line asks when it is given nothing: a text the target has seen."""


def load_demo(
    drafter: Literal["eagle3.1", "eagle3", "mtp", "dflash", "medusa"] = "eagle3.1",
) -> tuple[nn.Module, TokenizerWrapper, HeadDrafter]:
    """Loads the embedded pair.

    Args:
        drafter: The normalized drafter, the pre-norm one trained beside it, the MTP head, the block
            drafter, or the Medusa heads.

    Returns:
        The target, its tokenizer and the drafter.
    """
    model, tokenizer = load(str(TARGET))
    return model, tokenizer, load_converted(DEMO / drafter, model)
