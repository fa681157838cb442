"""One target over several processes: who they are, that they agree, and how it is cut.

Every rank runs the same program on the same input, with the whole drafter. What a layer sums over
the ranks is the same on each, so the tokens are too; `Ranks.read` checks that, round by round.
"""
