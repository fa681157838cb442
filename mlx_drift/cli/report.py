"""How the command line tells what happened in a generation: one JSON object, or a table."""

from typing import Any

import mlx.core as mx
from rich.table import Table

from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.responses import DriftResponse
from mlx_drift.drafters.protocol import TREE
from mlx_drift.ranks.world import world


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
        "ranks": world().size,
        "statistics": last.statistics.to_dict() if last.statistics.draft_length else None,
    }


def in_short(last: DriftResponse) -> str:
    """Tells what drafting came to, in what does not depend on the machine."""
    statistics = last.statistics
    told = f"{last.generation_tokens} tokens in {statistics.rounds} rounds"
    return f"{told}, {statistics.acceptance_length:.2f} drafts accepted a round"


def table(last: DriftResponse, interrupted: bool) -> Table:
    """Lays out the statistics of a generation."""
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
    if statistics.draft_length is not None:
        rows.add_row("draft length", _draft_length(statistics.draft_length))
    if statistics.plain_tokens:
        rows.add_row("plain decoding", f"{statistics.plain_tokens} tokens, between the rounds")
    if statistics.rounds:
        rows.add_row("rounds", str(statistics.rounds))
        rows.add_row(
            "acceptance_length", f"{statistics.acceptance_length:.2f} drafts accepted a round"
        )
        rows.add_row("tokens_per_round", f"{statistics.tokens_per_round:.2f}")
        rows.add_row(
            "conditional acceptance",
            "  ".join(f"{rate:.2f}" for rate in statistics.conditional_acceptance)
            + "  (draft 1, 2, …, if all before were accepted)",
        )
    if statistics.free_rounds:
        told = [
            f"{name}: {one['accepted']} drafts in {one['rounds']} rounds, {one['share']:.0%} of all"
            for name, one in statistics.sources.items()
        ]
        rows.add_row("accepted from", "; ".join(told))
    if statistics.ranks:
        rows.add_row(
            "of a tree's first level",
            "  ".join(f"{rate:.2f}" for rate in statistics.acceptance_by_rank[0])
            + "  (its first, second, … draft)",
        )
    if statistics.speedup is not None and statistics.plain_step_seconds is not None:
        faster = statistics.speedup >= 1
        is_auto = statistics.draft_length is not None and statistics.draft_length.fixed is None
        rows.add_row(
            "against plain",
            f"{1 / statistics.plain_step_seconds:.0f} tokens/s: "
            f"{'auto' if is_auto else 'drafting'} is "
            f"{statistics.speedup if faster else 1 / statistics.speedup:.2f}× "
            + ("faster" if faster else "slower" + ("" if is_auto else _why_slower())),
        )
    if world().size > 1:
        rows.add_row("ranks", f"{world().size}; times and memory are rank 0's")
    caches = f", caches {statistics.cache_bytes / 1e6:.1f} MB" if statistics.cache_bytes else ""
    rows.add_row("peak memory", f"{last.peak_memory:.2f} GB{caches}")
    return rows


def explanation(draft_length: DraftLength) -> Table:
    """Lays out what every draft length is expected to give."""
    rows = Table("K", "ms", "tokens a round", "tokens/s", "", box=None, header_style="dim")
    best = draft_length.best()
    for candidate in draft_length.candidates():
        k = candidate.num_draft_tokens
        rows.add_row(
            str(k) if k else "plain",
            f"{1000 * candidate.seconds:.1f}" + ("" if candidate.measured else " (estimated)"),
            f"{candidate.tokens:.2f}",
            f"{candidate.tokens_per_second:.1f}",
            "best" if candidate == best else "",
        )
    for candidate in draft_length.candidates(TREE)[1:] if draft_length.tree else ():
        rows.add_row(
            f"tree of {candidate.num_draft_tokens + 1}",
            f"{1000 * candidate.seconds:.1f}" + ("" if candidate.measured else " (estimated)"),
            f"{candidate.tokens:.2f}",
            f"{candidate.tokens_per_second:.1f}",
            "best" if candidate == best else "",
        )
    return rows


def _draft_length(draft_length: DraftLength) -> str:
    """Tells how many tokens were drafted a round, and how many would pay best."""
    best = draft_length.best()
    if draft_length.tree and draft_length.fixed:
        return f"trees of {draft_length.fixed + 1} rows"
    if draft_length.fixed is None:
        if best is not None and draft_length.prefers_trees:
            return f"auto: trees of {best.num_draft_tokens + 1} rows now"
        if best is None or best.num_draft_tokens == PLAIN:
            return "auto: plain decoding, no number of drafts pays here"
        return f"auto: K = {best.num_draft_tokens} now"
    if best is None or PLAIN not in draft_length.costs.known():
        return f"K = {draft_length.fixed}"
    if best.num_draft_tokens == PLAIN:
        return f"K = {draft_length.fixed}; auto would choose plain decoding"
    return f"K = {draft_length.fixed}; auto would choose K = {best.num_draft_tokens}"


def _why_slower() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return " (MLX's CPU code pays for every row it verifies; a GPU hardly does)"
    return ""
