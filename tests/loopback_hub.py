"""A small hub on loopback, for tests: it takes uploads (create, preupload, LFS batch and PUT, commit) and gives files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40  # the only one that every repository has


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

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            repo_id = "/".join(self.path.split("?")[0].split("/")[3:5])
            files = self.server.repos.get(repo_id)
            if files is None:
                self._answer({"error": "no such repository"}, 404)
            elif "/tree/" in self.path:
                oids = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
                self._answer(
                    [{"type": "file", "path": n, "size": len(files[n]), "oid": oid} for n, oid in oids.items()]
                )
            else:
                self._answer({"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            self._file()

    def _file(self) -> None:
        """OWNER/NAME/resolve/REVISION/PATH, or what a hub says that has no such file."""
        repo_id, _, rest = self.path.split("?")[0].lstrip("/").partition("/resolve/")
        content = self.server.repos.get(repo_id, {}).get(rest.partition("/")[2])
        found = content is not None
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) if found else 0))
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if repo_id in self.server.repos else "RepoNotFound")
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(content)

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
        self._answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: dict | list, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing: the test's output is for its failures."""
