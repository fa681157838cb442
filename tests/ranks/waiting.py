"""One of the ranks: rank 0 waits in a collective, to which no other ever comes."""

import time
from contextlib import suppress

import mlx.core as mx

from mlx_drift.ranks.world import world

ranks = world()
print("joined", flush=True)
if ranks.rank == 0:
    with suppress(RuntimeError):  # the ring may notice as well
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=ranks.group))
time.sleep(600)
