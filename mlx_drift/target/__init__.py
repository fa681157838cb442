"""An mlx-lm model seen as tokens in, logits and taps out, exact rollback; its caches.

Knows nothing of drafters.
"""
