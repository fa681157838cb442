"""The models that are served: a default one, and those that are allowed beside it.

Only names that the operator gave are ever loaded: a request names one of them, or gets a 404, and
what is loaded stays loaded. Models are loaded by a thread of its own, one after another, while
answers go on; the device's thread makes room before, between two turns.
"""

import fnmatch
import gc
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_drift.errors import DriftError
from mlx_drift.files.hub import resolve
from mlx_drift.files.paths import existing
from mlx_drift.serve.engine import Engine
from mlx_drift.serve.model import LoadedModel

ALIASES = ("default_model", "default")
"""What mlx-lm's server calls the model it was started with."""

FULL = 0.9
"""The part of the machine's memory that weights and caches may take before a model is unloaded."""


@dataclass(eq=False)
class Known:
    """A model that may be asked for.

    Attributes:
        name: What it is called in answers.
        load: Loads it, on the loading thread, and leaves nothing lazy: that is this thread's.
        weights: Bytes of its weights, as far as they are on this machine already.
        names: What it is called in requests.
        loaded: It, if it is.
        used_at: When it was asked for last, in seconds of `time.monotonic`.
        created: When the server came to know it, in seconds since 1970.
    """

    name: str
    load: Callable[[], LoadedModel]
    weights: Callable[[], int]
    names: frozenset[str]
    loaded: LoadedModel | None = None
    used_at: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))


class NotServed(Exception):
    """A request names a model that is not served."""


class Models:
    """Finds and loads models.

    Args:
        engine: Whose thread makes room, and has what was loaded.
        known: All that may be asked for, the default one first.
        patterns: Other names that the default one answers to, as of a shell.
        memory: Bytes that the machine has for all.
        idle_seconds: After how long without a request a model is unloaded; None for never.
    """

    def __init__(
        self,
        engine: Engine,
        known: Sequence[Known],
        *,
        patterns: Sequence[str] = (),
        memory: int,
        idle_seconds: float | None = None,
    ):
        self.engine = engine
        self.known = list(known)
        self.patterns = list(patterns)
        self.memory = memory
        self.idle_seconds = idle_seconds
        self._wanted: queue.SimpleQueue[tuple[Known, Future[LoadedModel]]] = queue.SimpleQueue()
        self._loading = False
        # One thread for all: MLX keeps something of every thread that ever computed.
        threading.Thread(target=self._load_all, name="loading", daemon=True).start()

    @property
    def is_loading(self) -> bool:
        """Whether a model is being read."""
        return self._loading

    def find(self, name: str | None) -> Known:
        """Finds a model by the name of a request; the default one for None.

        Raises:
            NotServed: If there is none.
        """
        default = self.known[0]
        if name is None or name in ALIASES:
            return default
        for known in self.known:
            if name in known.names:
                return known
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns):
            return default
        raise NotServed(
            f"the model {name!r} is not served; GET /v1/models lists those that are. Serve it with "
            "--model or --allow-models, or let the default answer with --any-model-name"
        )

    def get(self, known: Known) -> "Future[LoadedModel]":
        """Returns a model, which is loaded if it is not."""
        known.used_at = time.monotonic()
        future: Future[LoadedModel] = Future()
        if known.loaded is not None:
            future.set_result(known.loaded)
        else:
            self._wanted.put((known, future))
        return future

    def unload_idle(self) -> bool:
        """Unloads what nobody asked for lately; on the device's thread, when nothing runs."""
        if self.idle_seconds is None:
            return False
        before = time.monotonic() - self.idle_seconds
        idle = [k for k in self.known if k.loaded is not None and k.used_at < before]
        for known in idle:
            self._unload(known)
        return bool(idle)

    def _load_all(self) -> None:
        """Loads what is wanted, one after another, for as long as the process lives."""
        while True:
            self._answer(*self._wanted.get())  # while it waits, this thread holds no model

    def _answer(self, known: Known, future: "Future[LoadedModel]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        self._loading = True
        loaded, failure = None, None
        try:
            loaded = self._load(known)
        except BaseException as error:  # whatever it is, it is the caller's
            failure = error
        self._loading = False
        if loaded is not None:
            future.set_result(loaded)
        else:
            for one in (future, *self._waiting_for(known)):
                one.set_exception(failure)

    def _waiting_for(self, known: Known) -> "list[Future[LoadedModel]]":
        """Takes out of the queue who waits for a model; the others stay in their order."""
        futures, others = [], []
        while not self._wanted.empty():
            one = self._wanted.get()
            if one[0] is not known:
                others.append(one)
            elif one[1].set_running_or_notify_cancel():
                futures.append(one[1])
        for one in others:
            self._wanted.put(one)
        return futures

    def _load(self, known: Known) -> LoadedModel:
        if (loaded := known.loaded) is not None:
            return loaded
        weights = known.weights()  # the Hub may be asked, for which the device does not wait
        self.engine.call(lambda: self._make_room(known, weights)).result()
        known.loaded = known.load()
        return known.loaded

    def _make_room(self, known: Known, weights: int) -> None:
        """Unloads others until there is memory for a model; on the device's thread."""
        others = sorted((k for k in self.known if k.loaded), key=lambda k: k.used_at)
        for other in others:
            if mx.get_active_memory() + weights <= FULL * self.memory:
                break
            if other.loaded in self.engine.models_in_use():
                continue
            self._unload(other)
        if weights and mx.get_active_memory() + weights > self.memory:
            raise DriftError(
                f"{known.name} needs {weights} bytes, and with what is loaded that is more than "
                f"the machine's {self.memory}; try again when the other models are not answering"
            )

    def _unload(self, known: Known) -> None:
        if known.loaded is not None:
            self.engine.store.forget(known.loaded)
        known.loaded = None
        gc.collect()
        mx.clear_cache()


def called(source: str) -> str:
    """Returns what a model is called: a repository as it is, a folder by its last part."""
    path = existing(source)
    return source if path is None else path.resolve().name


def weight_bytes(source: str) -> int:
    """Returns the bytes of a model's weights on this machine; 0 if they are not there yet.

    Raises:
        DriftError: If it is neither a folder nor a Hub repository that can be had.
    """
    folder = resolve(source, "model", None, ["config.json"])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
