"""A small hub on loopback that takes uploads (create, preupload, LFS batch and PUT, commit), for tests of pushing."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub(ThreadingHTTPServer):
    """Keeps what it was sent: `repos[repo_id]` is path -> bytes; files above `lfs_from_bytes` go through LFS."""

    daemon_threads = True

    def __init__(self, lfs_from_bytes: int = 10_000):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lfs_from_bytes = lfs_from_bytes
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content, as PUT
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT should say."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running hub, shut down at the end."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            self._preupload(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").split("/commit/")[0], body)
        else:
            self._answer({"error": f"no POST {path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer({"error": "content is not what its name says"}, 422)
            return
        self.server.objects[oid] = content
        self._answer({})

    def _create(self, request: dict) -> None:
        repo_id = f"{request['organization']}/{request['name']}"
        self.server.tokens.add(self.headers["Authorization"])
        self.server.repos.setdefault(repo_id, {})
        self.server.private[repo_id] = request.get("private", False) or request.get("visibility") == "private"
        self._answer({"url": f"{self.server.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def _preupload(self, request: dict) -> None:
        limit = self.server.lfs_from_bytes
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > limit else "regular", "shouldIgnore": False}
            for f in request["files"]
        ]
        self._answer({"files": files})

    def _lfs_batch(self, request: dict) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in request["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.repos[repo_id][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.repos[repo_id][value["path"]] = self.server.objects[value["oid"]]
        oid = "0" * 40
        self._answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing: the test's output is for its failures."""
