"""Who may ask, and how much: checks before any request is read.

A web page that a user visits can post to a server on the same machine, without being able to read
what comes back. So `Host` must be a name of this server (a page that rebinds its own name to
127.0.0.1 sends that name), and `Content-Type` must be JSON (which a page may not send to another
origin unasked).
"""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_drift.errors import brief
from mlx_drift.serve.api.fields import BadRequest
from mlx_drift.serve.page import FILES

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health", *FILES)
"""Paths that need no key: whoever watches a server may know that it lives, and a browser can show
none when it opens the page."""


@dataclass(frozen=True)
class Guard:
    """Checks the headers of requests.

    Args:
        host: What the server is bound to.
        api_key: What callers must show; None for nothing.
        hosts: Further names of this server.
        most_bytes: Of a body.
    """

    host: str
    api_key: str | None = None
    hosts: Sequence[str] = ()
    most_bytes: int = 32 << 20

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Checks a request.

        Args:
            method: The HTTP method.
            path: The path.
            headers: Its headers, by their names in lower case.

        Raises:
            BadRequest: With the status that says what is wrong.
        """
        if not self._is_own(headers.get("host", "")):
            raise BadRequest(
                f"the Host header {brief(headers.get('host', ''))} is no name of this server; "
                "start it with --allow-host to give it further names",
                status=403,
                code="host_not_allowed",
            )
        if self.api_key is not None and path not in OPEN and not self._has_key(headers):
            raise BadRequest(
                "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                status=401,
                code="invalid_api_key",
            )
        if method != "POST":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(
                f"the Content-Type is {brief(kind)}; expected application/json", status=415
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > self.most_bytes:
            raise self.too_long()

    def too_long(self) -> BadRequest:
        """Returns what is said of a body that is too long."""
        return BadRequest(f"the body is longer than {self.most_bytes} bytes", status=413)

    def _is_own(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.removeprefix("[").removesuffix("]").lower()
        if is_loopback(self.host) or self.host not in ("0.0.0.0", "::"):
            return name in (*LOOPBACK, self.host.lower(), *(h.lower() for h in self.hosts))
        return True  # bound to all addresses: whoever asks needs the key, which a page has not

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        shown = [bearer.strip()] if kind.lower() == "bearer" else []
        shown += [headers.get("x-api-key", "")]
        key = (self.api_key or "").encode()
        # Back to the bytes that came: HTTP hands them over as if each were a letter.
        return any(hmac.compare_digest(one.encode("latin-1"), key) for one in shown)


def is_loopback(host: str) -> bool:
    """Tells whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
