"""What the attention of a block drafter reads: rows of context that stay, a block that does not."""

import mlx.core as mx

from mlx_drift.drafters.cache import ChainCache, weigh


class BlockCache(ChainCache):
    """Keys and values of the context, to which a block is attended and forgotten.

    Lineages differ in what a slot sees. Inside the block all slots or only those before it
    (`causal`); of the context under a window W either its own last W keys, as its position counts
    (`by_slot`: z-lab, SpecForge), or what the block's first slot sees of it and one more
    (vllm-project/speculators `models/dflash/attention.py`).

    Args:
        window: How many rows of the context are seen, at most; None for all.
        sinks: The first rows, which stay visible beyond the window.
        by_slot: Whether a slot's window moves with its position.
        causal: Whether a slot sees only the slots before it.
    """

    def __init__(self, window: int | None, sinks: int, by_slot: bool, causal: bool):
        # Of the rows that a cache shows beside a new one there are window − 1.
        super().__init__(window if window is None or by_slot else window + 1, sinks)
        self.by_slot = by_slot
        self.causal = causal

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Appends rows of context; shapes as in `attend`, keys rotated at positions `offset …`."""
        self.rows.update_and_fetch(keys, values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Attends to the context and the block, and forgets the block; shapes as `ChainCache`'s."""
        slots = queries.shape[2]
        keys, values = self.rows.update_and_fetch(keys, values)
        self.rows.trim(slots)
        mask = self._visible(slots, keys.shape[2] - slots)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def weights(self, queries: mx.array, scale: float) -> mx.array:
        """Returns what the slots of the block attended last look at.

        Args:
            queries: Theirs, as `attend` was given them.
            scale: Factor of the scores.

        Returns:
            `[heads, B, offset + B]` float32: the context, then the block; 0 where it is not seen.
        """
        slots, context = queries.shape[2], self.offset
        keys = self.rows.keys[..., : context + slots, :]  # the block is forgotten, not yet gone
        key, row = mx.arange(context + slots), mx.arange(context, context + slots)[:, None]
        visible = key <= row if self.causal else mx.ones((slots, context + slots), mx.bool_)
        if self.window is not None:
            seen_from = row if self.by_slot else context
            in_reach = (seen_from - key < self.window) | (key < min(self.sinks, context))
            visible = visible & in_reach
        return weigh(queries, keys, visible, scale)

    def _visible(self, slots: int, context: int) -> mx.array | str | None:
        """Returns the mask over `context` rows and a block of slots `[slots, context + slots]`."""
        moves = self.by_slot and self.window is not None and context + slots > self.window
        if not moves or self.window is None:
            return "causal" if self.causal else None
        row, key = mx.arange(context, context + slots)[:, None], mx.arange(context + slots)
        visible = (row - key < self.window) | (key < min(self.sinks, context))
        return visible & (key <= row) if self.causal else visible
