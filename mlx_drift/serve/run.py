"""`serve`: everything put together, from a bound socket to a clean end."""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from mlx_drift.doctor.memory import machine_memory
from mlx_drift.errors import DriftError
from mlx_drift.ranks.world import world
from mlx_drift.serve.api.served import Defaults
from mlx_drift.serve.disk import DiskStore
from mlx_drift.serve.engine import Engine, Limits
from mlx_drift.serve.follower import follow
from mlx_drift.serve.guard import Guard, is_loopback
from mlx_drift.serve.http import Server
from mlx_drift.serve.metrics import Metrics
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.models import Known, Models
from mlx_drift.serve.ranks import Leader
from mlx_drift.serve.store import Store

SHARE = 0.25
"""The part of the machine's memory that caches may take, unless `cache_bytes` says."""

SAVING = 0.3
"""The part of the shutdown's seconds that is left for writing caches."""

LEAVING = 0.1
"""The part of them, the last, in which nothing new is begun."""


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        host: The address to listen on; another than this machine's own needs a key.
        port: The port; 0 for any that is free.
        api_key: What callers must show.
        hosts: Further names that callers may call this server.
        origins: Web pages that may ask.
        patterns: Further model names that the default model answers to.
        limits: What is taken on.
        cache_bytes: Bytes of all caches; None for `SHARE` of the machine's memory.
        cache_dir: Where caches are kept on disk.
        cache_dir_bytes: Bytes of those.
        idle_seconds: After how long without a request a model is unloaded.
        body_seconds: In which a request's body must have come.
        shutdown_seconds: In which answers may end once the server is told to.
        keepalive: Seconds of silence after which a stream says something.
        defaults: What holds for a request that does not say.
        log_prompts: Write prompts to stderr.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    patterns: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    cache_bytes: int | None = None
    cache_dir: Path | None = None
    cache_dir_bytes: int = 20 << 30
    idle_seconds: float | None = None
    body_seconds: float = 30.0
    shutdown_seconds: float = 10.0
    keepalive: float = 5.0
    defaults: Defaults = field(default_factory=Defaults)
    log_prompts: bool = False


def serve(
    known: Sequence[Known],
    options: Options,
    say: Callable[[str], None],
    ready: Callable[[str, str], None] = lambda name, url: None,
) -> None:
    """Serves until it is told to stop (SIGTERM or SIGINT).

    Args:
        known: The models that may be asked for, the default one first, which is loaded at once.
        options: How to serve.
        say: Told where it listens, and what an operator should know.
        ready: Told the default model's name and the address of the API, once it listens.

    Raises:
        DriftError: If the port is taken, the model cannot be loaded, or the options do not fit.
    """
    if options.api_key == "":
        raise DriftError(
            "the API key is empty; give one with --api-key or MLX_DRIFT_API_KEY, or neither of them"
        )
    if options.api_key is None and not is_loopback(options.host):
        raise DriftError(
            f"--host {options.host} can be reached from other machines; that needs --api-key, or "
            "MLX_DRIFT_API_KEY in the environment"
        )
    ranks = world()
    if ranks.size > 1:
        _check_for_ranks(known, options)
    memory = min(ranks.exchange(machine_memory()))  # rank 0 decides what all keep
    if ranks.rank:
        follow(known[0].load(), ranks)
        return
    listener = _listen(options.host, options.port)
    bound = int(SHARE * memory) if options.cache_bytes is None else options.cache_bytes
    disk = None
    if options.cache_dir is not None:
        disk = DiskStore(options.cache_dir, options.cache_dir_bytes)
    metrics, store = Metrics(), Store(bound, disk)
    metrics.bound(bound)
    engine = Engine(store, options.limits, metrics)
    models = Models(
        engine, known, patterns=options.patterns, memory=memory, idle_seconds=options.idle_seconds
    )
    engine.when_idle = lambda: store.save_one() or models.unload_idle()
    engine.start()
    told: _Told | None = None
    leader: Leader | None = None
    try:
        loaded: LoadedModel = models.get(known[0]).result()
        if ranks.size > 1:
            leader = loaded.leader = Leader(ranks)
        server = Server(
            engine=engine,
            models=models,
            metrics=metrics,
            guard=Guard(options.host, options.api_key, options.hosts),
            defaults=options.defaults,
            keepalive=options.keepalive,
            body_seconds=options.body_seconds,
            log_prompts=options.log_prompts,
            origins=options.origins,
        )
        for line in _remarks(loaded, bound):
            say(line)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            server.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, int(options.shutdown_seconds)),
        )
        told = _Told(config, engine, options.shutdown_seconds)
        url = f"http://{shown}:{port}/v1"
        say(f"serving {loaded.name} on {url}")
        ready(loaded.name, url)
        del loaded  # or it would stay in memory when it is unloaded
        told.run(sockets=[listener])
    finally:
        listener.close()
        engine.close(0.0)
        signalled = None if told is None else told.deadline  # None: a fault ends it
        deadline = signalled or time.monotonic() + options.shutdown_seconds
        engine.call(lambda: _save(store, deadline - options.shutdown_seconds * LEAVING))
        has_ended = engine.join(max(0.0, deadline - time.monotonic()))
        if has_ended and told is not None and leader is not None:
            leader.leave()
        if signalled and not has_ended:
            _leave(say, "the device was still at work at the deadline; its caches are not saved")
        if signalled and models.is_loading:
            _leave(say, "a model was still being loaded")


def _check_for_ranks(known: Sequence[Known], options: Options) -> None:
    """Refuses what does not go with several ranks yet.

    Raises:
        DriftError: If something of it is asked for.
    """
    refused = {
        "--allow-models": len(known) > 1,
        "--idle-unload": options.idle_seconds is not None,
        "--cache-dir": options.cache_dir is not None,
    }
    if asked := [flag for flag, is_asked in refused.items() if is_asked]:
        raise DriftError(f"{asked[0]} does not go with several ranks; leave it out")


def _leave(say: Callable[[str], None], why: str) -> NoReturn:
    """Ends the process beside a thread that is still at work in MLX.

    The interpreter's own end would take the thread's next step away from under MLX, which aborts
    the process. What was written to disk is whole: caches are written aside and renamed.
    """
    say(why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Told(uvicorn.Server):
    """Ends when a signal says so, answers first; a second one ends them too.

    Attributes:
        deadline: When all must have ended, in seconds of `time.monotonic`; None before a signal.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float):
        super().__init__(config)
        self.deadline: float | None = None
        self._engine = engine
        self._seconds = seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self._seconds
        self._engine.close(0.0 if self.should_exit else self._seconds * (1 - SAVING))
        self.should_exit = True


def _save(store: Store, deadline: float) -> None:
    while time.monotonic() < deadline and store.save_one():
        pass


def _listen(host: str, port: int) -> socket.socket:
    """Binds the port.

    Raises:
        DriftError: If it cannot.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise DriftError(
            f"cannot listen on {host} port {port} ({error.strerror}); give another --host or --port"
        ) from None
    return listener


def _remarks(loaded: LoadedModel, bound: int) -> list[str]:
    """What an operator should know, a line each."""
    lines = [f"caches: at most {bound / 2**30:.2f} GiB (--cache-bytes)"]
    if not loaded.rows_are_alike:
        lines.append(
            f"prompts are read in chunks of {loaded.settings.prefill_step_size} tokens also while "
            "answers are under way: here a chunk's size changes the bits of its rows "
            "(--prefill-step-size)"
        )
    return lines
