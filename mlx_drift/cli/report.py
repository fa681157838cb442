"""How the command line tells what happened in a generation: one JSON object, or a table."""

from typing import Any

import mlx.core as mx
from rich.table import Table

from mlx_drift.generate import DriftResponse


def report(text: str, last: DriftResponse | None, interrupted: bool) -> dict[str, Any]:
    """Builds the object of `--json`; `last` is the last response, if there was one."""
    if last is None:  # interrupted before the first token
        return {"text": text, "finish_reason": "interrupted"}
    return {
        "text": text,
        "finish_reason": "interrupted" if interrupted else last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "peak_memory_gb": last.peak_memory,
        "statistics": last.statistics.to_dict() if last.statistics.rounds else None,
    }


def table(last: DriftResponse, k: int, interrupted: bool) -> Table:
    """Lays out the statistics of a generation that drafted `k` tokens a round."""
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="dim")
    rows.add_column()
    statistics = last.statistics
    known = f", {statistics.reused_tokens} of them known" if statistics.reused_tokens else ""
    rows.add_row("prompt", f"{last.prompt_tokens} tokens{known}, {last.prompt_tps:.0f} tokens/s")
    rows.add_row(
        "generation",
        f"{last.generation_tokens} tokens, {last.generation_tps:.0f} tokens/s"
        + (" (interrupted)" if interrupted else ""),
    )
    if statistics.rounds:
        rows.add_row("rounds", f"{statistics.rounds}, drafting K = {k}")
        rows.add_row(
            "acceptance_length", f"{statistics.acceptance_length:.2f} drafts accepted a round"
        )
        rows.add_row("tokens_per_round", f"{statistics.tokens_per_round:.2f}")
        rows.add_row(
            "conditional acceptance",
            "  ".join(f"{rate:.2f}" for rate in statistics.conditional_acceptance)
            + "  (draft 1, 2, …, if all before were accepted)",
        )
    if statistics.speedup is not None and statistics.plain_step_seconds is not None:
        faster = statistics.speedup >= 1
        rows.add_row(
            "plain decoding",
            f"{1 / statistics.plain_step_seconds:.0f} tokens/s: drafting is "
            f"{statistics.speedup if faster else 1 / statistics.speedup:.2f}× "
            + ("faster" if faster else "slower" + _why_slower()),
        )
    caches = f", caches {statistics.cache_bytes / 1e6:.1f} MB" if statistics.cache_bytes else ""
    rows.add_row("peak memory", f"{last.peak_memory:.2f} GB{caches}")
    return rows


def _why_slower() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return " (MLX's CPU code pays for every row it verifies; a GPU hardly does)"
    return ""
