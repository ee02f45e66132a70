"""A stand-in for the Hugging Face hub at the network's edge: real HTTP on this machine, for what fetching and pushing
ask. Contents go through the hub's own native library into a folder that stands for its chunk store; this server keeps
names, rights and visibility. How it misbehaves is set by the test.

    with HubStandIn(folder) as hub:            # folder: where contents go; None where nothing is pushed
        environment["HF_ENDPOINT"] = hub.endpoint, environment["HF_TOKEN"] = hub.token
        ...
        hub.buckets["me/persona"].private, sorted(hub.buckets["me/persona"].paths)
        hub.download("me/persona", elsewhere)  # the bytes that arrived, through the hub's own library

The store is locked by one process at a time: do not download while a push is under way.
"""

import base64
import hashlib
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Account:
    """Whose token it is. role: "write", "read" or "fineGrained"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Bucket:
    """paths: path → the hub's hash."""

    private: bool
    paths: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """paths: path → what stands there: ("lfs", sha256, size) or ("git", content)."""

    private: bool
    paths: dict[str, tuple] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Held:
    """A request that is held back: `reached` once it is there, answered after release()."""

    def __init__(self, number: int):
        self.number = number
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    def wait(self) -> None:
        self.reached.set()
        self._released.wait(120)


@dataclass
class Hub:
    """files: repository → path → content, of dataset repositories. private: those that only `token` may read. cut: the
    first download of a path in it breaks off after so many bytes. stalls: paths whose download stops for good after a
    byte. asked: every request, with its Authorization and Range. did: what was done with buckets and repositories, in
    order: ("create", "me/persona"), ("batch", path), ("delete", path) and the like.

    accounts: token → whose. owners: names that exist. refuses: paths whose end is in it fail in a batch. loses: the
    same, but the hub says that all went well. echo: put the Authorization of a request into the text of errors.
    contents_hang: the store takes connections and never answers."""

    endpoint: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    token: str = "hf_right"
    cut: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    commit: str = COMMIT
    broken: bool = False
    store: Path | None = None
    ending: threading.Event = field(default_factory=threading.Event)
    did: list[tuple[str, str]] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    owners: set[str] = field(default_factory=set)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    loses: set[str] = field(default_factory=set)
    echo: bool = False
    contents_hang: bool = False
    _faults: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    _held: dict[str, list[Held]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def fail(self, operation: str, status: int, times: int = 1, message: str = "") -> None:
        """The next requests of that kind get this status. operation: whoami, info, create, batch, delete, paths-info,
        tree, token, repo-info, repo-create, repo-paths, commit."""
        self._faults.setdefault(operation, []).extend([(status, message)] * times)

    def hold(self, operation: str, number: int = 1) -> Held:
        """Hold the `number`th request of that kind from now on."""
        held = Held(self._counts.get(operation, 0) + number)
        self._held.setdefault(operation, []).append(held)
        return held

    def download(self, bucket: str, into: Path) -> dict[str, bytes]:
        """Everything in a bucket, by path."""
        script = (
            "import sys, json; from pathlib import Path; from huggingface_hub import HfApi\n"
            "api, bucket, into = HfApi(token=sys.argv[3]), sys.argv[1], Path(sys.argv[2])\n"
            "files = [f for f in api.list_bucket_tree(bucket, recursive=True) if f.type == 'file']\n"
            "api.download_bucket_files(bucket, [(f, into / f.path) for f in files])\n"
        )
        environment = os.environ | {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        subprocess.run(
            [sys.executable, "-c", script, bucket, str(into), self.token],
            env=environment, check=True, timeout=120, capture_output=True,
        )  # fmt: skip
        return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}

    def size_of(self, xet: str) -> int | None:
        """Bytes of a content that is in the store, by the hub's hash; None for one that is not."""
        found = _stored(self.store)
        return next((size for hash, _, size in found if hash == xet), None)

    def holds(self, sha256: str) -> bool:
        return any(known == sha256 for _, known, _ in _stored(self.store))


@contextmanager
def HubStandIn(folder: Path | None = None) -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = made = Hub(f"http://127.0.0.1:{server.server_port}", store=folder)  # type: ignore[attr-defined]
    made.accounts[made.token] = Account("me", orgs=("our-lab",))
    made.owners |= {"me", "our-lab", "somebody"}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.ending.set()
        for held in (each for several in made._held.values() for each in several):
            held.release()
        server.shutdown()
        server.server_close()


def _stored(store: Path | None) -> Iterator[tuple[str, str | None, int]]:
    """The hub's hash, sha256 (None where it was not told) and bytes of every content in the store, from the shards that
    the library leaves there: rows of 48 bytes; a file is a head, its parts, and what the head's flags announce."""
    for shard in store.rglob("xorbs/shards/*.mdb") if store else ():
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            name, flags, parts = _words(data[at : at + 32]), *struct.unpack_from("<II", data, at + 32)
            at += 48
            size = sum(struct.unpack_from("<I", data, at + 48 * part + 36)[0] for part in range(parts))
            at += 48 * parts * (2 if flags & 1 << 31 else 1)
            sha256 = None
            if flags & 1 << 30:
                sha256 = _words(data[at : at + 32])
                at += 48
            yield name, sha256, size


def _words(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self._body = self._read()
        path = urllib.parse.urlsplit(self.path).path
        self._token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.asked.append((urllib.parse.unquote(path), self.headers.get("Authorization"), self.headers.get("Range")))
        if path.startswith("/store/"):
            hub.ending.wait(600)
            self.close_connection = True
            return
        if hub.broken:
            return self._send(500, b"{}")
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        try:
            if parts[:2] == ["api", "whoami-v2"]:
                self._whoami(hub)
            elif "buckets" in parts[:2]:
                self._bucket(hub, parts[parts.index("buckets") + 1 :])
            elif parts[:3] == ["api", "repos", "create"]:
                self._create_repository(hub)
            elif parts[:2] == ["api", "models"]:
                self._model(hub, "/".join(parts[2:4]), parts[4:])
            else:
                self._dataset(hub, parts)
        except _Refused as refused:
            heads = {"X-Error-Code": refused.code} if refused.code else {}
            said = refused.message + (f" You sent {self.headers.get('Authorization')}" if hub.echo else "")
            if said:
                heads["X-Error-Message"] = said
            self._send(refused.status, json.dumps({"error": said}).encode(), heads)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _begin(self, hub: Hub, operation: str) -> None:
        """Counts a request, and holds or refuses it where the test said so."""
        count = hub._counts[operation] = hub._counts.get(operation, 0) + 1
        for held in hub._held.get(operation, ()):
            if held.number == count:
                held.wait()
        if faults := hub._faults.get(operation):
            status, message = faults.pop(0)
            raise _Refused(status, message=message)

    # ------------------------------------------------------------------------------------------------------- accounts

    def _account(self, hub: Hub) -> Account:
        if self._token not in hub.accounts:
            raise _Refused(401, "", "Invalid username or password.")
        return hub.accounts[self._token]

    def _may(self, hub: Hub, name: str, write: bool) -> bool:
        account = hub.accounts.get(self._token)
        if account is None or (write and account.role == "read"):
            return False
        return name.split("/")[0] in (account.name, *account.orgs)

    def _whoami(self, hub: Hub) -> None:
        self._begin(hub, "whoami")
        account = self._account(hub)
        self._json(
            {
                "type": "user",
                "name": account.name,
                "orgs": [{"name": org} for org in account.orgs],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": account.role}},
            }
        )

    # -------------------------------------------------------------------------------------------------------- buckets

    def _bucket(self, hub: Hub, parts: list[str]) -> None:
        name, what = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        if self.command == "POST" and not what:
            return self._create_bucket(hub, name)
        if not what:
            self._begin(hub, "info")
        bucket = hub.buckets.get(name)
        if bucket is None or (bucket.private and not self._may(hub, name, write=False)):
            known = self._token in hub.accounts
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if what in ("xet-write-token", "xet-read-token"):
            return self._contents(hub, name, what)
        if not what:
            sizes = [hub.size_of(xet) or 0 for xet in bucket.paths.values()]
            told = {"id": name, "private": bucket.private, "createdAt": DATE, "size": sum(sizes)}
            return self._json(told | {"totalFiles": len(sizes)})
        if what == "tree":
            self._begin(hub, "tree")
            prefix = "/".join(parts[3:])
            return self._json([self._entry(hub, bucket, path) for path in bucket.paths if path.startswith(prefix)])
        if what == "paths-info":
            self._begin(hub, "paths-info")
            wanted = json.loads(self._body)["paths"]
            return self._json([self._entry(hub, bucket, path) for path in wanted if path in bucket.paths])
        if what == "batch":
            return self._batch(hub, name, bucket)
        path = "/".join(parts[3:])
        if path not in bucket.paths:
            raise _Refused(404, "EntryNotFound")
        heads = {
            "X-Xet-Hash": bucket.paths[path],
            "X-Xet-Refresh-Route": f"{hub.endpoint}/api/buckets/{name}/xet-read-token",
            "X-Linked-Size": str(hub.size_of(bucket.paths[path])),
        }
        self._send(200, b"", heads)

    def _entry(self, hub: Hub, bucket: Bucket, path: str) -> dict[str, Any]:
        xet = bucket.paths[path]
        return {"type": "file", "path": path, "size": hub.size_of(xet), "xetHash": xet, "uploadedAt": DATE}

    def _create_bucket(self, hub: Hub, name: str) -> None:
        self._begin(hub, "create")
        account = self._account(hub)
        owner, _, short = name.partition("/")
        name = f"{account.name}/{short}" if owner == "me" else name
        self._check_owner(hub, name)
        if name in hub.buckets:
            raise _Refused(409, "", "You already created this bucket")
        # Public unless it is said.
        hub.buckets[name] = Bucket(json.loads(self._body).get("private") is True)
        hub.did.append(("create", name))
        self._json({"url": f"{hub.endpoint}/buckets/{name}", "id": name})

    def _check_owner(self, hub: Hub, name: str) -> None:
        if name.split("/")[0] not in hub.owners:
            raise _Refused(404, "", "Not found")
        if not self._may(hub, name, write=True):
            raise _Refused(403, "", "You don't have the rights to create this under that namespace")

    def _contents(self, hub: Hub, name: str, what: str) -> None:
        """Where contents go, or come from."""
        if what == "xet-write-token":
            self._begin(hub, "token")
            if not self._may(hub, name, write=True):
                raise _Refused(403, "", "Forbidden")
        store = f"{hub.endpoint}/store" if hub.contents_hang else f"local://{hub.store}"
        told = {"casUrl": store, "accessToken": "t", "exp": 2**33}
        heads = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(2**33)}
        self._send(200, json.dumps(told).encode(), heads)

    def _batch(self, hub: Hub, name: str, bucket: Bucket) -> None:
        lines = [json.loads(line) for line in self._body.splitlines()]
        self._begin(hub, "delete" if all(line["type"] == "deleteFile" for line in lines) else "batch")
        if not self._may(hub, name, write=True):
            raise _Refused(403, "", "Forbidden")
        failed = []
        for line in lines:
            path = line["path"]
            if path.endswith(tuple(hub.refuses)):
                failed.append({"path": path, "error": "refused by the test"})
            elif line["type"] == "deleteFile":
                bucket.paths.pop(path, None)
                hub.did.append(("delete", path))
            elif hub.size_of(line["xetHash"]) is None:
                failed.append({"path": path, "error": "its content is not in the store"})
            else:
                hub.did.append(("batch", path))
                if not path.endswith(tuple(hub.loses)):
                    bucket.paths[path] = line["xetHash"]
        done = len(lines) - len(failed)
        told = {"success": not failed, "processed": len(lines), "succeeded": done, "failed": failed}
        self._json(told, 422 if failed and not done else 200)

    # --------------------------------------------------------------------------------------------------------- models

    def _create_repository(self, hub: Hub) -> None:
        self._begin(hub, "repo-create")
        asked = json.loads(self._body)
        name = f"{asked.get('organization') or self._account(hub).name}/{asked['name']}"
        self._check_owner(hub, name)
        if name in hub.repositories:
            raise _Refused(409, "", "You already created this model repo")
        hub.repositories[name] = Repository(asked.get("visibility") == "private")
        hub.did.append(("repo-create", name))
        self._json({"url": f"{hub.endpoint}/{name}", "id": name})

    def _model(self, hub: Hub, name: str, parts: list[str]) -> None:
        if not parts:
            self._begin(hub, "repo-info")
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not self._may(hub, name, write=False)):
            known = self._token in hub.accounts
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if not parts:
            return self._json({"id": name, "private": repository.private, "sha": COMMIT})
        if parts[0] == "xet-write-token":
            return self._contents(hub, name, parts[0])
        if parts[0] == "paths-info":
            self._begin(hub, "repo-paths")
            wanted = urllib.parse.parse_qs(self._body.decode())["paths"]
            found = [_in_repository(path, repository.paths[path]) for path in wanted if path in repository.paths]
            return self._json(found)
        if parts[0] == "commit":
            return self._commit(hub, name, repository)
        raise _Refused(404)

    def _commit(self, hub: Hub, name: str, repository: Repository) -> None:
        self._begin(hub, "commit")
        if not self._may(hub, name, write=True):
            raise _Refused(403, "", "Forbidden")
        added: dict[str, tuple] = {}
        for line in map(json.loads, self._body.splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                if not hub.holds(value["oid"]):
                    raise _Refused(400, "", f"{value['path']}: its content was not sent")
                added[value["path"]] = ("lfs", value["oid"], value["size"])
            elif line["key"] == "file":
                added[value["path"]] = ("git", base64.b64decode(value["content"]))
        repository.paths |= added
        repository.commits.append(hashlib.sha1(self._body).hexdigest())
        hub.did.append(("commit", name))
        url = f"{hub.endpoint}/{name}/commit/{repository.commits[-1]}"
        self._json({"commitOid": repository.commits[-1], "commitUrl": url})

    # ------------------------------------------------------------------------------------------------------- datasets

    def _dataset(self, hub: Hub, parts: list[str]) -> None:
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        if repo not in hub.files:
            raise _Refused(401, "RepoNotFound", "Repository not found")
        if repo in hub.private and self._token != hub.token:
            raise _Refused(401, "RepoNotFound", "Repository not found")
        files = hub.files[repo]
        if parts[0] == "api" and "tree" in parts:
            sizes = {name: len(content) for name, content in files.items()}
            return self._json([{"type": "file", "path": p, "size": s, "oid": "0" * 40} for p, s in sizes.items()])
        if parts[0] == "api":
            return self._json({"id": repo, "sha": hub.commit})
        self._download(hub, "/".join(parts[5:]), files)

    def _download(self, hub: Hub, name: str, files: dict[str, bytes]) -> None:
        if name not in files:
            raise _Refused(404, "EntryNotFound")
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

    # --------------------------------------------------------------------------------------------------------- answers

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _in_repository(path: str, found: tuple) -> dict[str, Any]:
    if found[0] == "lfs":
        lfs = {"oid": found[1], "size": found[2], "pointerSize": 134}
        return {"type": "file", "path": path, "size": found[2], "oid": "0" * 40, "lfs": lfs}
    content = found[1]
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}
