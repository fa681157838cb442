"""A Hub of one folder: as much of the real one's protocol as `snapshot_download` speaks."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(
    folder: Path, repo: str, revisions: tuple[str, ...] = ("main",)
) -> Iterator[tuple[str, list]]:
    """Serves `folder` as the repository `repo`; yields the endpoint and the list of paths asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            asked.append(path)
            files = sorted(folder.iterdir())
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT}
                for f in files
            ]
            for revision in (*revisions, COMMIT):
                if path == f"/api/models/{repo}/revision/{revision}":
                    info = {
                        "id": repo,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": f.name} for f in files],
                    }
                    return self.send(json.dumps(info).encode(), with_body)
                if path == f"/api/models/{repo}/tree/{revision}":
                    return self.send(json.dumps(tree).encode(), with_body)
                file = folder / path.removeprefix(f"/{repo}/resolve/{revision}/")
                if path.startswith(f"/{repo}/resolve/{revision}/") and file.is_file():
                    return self.send(file.read_bytes(), with_body)
            return self.send(b"{}", with_body, status=404)

        def send(self, body, with_body, status=200):
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
