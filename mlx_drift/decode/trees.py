"""Whether a pair can draft trees, asked before the first round."""

from typing import Any, Literal

from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Branches, Drafter
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.tree_check import INSTEAD, check_trees

Rows = int | Literal["auto"]
"""What the target verifies a round, the last token and a tree of drafts; auto where that pays."""

MOST_ROWS = MAX_DRAFT_TOKENS + 1


def prepare_trees(drafter: Drafter, target: Target) -> None:
    """Has a target verify trees of a drafter's from now on.

    Raises:
        DriftError: If one of the two cannot.
    """
    own = getattr(drafter, "drafter", drafter)  # of one that copies beside it
    if not isinstance(own, Branches):
        kind = getattr(getattr(own, "config", None), "drafter_type", type(own).__name__)
        raise DriftError(f"the drafter ({kind}) drafts no trees. {INSTEAD}")
    if not getattr(own, "follows_trees", True):
        raise DriftError(
            "the drafter drafts no trees: the base of its RoPE (dynamic) hangs on how many rows "
            f"there are. {INSTEAD}"
        )
    check_trees(target)


def drafting(num_draft_tokens: int | Literal["auto"] | None, tree: Rows | None) -> dict[str, Any]:
    """Returns how much to draft in `stream_generate`'s keywords, which takes one of them.

    Args:
        num_draft_tokens: Drafts a round; of a tree those that it has.
        tree: Rows of a tree; None for a chain.
    """
    return {"num_draft_tokens": num_draft_tokens} if tree is None else {"tree": tree}


def check_tree(rows: Rows) -> None:
    """Checks how many rows a tree is to have.

    Raises:
        DriftError: If it is no number that makes sense.
    """
    if rows != "auto" and not 2 <= rows <= MOST_ROWS:
        raise DriftError(
            f"tree is {rows}; expected 2 to {MOST_ROWS} rows, the last token and drafts, or auto"
        )
