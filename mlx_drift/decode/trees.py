"""Whether a pair can draft trees, asked before the first round."""

from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.drafters.protocol import MAX_DRAFT_TOKENS, Branches, Drafter
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.tree_check import INSTEAD, check_trees

MOST_ROWS = MAX_DRAFT_TOKENS + 1


def drafting_trees(rows: int, drafter: Drafter, target: Target) -> DraftLength:
    """Returns what has rounds draft trees.

    Args:
        rows: What the target verifies a round: the last token, and the drafts.
        drafter: The drafter.
        target: The target, which verifies trees from then on.

    Raises:
        DriftError: If the number makes no sense, or one of the two cannot.
    """
    check_tree(rows)
    own = getattr(drafter, "drafter", drafter)  # of one that copies beside it
    if not isinstance(own, Branches):
        kind = getattr(getattr(own, "config", None), "drafter_type", type(own).__name__)
        raise DriftError(f"the drafter ({kind}) drafts no trees. {INSTEAD}")
    check_trees(target)
    return DraftLength(rows - 1, tree=True)


def check_tree(rows: int) -> None:
    """Checks how many rows a tree is to have.

    Raises:
        DriftError: If it is no number that makes sense.
    """
    if not 2 <= rows <= MOST_ROWS:
        raise DriftError(
            f"tree is {rows}; expected 2 to {MOST_ROWS} rows: the last token and drafts"
        )
