"""One of the ranks: rank 0 waits in a collective, to which no other ever comes."""

import time

import mlx.core as mx

from mlx_drift.ranks.world import world

ranks = world()
print("joined", flush=True)
if ranks.rank == 0:
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=ranks.group))
time.sleep(600)
