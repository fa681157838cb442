"""MTP heads: found in their model's own shards or beside them, understood as one block of mlx-lm's.

Knows nothing of the EAGLE dialects.
"""
