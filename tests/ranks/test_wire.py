"""Who is let in as a rank."""

import socket
from threading import Thread

import pytest

from mlx_drift.errors import DriftError
from mlx_drift.ranks import wire


def test_only_who_knows_the_secret_is_let_in():
    listener, secret = wire.listen("127.0.0.1")
    port = listener.getsockname()[1]
    strangers = [
        b"x" * 64,
        b"\xff" * 64,
        "é".encode() * 32,
        f"{secret} 9".ljust(64).encode(),
        f"{secret} ".encode().ljust(64),
    ]
    for said in strangers:
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.sendall(said)
    admitted: dict[int, socket.socket] = {}
    thread = Thread(target=lambda: admitted.update(wire.admit(listener, secret, 1)))
    thread.start()
    wire.connect(["127.0.0.1"], port, secret, 1).close()
    thread.join(10)
    assert [*admitted] == [1]


def test_a_rank_that_does_not_come_is_told(monkeypatch):
    monkeypatch.setattr(wire, "SECONDS_TO_CONNECT", 0.1)
    listener, secret = wire.listen("127.0.0.1")
    with pytest.raises(DriftError, match=r"rank 1 did not connect to rank 0 within"):
        wire.admit(listener, secret, 1)


def test_an_address_where_nobody_listens_is_told():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DriftError, match=rf"rank 0 cannot be reached at 127\.0\.0\.1:{port} \("):
        wire.connect(["127.0.0.1"], port, "", 1)
