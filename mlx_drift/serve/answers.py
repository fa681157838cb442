"""The answers to one HTTP request: followed as they come, sent whole or as a stream of events.

Notable:
- Every answer goes through `follow`, streamed or whole, so that a client that leaves is noticed in
  both. The engine hears of it before the conversation's next turn.
- Headers of a stream go out at once; while nothing is said the connection is kept awake: also while
  an answer says something that its dialect can only word when it is whole.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_drift.serve.api.asking import Answer, Asked
from mlx_drift.serve.api.events import dumps
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.engine import Engine
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.request import Busy, Ended, Event, Failed, Piece, Reading

STATUS = {"timeout": 504, "shutdown": 503, "refused": 400, "error": 500, "cancelled": 499}
HINT_SECONDS = 1.0
"""Events about the prompt's progress are at least so far apart."""


class Answers:
    """The answers to one HTTP request.

    Args:
        engine: Who has the device.
        loaded: Who answers.
        asked: What is asked.
        keepalive: Seconds of silence after which a stream says something.
    """

    def __init__(self, engine: Engine, loaded: LoadedModel, asked: Asked, keepalive: float):
        self.engine = engine
        self.loaded = loaded
        self.asked = asked
        self.keepalive = keepalive
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()  # None: it left

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
            self.tickets = self.engine.submit(self.loaded, self.asked.requests, sinks)
        except Busy as busy:
            status = 503 if busy.is_closing else 429
            raise BadRequest(
                str(busy), status=status, code="busy", retry_after=busy.retry_after
            ) from None

    async def follow(self, receive: Receive) -> AsyncGenerator[tuple[int, Event] | None]:
        """Yields what happens; None after some silence. Ends early if the client leaves."""
        listening = asyncio.create_task(self._wait_for_leaving(receive))
        left = len(self.tickets)
        try:
            while left:
                try:
                    async with asyncio.timeout(self.keepalive):
                        happened = await self._events.get()
                except TimeoutError:
                    yield None
                    continue
                if happened is None:
                    return
                left -= isinstance(happened[1], Ended | Failed)
                yield happened
        finally:
            listening.cancel()
            self.engine.cancel(self.tickets)

    async def _wait_for_leaving(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

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
        body = await asyncio.to_thread(lambda: dumps(self.asked.reply.whole(answers)))
        return Response(body, media_type="application/json")

    async def stream(self, receive: Receive) -> AsyncGenerator[str]:
        """Yields the answers as server-sent events."""
        reply, ended, spoke = self.asked.reply, {}, time.monotonic()
        yield reply.opening()
        async for happened in self.follow(receive):
            text, patience = "", self.keepalive
            if happened is not None:
                index, event = happened
                if isinstance(event, Failed):
                    yield reply.failed(_as_error(event))
                    return
                if isinstance(event, Reading):
                    patience = min(patience, HINT_SECONDS)
                elif isinstance(event, Piece):
                    text = reply.piece(index, event)
                else:
                    ended[index] = event
                    text = reply.ended(index, event)
            if not text and (happened is None or time.monotonic() - spoke > patience):
                text = reply.keepalive
            if text:
                spoke = time.monotonic()
                yield text
        if len(ended) == len(self.tickets):
            yield reply.closing([ended[index] for index in sorted(ended)])


class Stream(Response):
    """Sends server-sent events, and stops when the client leaves."""

    def __init__(self, answers: Answers):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
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


def _as_error(failed: Failed) -> BadRequest:
    retry_after = 30 if failed.kind == "shutdown" else None
    return BadRequest(failed.message, None, STATUS[failed.kind], failed.kind, retry_after)
