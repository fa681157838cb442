"""What rounds cost here, by context and draft length: the table that `auto` starts from.

What is measured is a round that accepts half its drafts; how many it accepts hardly changes its
cost. No text is needed: the context is a prompt over and over.
"""

import itertools
from collections.abc import Callable, Sequence

import mlx.nn as nn

from mlx_drift.decode.tuned import Table
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.errors import DriftError
from mlx_drift.generate import check_num_draft_tokens
from mlx_drift.measure.speed.rounds import Plan, round_costs

CONTEXTS, LENGTHS = (128, 1024, 4096), (1, 2, 3, 4, 5, 6, 8)
TURNS = 3


def tune(
    model: nn.Module,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    contexts: Sequence[int] = CONTEXTS,
    lengths: Sequence[int] = LENGTHS,
    turns: int = TURNS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Measures plain steps and rounds of some lengths, in turns.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        prompt: Token ids, repeated to fill a context.
        contexts: Lengths of context, in tokens.
        lengths: Draft lengths.
        turns: How often each length has its turn.
        progress: Told after each turn of all.

    Returns:
        Seconds by context and draft length; of a plain step under 0.

    Raises:
        DriftError: If a length is out of range.
    """
    for length in lengths:
        check_num_draft_tokens(length)
    if too_short := [context for context in contexts if context < 2]:
        raise DriftError(f"the context is {too_short[0]} tokens; expected at least 2")
    done, total = 0, len(contexts) * (turns + 1)
    table: Table = {}

    def told() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for context in contexts:
        tokens = list(itertools.islice(itertools.cycle(prompt), context))
        plans = [Plan(k, accepted=(k + 1) // 2) for k in lengths]
        costs, plain = round_costs(model, drafter, tokens, plans, turns=turns, progress=told)
        table[context] = {0: plain} | {c.plan.num_draft_tokens: c.seconds for c in costs}
    return table
