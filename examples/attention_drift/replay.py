"""The rounds in which a drafter would have helped to say a text that is known already.

Two ways to the same rounds, those of `mlx_drift.measure.acceptance.asking.answer`:

- `unroll` drafts a chain behind every token of the text at once, as training does, but each chain
  with its own tokens; `rounds` then reads off which of the chains greedy decoding would have begun.
- `replay` goes from round to round, through the caches of decoding, which know windows.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from attention_drift.texts import Text
from mlx_drift.drafters.cache import TrainTimeTestCache
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.measure.inside.drift import RECENT
from mlx_drift.watch.observe import Chain, Observed
from mlx_drift.watch.sums import Split, Sums, add_up

SINKS = 1
"""The first of a drafter's rows: the target is a Llama."""

Drafts = npt.NDArray[np.int32]
"""`[L, K]`: row i continues tokens 0 … i + 1."""

Rounds = list[tuple[int, int]]
"""Of each round, how many drafts were tested and how many accepted."""


def unroll(drafter: ChainDrafter, text: Text, k: int, forced: bool = False) -> tuple[Drafts, Chain]:
    """Drafts a chain of k tokens behind every token but the first, and watches.

    Args:
        drafter: A drafter without a window.
        text: What it drafts.
        k: Chain steps.
        forced: Feed each step the text's token, as training does, and not the drafted one.
    """
    seen = Observed(drafter.network, rows=len(text.tokens))
    caches = [TrainTimeTestCache(None) for _ in drafter.network.layers]
    said = mx.array(text.tokens + [0] * k, dtype=mx.int32)
    rows = len(text.tokens) - 1
    read, state = said[1 : rows + 1], seen.fuse(text.taps(drafter))
    drafts = []
    for step in range(k):
        normed, state = seen(drafter._embed(read), state, caches)
        drafts.append(drafter.choose(drafter._head(normed)))
        read = said[step + 2 : rows + step + 2] if forced else drafts[-1]
    return np.array(mx.stack(drafts, axis=1)), seen.take_last()


def rounds(drafts: Drafts, text: Text, k: int) -> tuple[Rounds, list[int]]:
    """Returns the greedy rounds of k drafts, and the rows of those that draft all k."""
    found: Rounds = []
    whole: list[int] = []
    said = text.prompt
    while said < len(text.tokens):
        drafted = min(k, text.prompt + text.room - said - 1)
        if drafted == k:
            whole.append(said - 2)
        found.append(_outcome(drafts[said - 2, :drafted].tolist(), text.tokens[said:]))
        said += found[-1][1] + 1
    return found, whole


def replay(drafter: ChainDrafter, text: Text, k: int) -> Iterator[tuple[int, int]]:
    """Yields the greedy rounds of k drafts."""
    tokens, taps = mx.array(text.tokens, dtype=mx.int32), text.taps(drafter)
    cache = drafter.make_cache()
    drafter.start(tokens[:1], cache)
    before, said = 1, text.prompt
    while said < len(text.tokens):
        drafter.ingest(tokens[before:said], taps[before - 1 : said - 1], cache)
        drafted = min(k, text.prompt + text.room - said - 1)
        drafts: Any = drafter.propose(drafted, cache).tokens.tolist()
        outcome = _outcome(drafts, text.tokens[said:])
        before, said = said, said + outcome[1] + 1
        yield outcome


def _outcome(drafts: list[int], wanted: list[int]) -> tuple[int, int]:
    """Returns how many drafts are tested, and accepted; after the text nothing is wanted."""
    right = [draft == token for draft, token in zip(drafts, wanted, strict=False)]
    accepted = [*right, False].index(False)
    return min(accepted + 1, len(drafts), len(wanted)), accepted


def add_up_rows(chain: Chain, text: Text, rows: list[int]) -> Sums:
    """Adds up what `mlx_drift.measure.inside.drift` measures over some rows' chains."""
    split = Split(text.prompt - 1, SINKS, RECENT)
    of: Any = mx.array(rows)
    return add_up(chain, of, [row + 1 for row in rows], split)
