"""One of the ranks that serve beside rank 0: it takes the steps that it is told of.

It knows nothing of HTTP, of turns or of the store: `mlx_drift.serve.ranks` tells what was decided.
"""

import signal
from contextlib import suppress

from mlx_drift.decode.draft_length import PLAIN
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.statistics import Statistics
from mlx_drift.errors import DriftError
from mlx_drift.ranks.world import Ranks, RanksApart
from mlx_drift.serve.conversation import seconds_of_plain_step, steps_of
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.ranks import Steps, from_json


def follow(model: LoadedModel, ranks: Ranks) -> None:
    """Takes rank 0's steps after it until it lets go.

    Signals are rank 0's to hear: it lets answers end, and then the others with it.

    Args:
        model: This rank's part.
        ranks: Among whom.

    Raises:
        RanksApart: If this one came to other tokens.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    caches: dict[int, PromptCache] = {}
    answers: dict[int, tuple[Steps, set[int], Statistics]] = {}

    def cut(start: int) -> int:
        stop: int = ranks.hear()["cut"]
        return stop

    while "leave" not in (told := ranks.hear()):
        if "make" in told:
            of = told["of"]
            caches[told["make"]] = model.make_cache() if of is None else caches[of].fork()
        elif "begin" in told:
            marks: set[int] = set()
            statistics = Statistics()
            cache, request = caches[told["on"]], from_json(told["request"])
            steps = steps_of(model, cache, request, marks, cut, told["seed"], statistics)
            answers[told["begin"]] = steps, marks, statistics
        elif "next" in told:
            for number in told["gone"]:
                del caches[number]
            steps, marks, _ = answers[told["next"]]
            marks.update(told["marks"])
            try:
                next(steps, None)
            except RanksApart:
                raise
            except DriftError:
                pass  # rank 0 meets it as well, and tells the caller
        elif "time" in told:
            seconds_of_plain_step(caches[told["time"]])
        elif "plain" in told:
            model.learned.costs.know(PLAIN, told["plain"])
        else:
            steps, _, statistics = answers.pop(told["close"])
            with suppress(DriftError):
                steps.close()
            model.learn(statistics)
