"""Question sets asked with drafters, and what is accepted of their drafts.

Knows nothing of what goes on inside a drafter, nor of the clock.
"""
