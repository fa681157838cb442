"""HTTP over the engine: routes and bodies."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from mlx_drift.errors import DriftError
from mlx_drift.serve import page
from mlx_drift.serve.answers import Answers, Stream
from mlx_drift.serve.api.asking import Dialect
from mlx_drift.serve.api.endpoints import DIALECTS
from mlx_drift.serve.api.events import dumps
from mlx_drift.serve.api.fields import BadRequest, Fields
from mlx_drift.serve.api.history import read_messages
from mlx_drift.serve.api.messages import CountTokens
from mlx_drift.serve.api.prompts import encode, lay_out
from mlx_drift.serve.api.served import Defaults, Served
from mlx_drift.serve.api.tables import TOKENIZE
from mlx_drift.serve.context import context
from mlx_drift.serve.engine import Engine
from mlx_drift.serve.guard import Guard
from mlx_drift.serve.metrics import CONTENT_TYPE, Metrics
from mlx_drift.serve.middleware import Guarded
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.models import Known, Models, NotServed

COUNT_TOKENS = CountTokens()


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
            Route(COUNT_TOKENS.path, self.count_tokens, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/health", self.health),
            *page.ROUTES,
        ]
        paths = {route.path for route in routes}
        errors = {dialect.path: dialect.error for dialect in DIALECTS}
        errors[COUNT_TOKENS.path] = COUNT_TOKENS.error
        app: ASGIApp = Guarded(Router(routes), self.guard, self.metrics, paths, errors)
        if self.origins:
            app = CORSMiddleware(app, [*self.origins], ["GET", "POST"], allow_headers=["*"])
        return app

    async def generate(self, dialect: Dialect, request: Request) -> Response:
        """Answers a prompt."""
        given = await self.given(dialect.fields, request)
        known, name = self._find(given.get("model"))
        loaded = await self._loaded(known)
        served = self._served(loaded)
        asked = await asyncio.to_thread(dialect.read, given, served, name or known.name)
        if self.log_prompts:
            for one in asked.requests:
                print(dumps({"prompt": loaded.tokenizer.decode(one.tokens)}), file=sys.stderr)
        answers = Answers(self.engine, loaded, asked, self.keepalive)
        answers.submit()
        if asked.stream:
            return Stream(answers)
        return await answers.whole(request)

    async def tokenize(self, request: Request) -> Response:
        """Shows what tokens a text or a conversation comes to."""
        given = await self.given(TOKENIZE, request)
        known, _ = self._find(given.get("model"))
        served = self._served(await self._loaded(known))
        if ("prompt" in given) == ("messages" in given):
            raise BadRequest("give one of prompt and messages", "prompt")

        def shown() -> dict[str, Any]:
            if "prompt" in given:
                special = given.get("add_special_tokens", True)
                ids = encode(served, given["prompt"], special=special)
            else:
                keywords = given.get("chat_template_kwargs", {})
                generation = given.get("add_generation_prompt", True)
                messages = read_messages(given["messages"])
                prompt = lay_out(served, messages, keywords, add_generation_prompt=generation)
                ids = prompt.tokens
            found = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
            if given.get("return_token_strs"):
                found["token_strs"] = [served.tokenizer.decode([token]) for token in ids]
            return found

        return _json(await asyncio.to_thread(shown))

    async def count_tokens(self, request: Request) -> Response:
        """Counts the tokens of a prompt of the Messages API."""
        given = await self.given(COUNT_TOKENS.fields, request)
        served = self._served(await self._loaded(self._find(given.get("model"))[0]))
        return _json(await asyncio.to_thread(COUNT_TOKENS.count, given, served))

    async def list_models(self, request: Request) -> Response:
        """Lists the models."""
        cards = [_card(known) for known in self.models.known]
        ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"], "has_more": False}
        return _json({"object": "list", "data": cards} | ends)

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

    async def given(self, fields: Fields, request: Request) -> dict[str, Any]:
        """Reads a request's fields; a body may hold millions of values, so not on the event loop.

        Raises:
            BadRequest: If the body is too long, too slow, or no JSON, or a field is wrong.
        """
        body = await self._body(request)
        return await asyncio.to_thread(lambda: fields.read(_parsed(body)))

    async def _body(self, request: Request) -> bytes:
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
        return b"".join(parts)

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


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def _card(known: Known) -> dict[str, Any]:
    """Returns a model as OpenAI's API shows it, and Anthropic's."""
    return {
        "id": known.name,
        "object": "model",
        "created": known.created,
        "owned_by": "mlx-drift",
        "type": "model",
        "display_name": known.name,
        "created_at": datetime.fromtimestamp(known.created, UTC).isoformat(),
        "lifecycle": "active",
    }


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequest(f"the body is not valid JSON ({reason})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
