"""What every request goes through: who may ask, what is counted, errors in the API's own words."""

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_drift.serve.api.asking import openai_error
from mlx_drift.serve.api.events import dumps
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.guard import Guard
from mlx_drift.serve.metrics import Metrics

log = logging.getLogger(__name__)


class Guarded:
    """Checks every request first, counts every response, and turns errors into answers.

    Args:
        app: What answers.
        guard: Who may ask.
        metrics: What is counted.
        paths: Those that are counted one by one.
        errors: Of paths whose errors are written in their own way: the bodies of errors.
    """

    def __init__(
        self,
        app: ASGIApp,
        guard: Guard,
        metrics: Metrics,
        paths: set[str],
        errors: Mapping[str, Callable[[BadRequest], dict[str, Any]]],
    ):
        self.app = app
        self.guard = guard
        self.metrics = metrics
        self.paths = paths
        self.errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
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
                self.metrics.response(counted, message["status"])
            await send(message)

        try:
            headers = {
                k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]
            }
            self.guard.check(scope["method"], path, headers)
            await self.app(scope, receive, send_counted)
        except ClientDisconnect:
            return
        except Exception as error:
            if has_started:
                raise
            write = self.errors.get(path, openai_error)
            await _error(error, write)(scope, receive, send_counted)


def _error(error: Exception, write: Callable[[BadRequest], dict[str, Any]]) -> Response:
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
    return Response(dumps(write(error)), error.status, headers, "application/json")
