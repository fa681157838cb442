"""HTTP over the engine: routes, bodies, streams of events.

Notable:
- Every answer goes through `follow`, streamed or whole, so that a client that leaves is noticed in
  both. The engine hears of it before the conversation's next turn.
- Headers of a stream go out at once; while nothing is said, comments keep the connection awake.
"""

import asyncio
import json
import logging
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_drift.errors import DriftError
from mlx_drift.serve.api.asking import Answer, Asked, Dialect, openai_error
from mlx_drift.serve.api.chat import Chat
from mlx_drift.serve.api.completions import Completions
from mlx_drift.serve.api.events import KEEPALIVE, data, dumps
from mlx_drift.serve.api.fields import TOKENIZE, BadRequest
from mlx_drift.serve.api.prompts import encode, lay_out
from mlx_drift.serve.api.served import Defaults, Served
from mlx_drift.serve.context import context
from mlx_drift.serve.engine import Engine
from mlx_drift.serve.guard import Guard
from mlx_drift.serve.metrics import CONTENT_TYPE, Metrics
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.models import Known, Models, NotServed
from mlx_drift.serve.request import Busy, Ended, Event, Failed, Piece, Reading

log = logging.getLogger(__name__)

DIALECTS: tuple[Dialect, ...] = (Chat(), Completions())
"""The endpoints that generate."""

STATUS = {"timeout": 504, "shutdown": 503, "refused": 400, "error": 500, "cancelled": 499}
HINT_SECONDS = 1.0
"""Comments about the prompt's progress are at least so far apart."""


