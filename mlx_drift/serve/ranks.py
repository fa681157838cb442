"""A server over several ranks: rank 0 hears callers and decides, the others take the same steps.

What is decided by the clock, by memory or by who comes is decided once: whose turn it is, where a
prompt is cut, which caches are kept. The others are told each step before rank 0 takes it, so all
make the same collectives in the same order. They know nothing of HTTP.
"""

import itertools
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary, finalize

from mlx_drift.decode.answer import Chunk
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import Cut
from mlx_drift.decode.statistics import Statistics
from mlx_drift.decode.text import Round
from mlx_drift.errors import DriftError
from mlx_drift.grammar.grammar import Grammar
from mlx_drift.ranks.world import Ranks, RanksApart
from mlx_drift.serve.request import Request
from mlx_drift.serve.said import Speech

Steps = Generator[Chunk | Round]


class Leader:
    """Rank 0's side: tells what is about to be done. Used on the device's thread.

    Args:
        ranks: Whom.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._numbers = itertools.count()
        self._caches: WeakKeyDictionary[PromptCache, int] = WeakKeyDictionary()
        self._gone: list[int] = []

    def made(self, cache: PromptCache, of: PromptCache | None = None) -> None:
        """Tells of new caches: empty ones, or a fork of others."""
        number = self._caches[cache] = next(self._numbers)
        finalize(cache, self._gone.append, number)
        self._ranks.tell({"make": number, "of": None if of is None else self._caches[of]})

    def cut(self, cut: Cut) -> Cut:
        """Makes a cut be told whenever it is decided."""

        def told(start: int) -> int:
            stop = cut(start)
            self._ranks.tell({"cut": stop})
            return stop

        return told

    def steps(
        self,
        steps: Steps,
        request: Request,
        cache: PromptCache,
        marks: Iterable[int],
        seed: int,
    ) -> Steps:
        """Tells of each step before it is taken.

        Args:
            steps: The steps.
            request: What they answer.
            cache: What they are taken on.
            marks: After how many tokens others may branch off; it may grow.
            seed: Of what is drawn.
        """
        number = next(self._numbers)
        self._ranks.tell(
            {
                "begin": number,
                "on": self._caches[cache],
                "request": to_json(request),
                "seed": seed,
            }
        )
        try:
            while True:
                gone = [self._gone.pop() for _ in range(len(self._gone))]
                self._ranks.tell({"next": number, "marks": sorted(marks), "gone": gone})
                try:
                    step = next(steps)
                except StopIteration:
                    return
                yield step
        except RanksApart as error:
            self._ranks.end(str(error))
        except (DriftError, GeneratorExit):  # the others meet the one too, and hear of the other
            raise
        except BaseException as error:  # who knows how far each of them came
            self._ranks.end(f"an answer failed ({type(error).__name__})")
        finally:
            self._ranks.tell({"close": number})
            steps.close()

    def times(self, cache: PromptCache) -> None:
        """Tells that plain decoding is about to be timed."""
        self._ranks.tell({"time": self._caches[cache]})

    def leave(self) -> None:
        """Lets the others go."""
        self._ranks.tell({"leave": True})


Begin = Callable[[PromptCache, Request, set[int], Cut, int, Statistics], Steps]
"""Begins an answer: caches, request, marks, cut, seed, statistics."""


def follow(
    ranks: Ranks,
    make_cache: Callable[[], PromptCache],
    begin: Begin,
    time: Callable[[PromptCache], float],
) -> None:
    """Takes rank 0's steps after it until it lets go.

    Signals are rank 0's to hear: it lets answers end, and then the others with it.

    Args:
        ranks: Among whom.
        make_cache: Makes empty caches.
        begin: Begins an answer.
        time: Times plain decoding.

    Raises:
        RanksApart: If this one came to other tokens.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    caches: dict[int, PromptCache] = {}
    answers: dict[int, tuple[Steps, set[int]]] = {}

    def cut(start: int) -> int:
        stop: int = ranks.hear()["cut"]
        return stop

    while "leave" not in (told := ranks.hear()):
        if "make" in told:
            of = told["of"]
            caches[told["make"]] = make_cache() if of is None else caches[of].fork()
        elif "begin" in told:
            marks: set[int] = set()
            request = from_json(told["request"])
            steps = begin(caches[told["on"]], request, marks, cut, told["seed"], Statistics())
            answers[told["begin"]] = steps, marks
        elif "next" in told:
            for number in told["gone"]:
                del caches[number]
            steps, marks = answers[told["next"]]
            marks.update(told["marks"])
            try:
                next(steps, None)
            except RanksApart:
                raise
            except DriftError:
                pass  # rank 0 meets it as well, and tells the caller
        elif "time" in told:
            time(caches[told["time"]])
        else:
            steps, _ = answers.pop(told["close"])
            with suppress(DriftError):
                steps.close()


def to_json(request: Request) -> dict[str, Any]:
    """Returns what JSON holds of a request: all of it, as it comes from callers."""
    values = asdict(request)
    for made_here in ("logits_processors", "sampler"):
        del values["sampling"][made_here]
    return values


def from_json(values: dict[str, Any]) -> Request:
    """Returns the request of which `to_json` returned this."""
    sampling = {**values["sampling"]}
    sampling["xtc_special_tokens"] = tuple(sampling["xtc_special_tokens"])
    penalties = {**values["penalties"]}
    if "logit_bias" in penalties:  # JSON's keys are texts
        penalties["logit_bias"] = {int(k): v for k, v in penalties["logit_bias"].items()}
    grammar, speech = values["grammar"], values["speech"]
    made = {
        "sampling": Sampling(**sampling),
        "penalties": penalties,
        "grammar": None if grammar is None else Grammar(**grammar),
        "speech": None if speech is None else Speech(**speech),
        "stop": tuple(values["stop"]),
        "marks": tuple(values["marks"]),
        "expected": tuple(values["expected"]),
    }
    return Request(**values | made)
