"""Tiny models with random weights, so that the tests need no download and little time."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "reference"))
