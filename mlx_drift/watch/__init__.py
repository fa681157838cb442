"""Watching a drafter at work: what its chain recycles and attends to. Its drafts stay the same.

Stands below `measure`, which takes means over many answers, and `serve`, which shows rounds.
"""
