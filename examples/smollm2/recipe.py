"""The modules of the embedded pair's recipe, which take any Llama, under one roof."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train_demo_pair"))

from target import Llama, LlamaConfig, rope_table

__all__ = ["Llama", "LlamaConfig", "rope_table"]
