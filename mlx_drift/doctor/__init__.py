"""`doctor`: what a run with a model would be, told before any weights are loaded."""

from mlx_drift.doctor.diagnosis import (
    CacheKind,
    Diagnosis,
    DrafterFacts,
    Family,
    Memory,
    RankMemory,
    Taps,
)
from mlx_drift.doctor.examine import doctor

__all__ = [
    "CacheKind",
    "Diagnosis",
    "DrafterFacts",
    "Family",
    "Memory",
    "RankMemory",
    "Taps",
    "doctor",
]
