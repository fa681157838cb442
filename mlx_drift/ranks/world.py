"""The ranks that `mlx.launch` started: one of them speaks, and all end together.

Notable:
- What all must know (versions, files, seeds, requests) goes over small messages of our own
  (`mlx_drift.ranks.wire`), not over the device; MLX's collectives are the model's, and the one of
  `Ranks.read`. All of them are made by one thread, so that their order is the same everywhere.
- A rank that ends before the others, however, ends them: a collective that waits for it would wait
  forever, so nothing but the process's end helps.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.errors import DriftError, brief, printable
from mlx_drift.ranks.wire import Connection, Frame, admit, connect, listen

SECONDS_OF_GRACE = 2.0
"""In which rank 0 may meet the error that another rank met, and tell it as its own."""

GREETING_BYTES = 512
MOST_RANKS = 1 << 16

RESTART = "start with mlx.launch, or unset MLX_RANK"


class RanksApart(DriftError):
    """Ranks came to other tokens: nothing that follows can be trusted."""


class Ranks:
    """The processes over which a model may be cut, seen from one of them.

    Args:
        group: MLX's own; None for one process alone.

    Attributes:
        rank: This one's number; 0 speaks.
        size: How many there are.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self._peers: dict[int, Connection] = {}
        self._finished, self._failing = Event(), Event()
        self._last_words = Lock()
        self._due: list[tuple[float, Callable[[float], None]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        """Returns itself: what keeps it may be copied, the processes are the same."""
        return self

    def connect(self, addresses: list[str]) -> None:
        """Connects rank 0 with the others.

        Args:
            addresses: Where rank 0 may be found.

        Raises:
            DriftError: If one does not come, or rank 0 cannot be reached.
        """
        if self.rank == 0:
            listener, secret = listen(addresses[0])
            greeting = [secret, listener.getsockname()[1], socket.gethostname()]
            self._greet(json.dumps(greeting))
            channels = admit(listener, secret, self.size - 1)
        else:
            secret, port, name = json.loads(self._greet(""))
            channels = {0: connect([*addresses, name], port, secret, self.rank)}
        for peer, channel in channels.items():
            self._peers[peer] = Connection(peer, channel, self._heard, self._lost)

    def _greet(self, text: str) -> str:
        """Tells all what rank 0 says, the only thing that goes over MLX for want of another way."""
        said = list(text.encode().ljust(GREETING_BYTES)) if text else [0] * GREETING_BYTES
        summed: Any = mx.distributed.all_sum(mx.array(said), group=self.group, stream=mx.cpu)
        return bytes(summed.tolist()).decode().strip()

    def exchange(self, mine: Any = None) -> list[Any]:
        """Returns what every rank says, by rank; all of them must ask.

        Args:
            mine: What this one says: anything that JSON holds.
        """
        if self.size == 1:
            return [mine]
        if self.rank == 0:
            others = [self._peers[peer].frames.get()["says"] for peer in range(1, self.size)]
            said = [mine, *others]
            self._tell({"says": said})
            return said
        self._tell({"says": mine})
        answer: list[Any] = self._peers[0].frames.get()["says"]
        return answer

    def check_same(self, what: str, mine: Mapping[str, Any], advice: str) -> None:
        """Checks that ranks have the same, key by key; what only one has is no matter.

        Raises:
            DriftError: If they do not, on all of them.
        """
        said = self.exchange(dict(mine))
        for key, value in said[0].items():
            for rank, theirs in enumerate(said):
                if key in theirs and theirs[key] != value:
                    raise DriftError(
                        f"{what}: {key} is {value} on rank 0 and {theirs[key]} on rank {rank}. "
                        f"{advice}"
                    )

    def read(self, verdict: mx.array, beside: mx.array | None = None) -> list[int]:
        """Reads back a round's verdict, and checks that all ranks have the same.

        It is the round's one synchronisation, and stays so: the comparison comes along, and so does
        what is due of `share`.

        Args:
            verdict: Integers `[n]`.
            beside: Further ones `[m]` that must be the same too, and are not returned.

        Raises:
            RanksApart: If they differ, on all ranks.
        """
        if self.size == 1:
            read: list[int] = verdict.tolist()  # type: ignore[assignment]
            return read
        due, self._due = self._due, []
        compared = [one.astype(mx.int32) for one in (verdict, beside) if one is not None]
        microseconds = mx.array([max(1, round(1e6 * seconds)) for seconds, _ in due], mx.int32)
        joined = mx.concatenate([microseconds, *compared])[None]
        gathered: Any = mx.distributed.all_gather(joined, group=self.group)
        rows: list[list[int]] = gathered.tolist()
        for (_, note), of_first in zip(due, rows[0], strict=False):
            note(of_first / 1e6)
        rows = [row[len(due) :] for row in rows]
        apart = next((rank for rank, row in enumerate(rows) if row != rows[0]), None)
        if apart is not None:
            raise RanksApart(
                f"rank {apart} came to other tokens than rank 0, so the answer ends here. The "
                "ranks must compute alike: the same kind of machine, and the same packages"
            )
        return rows[0][: verdict.size]

    def share(self, seconds: float, note: Callable[[float], None]) -> None:
        """Notes what rank 0 measured, on all ranks; so all decide alike by its clock.

        One alone notes it at once, several with their next `read`. All of them must call, in the
        same order.

        Args:
            seconds: What this one measured.
            note: Called with what rank 0 did, to the microsecond.
        """
        if self.size == 1:
            note(seconds)
        else:
            self._due.append((seconds, note))

    def sum(self, states: mx.array) -> mx.array:
        """Adds what all ranks have, lazily: the same bits on each."""
        return mx.distributed.all_sum(states, group=self.group)

    def join_columns(self, part: mx.array) -> mx.array:
        """Joins the parts `[M, N]` that the ranks have of a matrix, side by side, lazily."""
        return mx.distributed.all_gather(part.T, group=self.group).T

    def finish(self) -> None:
        """Waits until all ranks are through; from then on any of them may end.

        Call it before an answer that is told whole, so that there is none if a rank is missing.
        """
        if self.size == 1 or self._finished.is_set():
            return
        if self.rank:
            self._tell({"ends": True})
            self._peers[0].frames.get()
            return
        for peer in self._peers.values():
            peer.frames.get()
        self._finished.set()
        self._tell({"ends": True})

    def tell(self, value: Any) -> None:
        """Tells all others something, from rank 0; they have to `hear` it."""
        self._tell({"says": value})

    def hear(self) -> Any:
        """Waits for what rank 0 tells next, in the order in which it does."""
        return self._peers[0].frames.get()["says"]

    def end(self, line: str) -> NoReturn:
        """Ends this process at once, and the others with it."""
        with self._last_words:
            if self.rank == 0 and sys.stderr is not None:
                # In one piece: MLX's ring tells of the same loss there, from a thread of its own.
                sys.stderr.write(f"error: {printable(line)}\n")
                sys.stderr.flush()
            os._exit(1)

    def fail(self, line: str | None) -> None:
        """Ends the other ranks: this one is about to end, with an error.

        Args:
            line: The error, for rank 0 to tell if it does not meet it; None if there is none to
                tell.
        """
        if self.size == 1 or self._finished.is_set():
            return
        self._failing.set()
        self._tell({"fails": line})

    def _tell(self, frame: Frame) -> None:
        for peer in self._peers.values():
            peer.send(frame)

    def _heard(self, peer: int, frame: Frame) -> None:
        if "ends" in frame and self.rank:
            self._finished.set()  # here, so that the end of rank 0 is not taken for its death
        if "fails" in frame:
            why = frame["fails"] or "ended before the answer was whole"
            self._end(f"rank {peer}: {why}", SECONDS_OF_GRACE)

    def _lost(self, peer: int) -> None:
        self._end(f"rank {peer}: ended before the answer was whole", 0.0)

    def _end(self, line: str, grace: float) -> None:
        """Ends this process, unless it is through or about to end by itself."""
        if self._finished.is_set() or (self.rank == 0 and self._failing.wait(grace)):
            return
        self.end(line)


ALONE = Ranks()


@cache
def world() -> Ranks:
    """Returns the ranks that this process was started among; the first call joins them.

    Raises:
        DriftError: If the others cannot be reached.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise DriftError("several ranks under MPI: use mlx.launch with --backend ring, or jaccl")
    if own_rank() is None or _ring() == []:  # the latter with mlx.launch -n 1
        return ALONE
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise DriftError(f"the ranks do not find each other: {error}") from None
    if group.size() == 1:
        return ALONE
    ranks = Ranks(group)
    ranks.connect(_addresses())
    return ranks


def ranks_of(model: nn.Module) -> Ranks:
    """Returns the ranks that a model is cut over; one alone if it is whole."""
    ranks: Ranks = getattr(model, "ranks", ALONE)
    return ranks


def own_rank() -> int | None:
    """Returns the number that `mlx.launch` gave this process; None if it did not start it.

    Raises:
        DriftError: If what it was told makes no sense: MLX would end the process without a word.
    """
    told = os.environ.get("MLX_RANK")
    if told is None:
        return None
    ring = _ring()
    size = len(ring) if ring else MOST_RANKS
    if not (told.isascii() and told.isdigit() and len(told) < 6 and int(told) < size):
        hosts = f" below {size}, of MLX_HOSTFILE's hosts" if ring else ""
        raise DriftError(f"MLX_RANK is {brief(told)}; expected a number{hosts}; {RESTART}")
    return int(told)


def _ring() -> list[list[str]] | None:
    """Returns the addresses of each rank of a ring, `host:port`; None if there is no ring."""
    file = os.environ.get("MLX_HOSTFILE")
    if file is None:
        return None
    try:
        text = Path(file).read_text().strip()
        ring = json.loads(text) if text else []
    except (OSError, ValueError, RecursionError):
        raise DriftError(
            f"MLX_HOSTFILE is {file}, which cannot be read as JSON; {RESTART}"
        ) from None
    if not (isinstance(ring, list) and all(_addressed(host) for host in ring)):
        raise DriftError(
            f'{file} of MLX_HOSTFILE holds {brief(ring)}; expected a list with ["host:port"] for '
            f"every rank; {RESTART}"
        )
    return ring


def _addressed(host: object) -> bool:
    return (
        isinstance(host, list)
        and bool(host)
        and all(isinstance(one, str) and one.rpartition(":")[2].isdigit() for one in host)
    )


def _addresses() -> list[str]:
    """Returns where `mlx.launch` says that rank 0 is, by the backend."""
    if ring := _ring():
        return [address.rpartition(":")[0] for address in ring[0]]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return [coordinator.rpartition(":")[0]]
    if host := os.environ.get("NCCL_HOST_IP"):
        return [host]
    raise DriftError(f"MLX_RANK is set, but nothing says where rank 0 is; {RESTART}")
