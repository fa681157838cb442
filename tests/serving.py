"""What the tests of serving share: an engine in this process, a server in another."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from urllib.parse import urlsplit

from mlx_drift.decode.sampling import Sampling
from mlx_drift.serve.engine import Engine, Limits
from mlx_drift.serve.metrics import Metrics
from mlx_drift.serve.model import LoadedModel, Settings
from mlx_drift.serve.request import Ended, Failed, Piece, Reading, Request
from mlx_drift.serve.store import Store
from tiny import Letters

PATIENCE = 120
"""Seconds after which a test says that something is stuck."""


class Heard:
    """Hears what happens to one request."""

    def __init__(self):
        self.events = []
        self.over = threading.Event()
        self.on_event = lambda event: None

    def __call__(self, event):
        self.events.append(event)
        self.on_event(event)
        if isinstance(event, Ended | Failed):
            self.over.set()

    def wait(self):
        assert self.over.wait(PATIENCE), "stuck"
        return self.events[-1]

    @property
    def tokens(self):
        return [s.token for e in self.events if isinstance(e, Piece) for s in e.scored]

    @property
    def text(self):
        return "".join(e.text for e in self.events if isinstance(e, Piece))

    @property
    def chunks(self):
        return [e.done for e in self.events if isinstance(e, Reading)]


def loaded(model, drafter, tokenizer=None, k=3, **settings):
    return LoadedModel(
        "tiny", model, tokenizer or Letters(), drafter, Settings(num_draft_tokens=k, **settings)
    )


@contextmanager
def engine(bound=1 << 30, disk=None, **limits):
    """Runs an engine; nothing may be left under way at its end."""
    running = Engine(Store(bound, disk), Limits(**limits), Metrics())
    running.start()
    try:
        yield running
    finally:
        running.close(0.0)
        assert running.join(PATIENCE), "stuck"


def ask(engine, model, tokens, count=12, **keywords):
    """Submits one request; returns who hears of it, and its ticket."""
    keywords = {"top_logprobs": 0, "sampling": Sampling()} | keywords
    heard = Heard()
    (ticket,) = engine.submit(model, [Request(list(tokens), count, **keywords)], [heard])
    return heard, ticket


@contextmanager
def server(*flags, env=None, stop=signal.SIGTERM, setup=""):
    """Runs `mlx-drift serve` in a process of its own; yields it, with the address it told.

    `setup` is code that the process runs first: a fault to live with.
    """
    run = f"{setup}\nfrom mlx_drift.cli import main; main()"
    command = [sys.executable, "-c", run, "serve", "--port", "0", "--json", *flags]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        process.url = json.loads(line)["url"]
        process.root = process.url.removesuffix("/v1")
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(stop)
        process.err = process.communicate(timeout=PATIENCE)[1]


@dataclass
class Answered:
    """A response."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


JSON = {"Content-Type": "application/json"}


def fetch(url, method="GET", body=None, headers=None):
    """Asks over a connection of its own."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=PATIENCE)
    try:
        connection.request(method, parts.path, body, headers or {})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answered(response.status, headers, response.read())
    finally:
        connection.close()


def post(url, body, headers=None):
    """Posts JSON, or bytes as they are."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(url, "POST", body, JSON if headers is None else headers)


def said(text, **keywords):
    """A request's body."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 16} | keywords
