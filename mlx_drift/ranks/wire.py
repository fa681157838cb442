"""Connections between rank 0 and the others: small messages, and who is still there.

Beside MLX's own: a collective waits forever for a rank that is gone. A process that ends closes its
sockets, whatever ended it; for a machine that is cut off TCP's keepalive answers.
"""

import hmac
import json
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from mlx_drift.errors import DriftError

SECONDS_TO_CONNECT = 30.0
MOST_BYTES = 1 << 26
"""Of one message."""

IDLE, INTERVAL, PROBES = 3, 1, 4
"""Seconds of silence, seconds between probes, and unanswered ones: a machine is missed after 7."""

Frame = dict[str, Any]


class Connection:
    """One peer: what is sent to it, and a queue of what it says.

    Args:
        peer: The rank at the other end.
        channel: The socket, connected.
        on_frame: Told of each message in the reading thread, before the queue has it.
        on_lost: Called in that thread when nothing more can come.
    """

    def __init__(
        self,
        peer: int,
        channel: socket.socket,
        on_frame: Callable[[int, Frame], None],
        on_lost: Callable[[int], None],
    ):
        self.peer = peer
        self.frames: SimpleQueue[Frame] = SimpleQueue()
        self._channel = channel
        self._sending = Lock()
        self._on_frame, self._on_lost = on_frame, on_lost
        Thread(target=self._read, name=f"rank {peer}", daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Sends a message; to a peer that is gone none, which the reading thread tells."""
        with self._sending, suppress(OSError):
            self._channel.sendall(json.dumps(frame).encode() + b"\n")

    def _read(self) -> None:
        try:
            with self._channel.makefile("rb") as lines:
                while (line := lines.readline(MOST_BYTES)).endswith(b"\n"):
                    frame = json.loads(line)
                    self._on_frame(self.peer, frame)
                    self.frames.put(frame)
        except (OSError, ValueError):
            pass  # as good as gone
        self._on_lost(self.peer)


def listen(address: str) -> tuple[socket.socket, str]:
    """Opens a port for the other ranks; on this machine alone if that is where they are.

    Returns:
        The listening socket, and what a rank must say to be let in.
    """
    is_here = address.startswith("127.") or address == "localhost"
    return socket.create_server((address if is_here else "", 0)), secrets.token_hex(16)


def admit(listener: socket.socket, secret: str, count: int) -> dict[int, socket.socket]:
    """Waits for so many ranks, and lets nobody else in.

    Raises:
        DriftError: If they do not come.
    """
    admitted: dict[int, socket.socket] = {}
    listener.settimeout(SECONDS_TO_CONNECT)
    while len(admitted) < count:
        try:
            channel, _ = listener.accept()
        except TimeoutError:
            missing = sorted({*range(1, count + 1)} - {*admitted})
            raise DriftError(
                f"rank {missing[0]} did not connect to rank 0 within {SECONDS_TO_CONNECT:.0f} s; "
                "is there a firewall between them?"
            ) from None
        with suppress(OSError, ValueError):
            channel.settimeout(SECONDS_TO_CONNECT)
            said, _, rank = channel.recv(64, socket.MSG_WAITALL).strip().partition(b" ")
            if hmac.compare_digest(said, secret.encode()) and 0 < int(rank) <= count:
                admitted[int(rank)] = keep_alive(channel)
                continue
        channel.close()
    listener.close()
    return admitted


def connect(addresses: Iterable[str], port: int, secret: str, rank: int) -> socket.socket:
    """Connects to rank 0, by the first of its addresses that answers.

    Raises:
        DriftError: If none does.
    """
    tried = []
    for address in addresses:
        try:
            channel = socket.create_connection((address, port), SECONDS_TO_CONNECT)
        except OSError as error:
            tried.append(f"{address}:{port} ({error.strerror or error})")
            continue
        channel.sendall(f"{secret} {rank}".ljust(64).encode())
        return keep_alive(channel)
    raise DriftError(f"rank 0 cannot be reached at {', '.join(tried)}")


def keep_alive(channel: socket.socket) -> socket.socket:
    """Makes a socket notice within seconds that the other machine is gone; it blocks from now."""
    channel.settimeout(None)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # What Linux calls TCP_KEEPIDLE, macOS calls TCP_KEEPALIVE.
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    options = (
        (idle, IDLE),
        (getattr(socket, "TCP_KEEPINTVL", None), INTERVAL),
        (getattr(socket, "TCP_KEEPCNT", None), PROBES),
    )
    for option, value in options:
        if option is not None:
            channel.setsockopt(socket.IPPROTO_TCP, option, value)
    return channel
