"""The public names of mlx-drift, all of which `mlx_drift` itself has too."""

from mlx_drift.convert import convert_drafter, export_drafter, inspect_drafter
from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.prompt_cache_file import load_prompt_cache, save_prompt_cache
from mlx_drift.decode.responses import DriftResponse
from mlx_drift.decode.statistics import Statistics
from mlx_drift.demo import load_demo
from mlx_drift.doctor import doctor
from mlx_drift.drafters.copying import CopyingDrafter
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.generate import generate, stream_generate
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.loading import load_drafter
from mlx_drift.target.load import load
from mlx_drift.target.taps import remove_taps
from mlx_drift.train.adapt import adapt_drafter
from mlx_drift.train.answers import Asking
from mlx_drift.train.learner import Recipe

__all__ = [
    "Asking",
    "CopyingDrafter",
    "DraftModelDrafter",
    "DriftError",
    "DriftResponse",
    "DriftWarning",
    "Grammar",
    "PromptCache",
    "PromptLookupDrafter",
    "Recipe",
    "Statistics",
    "adapt_drafter",
    "convert_drafter",
    "doctor",
    "export_drafter",
    "generate",
    "inspect_drafter",
    "load",
    "load_demo",
    "load_drafter",
    "load_prompt_cache",
    "make_prompt_cache",
    "remove_taps",
    "save_prompt_cache",
    "stream_generate",
]
