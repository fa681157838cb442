"""A Hub of one repository: as much of the real one's protocol as huggingface_hub speaks.

`StubHub(...).serve()` serves a folder, with everything that can be set or looked at: gates, broken
connections, a second host for the bytes of large files, uploads. `settle()` and `set_endpoint()`
set up huggingface_hub for a test in this process.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WRITER = "Bearer hf_writer"  # what an upload must be authorized with


def settle(monkeypatch, home: Path) -> None:
    """Gives huggingface_hub an empty cache, no token, no Hub and no time to wait for one.

    It reads the environment only when it is imported.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's retries
    set_endpoint(monkeypatch, "http://127.0.0.1:9")


def set_endpoint(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@dataclass(frozen=True)
class Request:
    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class StubHub:
    """A Hub; what it is set to may be changed while it serves."""

    folder: Path
    repo: str
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False  # the listing is public, the files are not
    lists_also: tuple[str, ...] = ()  # paths in the listing that no file stands behind
    on_second_host: str = ""  # files that end so are redirected to another host, as LFS files are
    ranges: bool = True  # honours the Range header
    surplus: bytes = b""  # what is sent after the bytes of a range
    breaks: int = 0  # so many answers with a file break off: the first halfway, later ones at once
    status: int = 0  # if set, the answer to everything
    commit: str = COMMIT  # what every revision stands for

    endpoint: str = ""
    second_host: str = ""
    asked: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sent: int = 0  # bytes of answers, headers aside
    committed: dict[str, bytes] = field(default_factory=dict)  # what was uploaded

    @contextmanager
    def serve(self) -> Iterator["StubHub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        with ExitStack() as stack:
            self.endpoint = stack.enter_context(_serving(handler))
            self.second_host = stack.enter_context(_serving(handler))
            yield self

    def files(self) -> dict[str, Path]:
        """The files by their path in the repository."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


@contextmanager
def _serving(handler: type) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client may have read enough
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def do_GET(self):
        hub, path = self.hub, self.record()
        repo = re.escape(hub.repo)
        if hub.status:
            return self.send({}, hub.status)
        if match := re.fullmatch(f"/api/models/{repo}(?:/(revision|tree)/([^/]+))?", path):
            kind, revision = match.groups()
            return self.send_listing(kind, unquote(revision or "main"))
        if match := re.fullmatch(f"(?:/datasets)?/{repo}/resolve/([^/]+)/(.+)", path):
            return self.send_file(*map(unquote, match.groups()))
        return self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        hub, path = self.hub, self.record()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != WRITER:
            return self.send({"error": "Invalid username or password."}, hub.status or 401)
        if hub.status:
            return self.send({}, hub.status)
        if path == "/api/repos/create":
            asked_for = json.loads(body)
            name = f"{asked_for['organization']}/{asked_for['name']}"
            return self.send({"url": f"{hub.endpoint}/{name}"}, 409 if name == hub.repo else 200)
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": f["path"]} | modes for f in json.loads(body)["files"]]
            return self.send({"files": files})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.committed[line["value"]["path"]] = content
            return self.send({"commitUrl": f"{hub.endpoint}/{hub.repo}", "commitOid": hub.commit})
        return self.refuse("RepoNotFound")

    def record(self) -> str:
        """Notes the request and returns its path."""
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        headers = self.headers
        self.hub.requests.append(
            Request(
                f"http://{headers['Host']}",
                self.command,
                path,
                headers.get("Range"),
                headers.get("Authorization"),
            )
        )
        return path

    def send_listing(self, kind, revision):
        hub = self.hub
        if revision not in (*hub.revisions, hub.commit):
            return self.refuse("RevisionNotFound")
        files = hub.files()
        if kind == "tree":
            rows = ((path, file.stat().st_size) for path, file in files.items())
            return self.send(
                [{"type": "file", "path": p, "size": size, "oid": hub.commit} for p, size in rows]
            )
        siblings = [{"rfilename": path} for path in (*files, *hub.lists_also)]
        return self.send({"id": hub.repo, "sha": hub.commit, "siblings": siblings})

    def send_file(self, revision, path):
        hub = self.hub
        file = hub.files().get(path)
        if revision not in (*hub.revisions, hub.commit):
            return self.refuse("RevisionNotFound")
        if hub.gated:
            return self.refuse("GatedRepo", 403)
        if file is None:
            return self.refuse("EntryNotFound")
        body = file.read_bytes()
        facts = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": hub.commit}
        on_first_host = f"http://{self.headers['Host']}" == hub.endpoint
        if on_first_host and hub.on_second_host and path.endswith(hub.on_second_host):
            elsewhere = {
                "Location": hub.second_host + self.path,
                "X-Linked-Size": str(len(body)),
                "X-Linked-Etag": facts["ETag"],
            }
            return self.send(b"", 302, facts | elsewhere)
        if hub.ranges and (
            match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        ):
            start, stop = int(match[1]), min(int(match[2] or len(body)), len(body) - 1) + 1
            if start >= len(body):
                return self.send(b"", 416, {"Content-Range": f"bytes */{len(body)}"})
            facts["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            return self.send(body[start:stop] + hub.surplus, 206, facts)
        return self.send(body, 200, facts)

    def refuse(self, code, status=404):
        return self.send({}, status, {"X-Error-Code": code})

    def send(self, body, status=200, headers=None):
        """Sends bytes of a file, or anything else as JSON."""
        is_file = isinstance(body, bytes)
        body = body if is_file else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_file and self.hub.breaks and status < 300:
            self.hub.breaks -= 1
            body = body[: len(body) // 2] if status == 200 else b""
            self.close_connection = True
        self.hub.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *_):
        pass
