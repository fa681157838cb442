"""What a round costs and what drafting gains: benches, random pairs of real shapes, `tune`.

Knows nothing of question files, nor of what goes on inside a drafter.
"""
