"""Random draft trees, and a drafter of them that is right as often as it is told to be."""

import random

import mlx.core as mx

from mlx_drift.drafters.protocol import Draft
from tiny import VOCAB, Oracle


def random_parents(rng: random.Random, drafts: int) -> list[int]:
    """A tree of any shape: which draft each follows, −1 for the last committed token."""
    return [rng.randrange(-1, i) for i in range(drafts)]


def path_to(parents: list[int], row: int) -> list[int]:
    """The rows from the last committed token's, which is 0, to one of them."""
    path = [row]
    while path[0]:
        path.insert(0, parents[path[0] - 1] + 1)
    return path


class TreeOracle(Oracle):
    """Drafts trees of any shape, some branch of which follows the true text for a while.

    Args:
        text: Prompt and true continuation.
        taps: What it asks the target for.
        right: How often a draft is the true token, if that was not drafted beside it.
        size: Of the vocabulary.
    """

    def __init__(self, text, taps=(1, 3), right=0.7, size=VOCAB):
        super().__init__(text, [set()], taps)
        self.size = size
        self.rng = random.Random(4)
        self.right = right

    def ingest(self, tokens, taps, cache):
        assert taps.shape[:2] == (tokens.size, len(self.taps))
        cache.tokens += tokens.tolist()
        cache.taps.append(taps)

    def propose_tree(self, k: int, cache, chooser=None) -> Draft:
        parents, drafts = random_parents(self.rng, k), []
        for i, parent in enumerate(parents):
            beside = [drafts[j] for j in range(i) if parents[j] == parent]
            place = len(cache.tokens) + len(path_to(parents, parent + 1)) - 1
            token = self.text[place] if place < len(self.text) else 0
            if token in beside or self.rng.random() > self.right:
                token = self.rng.choice([t for t in range(self.size) if t not in beside])
            drafts.append(token)
        return Draft(mx.array(drafts, mx.int32), parents=mx.array(parents, mx.int32))
