"""What a run would hold, and what the machine has for it; all in bytes."""

import os
from collections.abc import Sequence

import mlx.core as mx

from mlx_drift.doctor.diagnosis import CacheKind, DrafterFacts, Memory, RankMemory, Source


def run_memory(
    weights: int | None,
    weights_from: Source | None,
    caches: Sequence[CacheKind] | None,
    drafter: DrafterFacts | None,
    tap_nbytes: int,
) -> Memory:
    """Adds up what a run on one machine would hold.

    Args:
        weights: Of the target; None if they are not known.
        weights_from: Whence they are known.
        caches: The target's, full; None if they are not known.
        drafter: With its caches; None without one.
        tap_nbytes: Of one tap's states while a prompt is processed.
    """
    held = None if caches is None else _sum(caches)
    own, kept, taps = 0, 0, 0
    if drafter is not None:
        own = drafter.nbytes
        kept = _sum(drafter.caches) + drafter.seed_nbytes
        taps = len(drafter.taps) * tap_nbytes
    total = None
    if weights is not None and held is not None:
        total = weights + held + own + kept + taps
    machine = machine_memory()
    return Memory(
        weights=weights,
        weights_from=weights_from,
        caches=held,
        drafter=own,
        drafter_caches=kept,
        taps=taps,
        total=total,
        machine=machine,
        fits=None if total is None else total <= machine,
    )


def rank_memory(
    rank: int, weights: int, caches: Sequence[CacheKind] | None, whole: Memory
) -> RankMemory:
    """Tells what one of several ranks would hold: its part of the target, and the drafter whole.

    Args:
        rank: Which.
        weights: Of its part, if those of the whole are known.
        caches: Of its part, full; None if they are not known.
        whole: What one machine would hold alone.
    """
    known = None if whole.weights is None else weights
    total = None
    if known is not None and caches is not None:
        total = known + _sum(caches) + whole.drafter + whole.drafter_caches + whole.taps
    fits = None if total is None else total <= whole.machine
    return RankMemory(rank, known, _sum(caches or ()), total, fits)


def machine_memory() -> int:
    """Returns what the default device has for a model."""
    facts = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if (size := facts.get(key)) is not None:
            return int(size)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sum(caches: Sequence[CacheKind]) -> int:
    return sum(kind.nbytes for kind in caches)
