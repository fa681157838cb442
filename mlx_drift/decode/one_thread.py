"""A generator that tells a second thread so, in our own words, while the first is in it."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from mlx_drift.decode.thread_end import clear_streams_at_thread_end
from mlx_drift.errors import DriftError

P = ParamSpec("P")
T = TypeVar("T")


def one_thread_at_a_time(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Makes a generator function's generators raise DriftError where Python raises ValueError."""

    @wraps(function)
    def begin(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return _Guarded(function(*args, **kwargs))

    return begin


class _Guarded(Generator[T, Any, Any]):
    def __init__(self, generator: Any):
        self._generator = generator

    def send(self, value: Any) -> T:
        clear_streams_at_thread_end()
        with _told():
            return self._generator.send(value)

    def throw(self, *error: Any) -> T:
        with _told():
            return self._generator.throw(*error)

    def close(self) -> None:
        with _told():
            self._generator.close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if str(error) != "generator already executing":
            raise
        raise DriftError(
            "another thread is in the middle of this answer; iterate and close it in one thread"
        ) from None