@dataclass(frozen=True)
class Server:
    """What the endpoints share.

    Attributes:
        engine: Who answers.
        models: Which models there are.
        metrics: What is counted.
        guard: Who may ask.
        defaults: What holds for a request that does not say.
        keepalive: Seconds of silence after which a stream says something.
        body_seconds: In which a body must have come.
        log_prompts: Write prompts to stderr.
        origins: Web pages that may ask.
    """

    engine: Engine
    models: Models
    metrics: Metrics
    guard: Guard
    defaults: Defaults = field(default_factory=Defaults)
    keepalive: float = 5.0
    body_seconds: float = 30.0
    log_prompts: bool = False
    origins: Sequence[str] = ()

    def app(self) -> ASGIApp:
        """Returns the ASGI application."""
        routes = [
            *(Route(d.path, partial(self.generate, d), methods=["POST"]) for d in DIALECTS),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/health", self.health),
        ]
        app: ASGIApp = _Guarded(Router(routes), self, {route.path for route in routes})
        if self.origins:
            app = CORSMiddleware(app, [*self.origins], ["GET", "POST"], allow_headers=["*"])
        return app

    async def generate(self, dialect: Dialect, request: Request) -> Response:
        """Answers a prompt."""
        given = dialect.fields.read(await self.body(request))
        known, name = self._find(given.get("model"))
        loaded = await self._loaded(known)
        served = self._served(loaded)
        asked = await asyncio.to_thread(dialect.read, given, served, name or known.name)
        if self.log_prompts:
            for one in asked.requests:
                print(dumps({"prompt": loaded.tokenizer.decode(one.tokens)}), file=sys.stderr)
        answers = Answers(self, dialect, loaded, asked)
        answers.submit()
        if asked.stream:
            return _Stream(answers)
        return await answers.whole(request)

    async def tokenize(self, request: Request) -> Response:
        """Shows what tokens a text or a conversation comes to."""
        given = TOKENIZE.read(await self.body(request))
        known, _ = self._find(given.get("model"))
        served = self._served(await self._loaded(known))
        if ("prompt" in given) == ("messages" in given):
            raise BadRequest("give one of prompt and messages", "prompt")

        def tokens() -> list[int]:
            if "prompt" in given:
                special = given.get("add_special_tokens", True)
                return encode(served, given["prompt"], special=special)
            keywords = given.get("chat_template_kwargs", {})
            generation = given.get("add_generation_prompt", True)
            return lay_out(served, given["messages"], keywords, add_generation_prompt=generation)[0]

        ids = await asyncio.to_thread(tokens)
        shown = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
        if given.get("return_token_strs"):
            shown["token_strs"] = [served.tokenizer.decode([token]) for token in ids]
        return _json(shown)

    async def list_models(self, request: Request) -> Response:
        """Lists the models."""
        return _json({"object": "list", "data": [_card(k) for k in self.models.known]})

    async def show_model(self, request: Request) -> Response:
        """Shows one model."""
        known, name = self._find(request.path_params["name"])
        return _json(_card(known) | {"id": name or known.name})

    async def show_metrics(self, request: Request) -> Response:
        """Shows what is counted."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        """Tells that the server lives."""
        if not self.engine.is_alive:
            return _json({"status": "failed"}, 503)
        return _json({"status": "ok"})

    async def body(self, request: Request) -> Any:
        """Reads a request's JSON.

        Raises:
            BadRequest: If it is too long, too slow, or no JSON.
        """
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.guard.most_bytes:
                        raise self.guard.too_long()
                    parts.append(part)
        except TimeoutError:
            raise BadRequest(
                f"the body did not come within {self.body_seconds:g} seconds", status=408
            ) from None
        try:
            return json.loads(b"".join(parts).decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise BadRequest(f"the body is not valid JSON ({reason})") from None

    def _find(self, name: str | None) -> tuple[Known, str | None]:
        try:
            return self.models.find(name), name
        except NotServed as error:
            raise BadRequest(str(error), "model", 404, "model_not_found") from None

    async def _loaded(self, known: Known) -> LoadedModel:
        try:
            return await asyncio.wrap_future(self.models.get(known))
        except DriftError as error:
            raise BadRequest(str(error), "model", 503, "model_not_loaded", 30) from None

    def _served(self, loaded: LoadedModel) -> Served:
        tokens, limited_by = context(loaded, self.engine.store.bound)
        return Served(
            loaded.name,
            loaded.tokenizer,
            loaded.vocab_size,
            tokens,
            limited_by,
            loaded.footprint.copies,
            self.defaults,
        )


class Answers:
    """The answers to one HTTP request.

    Args:
        server: What the endpoints share.
        dialect: How they are written.
        loaded: Who answers.
        asked: What is asked.
    """

    def __init__(self, server: Server, dialect: Dialect, loaded: LoadedModel, asked: Asked):
        self.server = server
        self.dialect = dialect
        self.loaded = loaded
        self.asked = asked
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def submit(self) -> None:
        """Asks the engine.

        Raises:
            BadRequest: If it takes on nothing more.
        """
        loop = asyncio.get_running_loop()

        def sink(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        sinks = [partial(sink, index) for index in range(len(self.asked.requests))]
        try:
            self.tickets = self.server.engine.submit(self.loaded, self.asked.requests, sinks)
        except Busy as busy:
            status = 503 if busy.is_closing else 429
            raise BadRequest(
                str(busy), status=status, code="busy", retry_after=busy.retry_after
            ) from None

    async def follow(self, receive: Receive) -> AsyncGenerator[tuple[int, Event] | None]:
        """Yields what happens; None after some silence. Ends early if the client leaves."""
        gone = asyncio.create_task(_gone(receive))
        left = len(self.tickets)
        try:
            while left:
                happened = asyncio.create_task(self._events.get())
                done, _ = await asyncio.wait(
                    (gone, happened),
                    timeout=self.server.keepalive,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if happened not in done:
                    happened.cancel()
                    if gone in done:
                        return
                    yield None
                    continue
                index, event = happened.result()
                left -= isinstance(event, Ended | Failed)
                yield index, event
        finally:
            gone.cancel()
            self.server.engine.cancel(self.tickets)

    async def whole(self, request: Request) -> Response:
        """Returns all answers at once."""
        pieces: list[list[Piece]] = [[] for _ in self.tickets]
        ended: dict[int, Ended] = {}
        async for happened in self.follow(request.receive):
            if happened is None:
                continue
            index, event = happened
            if isinstance(event, Failed):
                raise _as_error(event)
            if isinstance(event, Piece):
                pieces[index].append(event)
            elif isinstance(event, Ended):
                ended[index] = event
        if len(ended) < len(self.tickets):
            raise ClientDisconnect
        answers = [Answer(own, ended[index]) for index, own in enumerate(pieces)]
        return _json(await asyncio.to_thread(self.asked.reply.whole, answers))

    async def stream(self, receive: Receive) -> AsyncGenerator[str]:
        """Yields the answers as server-sent events."""
        reply, ended, hinted = self.asked.reply, {}, time.monotonic()
        yield reply.opening()
        async for happened in self.follow(receive):
            if happened is None:
                yield KEEPALIVE
                continue
            index, event = happened
            if isinstance(event, Reading):
                if time.monotonic() - hinted > HINT_SECONDS:
                    hinted = time.monotonic()
                    yield KEEPALIVE
            elif isinstance(event, Piece):
                yield reply.piece(index, event)
            elif isinstance(event, Ended):
                ended[index] = event
                yield reply.ended(index, event)
            else:
                yield data(self.dialect.error(_as_error(event)))
                return
        if len(ended) == len(self.tickets):
            yield reply.closing([ended[index] for index in sorted(ended)])


class _Stream(Response):
    """Sends server-sent events, and stops when the client leaves."""

    def __init__(self, answers: Answers):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        events = self.answers.stream(receive)
        try:
            async for text in events:
                if text:
                    await send(
                        {"type": "http.response.body", "body": text.encode(), "more_body": True}
                    )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client left
            pass
        finally:
            await events.aclose()


class _Guarded:
    """Checks every request first, counts every response, and turns errors into answers."""

    def __init__(self, app: ASGIApp, server: Server, paths: set[str]):
        self.app = app
        self.server = server
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in self.paths else "other"
        has_started = False
        scope["app"] = self  # the router raises its errors then, in place of answering

        async def send_counted(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self.server.metrics.response(counted, message["status"])
            await send(message)

        try:
            headers = {
                k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]
            }
            self.server.guard.check(scope["method"], path, headers)
            await self.app(scope, receive, send_counted)
        except ClientDisconnect:
            return
        except Exception as error:
            if has_started:
                raise
            dialect = next((d for d in DIALECTS if d.path == path), None)
            await _error(error, dialect)(scope, receive, send_counted)


def _error(error: Exception, dialect: Dialect | None) -> Response:
    """Returns the response to an error, in the object of the API it was asked through."""
    if isinstance(error, HTTPException):  # the router's
        what = "there is no such path" if error.status_code == 404 else str(error.detail)
        error = BadRequest(what, status=error.status_code)
    if not isinstance(error, BadRequest):
        trace = "".join(traceback.format_tb(error.__traceback__))  # code, no values
        log.error("a request failed: %s\n%s", type(error).__name__, trace)
        error = BadRequest(f"the server failed ({type(error).__name__})", status=500)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = dialect.error(error) if dialect is not None else openai_error(error)
    return _json(body, error.status, headers)


def _as_error(failed: Failed) -> BadRequest:
    retry_after = 30 if failed.kind == "shutdown" else None
    return BadRequest(failed.message, None, STATUS[failed.kind], failed.kind, retry_after)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def _card(known: Known) -> dict[str, Any]:
    return {"id": known.name, "object": "model", "created": known.created, "owned_by": "mlx-drift"}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


async def _gone(receive: Receive) -> None:
    """Returns when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
