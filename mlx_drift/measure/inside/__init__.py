"""Inside a drafter: size, direction and attention of every chain step, and interventions.

Knows nothing of question files, nor of the clock.
"""
