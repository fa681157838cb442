"""What drafts may come from where a grammar foresees the text: what it forces, nothing it forbids.

What a grammar forces is a draft that costs nothing, verified as any other: the target may write the
same text in other tokens. A network's drafts are held to the grammar one by one, as it drafts them
(`mlx_drift.decode.chooser.Chooser`); copies are cut off here, before they are verified.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from mlx_drift.decode.fork import LogitsProcessor
from mlx_drift.drafters.protocol import (
    MAX_DRAFT_TOKENS,
    Choose,
    Draft,
    Propose,
    Source,
)


@runtime_checkable
class Foresees(Protocol):
    """A logits processor that knows what may come (`mlx_drift.grammar.follow`)."""

    def forced(self, tokens: mx.array) -> list[int]:
        """Returns what must follow all tokens so far, `[n]`."""

    def count_possible(self, tokens: mx.array, drafts: Sequence[int]) -> int:
        """Returns how many drafts may follow them, up to the first that may not."""


def possible_sources(
    processors: Sequence[LogitsProcessor],
    history: mx.array,
    sources: dict[Source, Propose],
    cache: Any,
    under_way: int = 0,
) -> dict[Source, Propose]:
    """Puts what is forced before what a drafter has, and cuts copies off where they may not go on.

    Args:
        processors: The logits processors.
        history: All committed tokens `[n]`.
        sources: What the drafter has.
        cache: Its cache.
        under_way: Tokens that will be committed before the drafts.
    """
    found: dict[Source, Propose] = {}
    for foresees in processors:
        if not isinstance(foresees, Foresees):
            continue
        if forced := foresees.forced(history)[under_way:]:
            found[Source("forced", len(forced))] = _saying(forced)
        if under_way:  # and unknown
            continue
        for source in [one for one in sources if one.kind == "copy" and not one.is_empty]:
            copied: Any = sources.pop(source)(MAX_DRAFT_TOKENS, cache, None).tokens.tolist()
            possible = copied[: foresees.count_possible(history, copied)]
            if possible or not sources:
                source = source if possible else Source("copy")
                sources = {source: _saying(possible), **sources}
    return found | sources


def _saying(tokens: list[int]) -> Propose:
    """Returns what proposes some tokens."""

    def propose(k: int, cache: Any, chooser: Choose | None = None) -> Draft:
        return Draft(mx.array(tokens[:k], dtype=mx.int32))

    return propose
