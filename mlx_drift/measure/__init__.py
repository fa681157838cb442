"""Measuring: what a drafter is worth on its target, and which conventions it was trained with."""
