"""A target and its drafter, loaded, and what is learned of them for all conversations alike."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.draft_length import PLAIN, DraftLength
from mlx_drift.decode.prompt_cache import PromptCache, make_prompt_cache
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.trees import Rows, prepare_trees
from mlx_drift.decode.tuned import tuned_costs
from mlx_drift.drafters.copying import CopyingDrafter
from mlx_drift.drafters.head import HeadDrafter
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.drafters.protocol import Drafter
from mlx_drift.serve.footprint import Footprint
from mlx_drift.serve.ranks import Leader
from mlx_drift.target.caches import KVQuantization

REPRODUCIBLE = 3
"""Drafts a round for requests with a seed, where `auto` would choose by the clock."""

PROBED = (0, 1, 6, 23, 64, 192)
"""Where the probe cuts its rows."""

LEAST_CHUNK = 32
MOST_ROUNDS, LEAST_SECONDS = 4, 0.02
"""A chunk takes about so many rounds of the answers that it holds up, and no less than that."""


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        num_draft_tokens: Drafts a round; 0 for plain decoding.
        tree: Rows that the target verifies a round, their drafts a tree, unless a request asks for
            a number of drafts; or `auto`, of numbers that are; None for chains.
        prefill_step_size: Tokens a chunk of a prompt, at most.
        kv_bits: As in `make_prompt_cache`; so the next two.
        max_snapshots: As in `make_prompt_cache`.
    """

    num_draft_tokens: int | Literal["auto"] = "auto"
    prefill_step_size: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = KVQuantization.group_size
    quantized_kv_start: int = KVQuantization.start
    max_snapshots: int = 4
    tree: Rows | None = None


@dataclass(eq=False)
class LoadedModel:
    """A model that answers, on the device's thread. Nothing in it is lazy, whoever made it.

    Attributes:
        name: What it is called.
        model: The target.
        tokenizer: Its tokenizer.
        drafter: Its drafter.
        settings: How it is served.
        vocab_size: Token ids are below it.
        rows_are_alike: A row has the same bits in a chunk of any size, so chunks may be cut
            anywhere. On a GPU, and in some families, they have not.
        footprint: Bytes of a conversation's caches.
        learned: What rounds take, measured by all conversations together; and what the last answer
            found of the drafts.
        row_seconds: What a prompt's token takes, lately.
        round_seconds: What a round takes, lately.
        leader: Tells the other ranks, where the target is cut over several.
    """

    name: str
    model: nn.Module
    tokenizer: TokenizerWrapper
    drafter: Drafter
    settings: Settings
    rows_are_alike: bool = False
    vocab_size: int = field(init=False)
    footprint: Footprint = field(init=False)
    learned: DraftLength = field(init=False)
    row_seconds: float | None = None
    round_seconds: float | None = None
    leader: Leader | None = None

    def __post_init__(self) -> None:
        """Measures what is the same for all conversations."""
        mx.eval(self.drafter.network)
        target = self.make_cache().target
        self.vocab_size = target.shape.vocab_size
        if self.settings.tree is not None:
            prepare_trees(self.drafter, target)
        self.footprint = Footprint.of(self.make_cache(), self.settings.prefill_step_size)
        costs = tuned_costs(self.model, self.drafter, 1024)
        self.learned = DraftLength(costs=costs, ranks=target.ranks)
        self.rows_are_alike = rows_are_alike(self.make_cache())

    @property
    def drafter_kind(self) -> str:
        """What drafts come from that are not copied beside it, in a word."""
        if self.settings.num_draft_tokens == PLAIN:
            return "none"
        drafter = self.drafter
        if isinstance(drafter, CopyingDrafter):
            drafter = drafter.drafter
        if isinstance(drafter, HeadDrafter):
            return str(drafter.config.drafter_type)
        return "prompt-lookup" if isinstance(drafter, PromptLookupDrafter) else "draft-model"

    def make_cache(self) -> PromptCache:
        """Makes the empty caches of a conversation."""
        s = self.settings
        cache = make_prompt_cache(
            self.model,
            self.drafter,
            kv_bits=s.kv_bits,
            kv_group_size=s.kv_group_size,
            quantized_kv_start=s.quantized_kv_start,
            max_snapshots=s.max_snapshots,
        )
        if self.leader is not None:
            self.leader.made(cache)
        return cache

    def fork(self, cache: PromptCache) -> PromptCache:
        """Copies the caches of a conversation."""
        other = cache.fork()
        if self.leader is not None:
            self.leader.made(other, cache)
        return other

    def draft_length(self, asked: int | None, is_seeded: bool) -> DraftLength:
        """Returns what says how many tokens to draft for one answer."""
        tree = None if asked is not None else self.settings.tree
        if isinstance(tree, int):
            return self.learned.for_another(tree - 1, tree=True)
        fixed = self.settings.num_draft_tokens if asked is None else asked
        if fixed == "auto" and is_seeded:
            fixed = REPRODUCIBLE
        if fixed == "auto":
            return self.learned.for_another(None, tree=tree == "auto")
        return self.learned.for_another(fixed)

    def learn(self, statistics: Statistics) -> None:
        """Keeps what an answer that ends found of the drafts, for those to come."""
        if statistics.draft_length is not None and statistics.rounds:
            self.learned = statistics.draft_length

    def cut(self, start: int, is_holding_up: bool) -> int:
        """Says where a chunk of a prompt that begins at some row is to end.

        Args:
            start: The row.
            is_holding_up: Answers are under way, whose rounds wait for it.
        """
        step = self.settings.prefill_step_size
        if not self.rows_are_alike:
            return (start // step + 1) * step  # as a prompt that is read from its beginning
        if not is_holding_up:
            return start + step
        if self.row_seconds is None:
            return start + LEAST_CHUNK
        seconds = max(LEAST_SECONDS, MOST_ROUNDS * (self.round_seconds or 0.0))
        return start + max(LEAST_CHUNK, min(step, int(seconds / self.row_seconds)))

    def note_chunk(self, rows: int, seconds: float) -> None:
        """Learns what a chunk took."""
        self.row_seconds = _lately(self.row_seconds, seconds / rows)

    def note_round(self, seconds: float) -> None:
        """Learns what a round took."""
        self.round_seconds = _lately(self.round_seconds, seconds)


def _lately(before: float | None, now: float) -> float:
    return now if before is None else 0.7 * before + 0.3 * now


def rows_are_alike(cache: PromptCache) -> bool:
    """Tells whether rows have the same bits whatever chunks a prompt is cut into.

    Args:
        cache: An empty cache of the model.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return False  # other kernels for other numbers of rows
    target = cache.target
    size, rows = target.shape.vocab_size, PROBED[-1]
    tokens = mx.random.randint(0, size, (rows,), key=mx.random.key(0))
    fork: Any = target.make_cache()
    whole, _ = target(tokens, fork)
    parts = [target(tokens[a:b], cache.target_cache)[0] for a, b in pairwise(PROBED)]
    return bool(mx.array_equal(whole, mx.concatenate(parts)).item())
