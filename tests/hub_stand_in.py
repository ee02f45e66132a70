"""A stand-in for the Hugging Face hub at the network's edge: real HTTP on this machine, with the few addresses that
fetching from a dataset repository asks. How it misbehaves is set by the test."""

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """files: repository → path → content. private: those that only `token` may read. cut: the first download of a path
    in it breaks off after so many bytes. stalls: paths whose download stops for good after a byte. asked: every
    request, with its Authorization and Range."""

    endpoint: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    cut: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    commit: str = COMMIT
    broken: bool = False
    store: str = ""  # the folder that stands for the hub's chunk store: the library's own, on a local disk
    buckets: dict[str, dict[str, dict]] = field(default_factory=dict)
    ending: threading.Event = field(default_factory=threading.Event)


@contextmanager
def hub() -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = made = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.ending.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.asked.append((path, self.headers.get("Authorization"), self.headers.get("Range")))
        if hub.broken:
            return self._send(500, b"{}")
        parts = path.strip("/").split("/")
        if "buckets" in parts[:2]:
            return self._bucket(hub, parts[parts.index("buckets") + 1 :])
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        if repo not in hub.files:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo in hub.private and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        files = hub.files[repo]
        if parts[0] == "api" and "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()
            ]
            return self._send(200, json.dumps(tree).encode())
        if parts[0] == "api":
            return self._send(200, json.dumps({"id": repo, "sha": hub.commit}).encode())
        return self._download(hub, "/".join(parts[5:]), files)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """What is uploaded into a bucket is told by name, size and content hash, a line each."""
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        parts = self.path.strip("/").split("/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        bucket = hub.buckets.setdefault("/".join(parts[2:4]), {})
        for line in body.splitlines():
            told = json.loads(line)
            bucket[told["path"]] = told
        self._send(200, b'{"success": true, "processed": 1, "succeeded": 1, "failed": []}')

    def _bucket(self, hub: Hub, parts: list[str]) -> None:
        name, what = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        if what in ("xet-write-token", "xet-read-token"):
            token = {"casUrl": f"local://{hub.store}", "accessToken": "t", "exp": 2**33}
            heads = {"X-Xet-Cas-Url": token["casUrl"], "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(2**33)}
            return self._send(200, json.dumps(token).encode(), heads)
        if name not in hub.buckets:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = hub.buckets[name]
        if what == "tree":
            sizes = {path: len(hub.files[name][path]) for path in files}
            tree = [
                {"type": "file", "path": path, "size": sizes[path], "xetHash": told["xetHash"]}
                for path, told in files.items()
            ]
            return self._send(200, json.dumps(tree).encode())
        path = "/".join(parts[3:])
        heads = {
            "X-Xet-Hash": files[path]["xetHash"],
            "X-Xet-Refresh-Route": f"{hub.endpoint}/api/buckets/{name}/xet-read-token",
            "X-Linked-Size": str(len(hub.files[name][path])),
        }
        return self._send(200, b"", heads)

    def _download(self, hub: Hub, name: str, files: dict[str, bytes]) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        whole, wanted = files[name], self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = whole[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name in hub.stalls:
            self.wfile.write(body[:1])
            self.wfile.flush()
            hub.ending.wait(60)
            self.close_connection = True
        elif name in hub.cut:
            self.wfile.write(body[: hub.cut.pop(name)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
