"""A server over several ranks: rank 0 hears callers and decides, the others take the same steps.

What is decided by the clock, by memory or by who comes is decided once: whose turn it is, where a
prompt is cut, which caches are kept. The others are told each step before rank 0 takes it, so all
make the same collectives in the same order. They know nothing of HTTP.
"""

import itertools
from collections.abc import Generator, Iterable
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary, finalize

from mlx_drift.decode.answer import Chunk
from mlx_drift.decode.prompt_cache import PromptCache
from mlx_drift.decode.sampling import Sampling
from mlx_drift.decode.speculate import Cut
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

    def begin(self, request: Request, cache: PromptCache, seed: int) -> int:
        """Tells of an answer.

        Args:
            request: What it answers.
            cache: What its steps are taken on.
            seed: Of what is drawn.

        Returns:
            Its number, to be closed with.
        """
        number = next(self._numbers)
        on = self._caches[cache]
        self._ranks.tell({"begin": number, "on": on, "request": to_json(request), "seed": seed})
        return number

    def steps(self, number: int, steps: Steps, marks: Iterable[int]) -> Steps:
        """Tells of each step of an answer before it is taken.

        Args:
            number: Which answer.
            steps: Its steps.
            marks: After how many tokens others may branch off; it may grow.
        """
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
            steps.close()

    def close(self, number: int) -> None:
        """Tells that an answer is about to be closed, whole or not."""
        self._ranks.tell({"close": number})

    def times(self, cache: PromptCache) -> None:
        """Tells that plain decoding is about to be timed."""
        self._ranks.tell({"time": self._caches[cache]})

    def timed(self, seconds: float) -> None:
        """Tells what a token of it takes."""
        self._ranks.tell({"plain": seconds})

    def leave(self) -> None:
        """Lets the others go."""
        self._ranks.tell({"leave": True})


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
