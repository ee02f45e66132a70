"""Where a push goes: a bucket or a model repository on the Hugging Face hub, always private. Owns how the hub is spoken
to, and its errors in words; what goes there, whether it may and in which order is publish's. Meant for a process of its
own: the hub's library has settings of its process, and threads of it may be left behind."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from katherine import audit, hub
from katherine.errors import PublishError

# An upload runs in a native library that retries on its own for minutes and says nothing; without a byte for this many
# seconds it is given up. A piece of 64 MB moves in steps of a tenth: 120 s is 0.4 Mbit/s.
STALLED = 120.0
# Between two looks at it.
LOOK = 0.1
# What the hub allows in a name: letters, digits, -, _ and ., at most 96 in all, beginning with none of the last two.
_NAME = re.compile(r"(?!.*(?:--|\.\.))[0-9A-Za-z](?:[0-9A-Za-z._-]{0,94}[0-9A-Za-z_])?")
_PREFIXES = ("https://huggingface.co/", "hf://buckets/", "hf://models/", "hf://", "buckets/", "models/")
# The native library says the status of an answer in its text alone: "... client error (403 Forbidden) ...".
_STATUS = re.compile(r"\((\d{3}) [A-Z]")
# What a refusal for want of room says; the hub has no status of its own for it.
_FULL = re.compile(
    r"storage (?:limit|quota)|quota|billing|payment|limit (?:reached|exceeded)|(?:out of|no) space", re.I
)
_BEARER = re.compile(r"(bearer\s+)\S+", re.I)
# As much of the hub's own words as fits a message.
_QUOTED = 300


@dataclass(frozen=True, slots=True)
class Sending:
    """A file to be sent. path: there, below the destination's root. source, bytes, sha256: here."""

    path: str
    source: Path
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Account:
    """Whose token it is. owners: names that it may own things by, as far as the hub says."""

    name: str
    owners: tuple[str, ...]


class Hub:
    """The hub, asked with one token."""

    def __init__(self, token: str):
        self._token = token
        self.api = hub.api(token)
        self.endpoint: str = self.api.endpoint

    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self._token)

    def account(self) -> Account:
        """Raises PublishError where the token is not known, or may only read."""
        with self.words("the account of HF_TOKEN"):
            told = self.api.whoami(token=self._token)
            access = (told.get("auth") or {}).get("accessToken") or {}
            orgs = [org["name"] for org in told.get("orgs") or ()]
            found = Account(told["name"], (told["name"], *orgs))
        if access.get("role") == "read":
            raise PublishError(
                f"HF_TOKEN, of {found.name}, may only read. Make a token that may write at {self.endpoint}"
                "/settings/tokens, and start the panel anew with it."
            )
        return found

    @contextmanager
    def words(self, what: str, may_create: bool = False) -> Iterator[None]:
        """Turns what the hub's libraries raise inside into a PublishError about `what`. may_create: whether it is being
        made, so that "not found" means its owner."""
        from huggingface_hub.errors import BucketBatchError, HfHubHTTPError

        try:
            yield
        except PublishError:
            raise
        except BucketBatchError as error:
            first = error.failures[0] if error.failures else {}
            said = clean(f"{first.get('path', 'a file')}: {first.get('error', 'no reason given')}")
            raise PublishError(
                f"The hub did not take {len(error.failures)} of the files for {what} ({said}). Push again: what is "
                "there already is not sent twice."
            ) from error
        except HfHubHTTPError as error:
            said = getattr(error, "server_message", None) or ""
            raise self.refused(error.response.status_code, said, what, may_create) from error
        except (httpx.HTTPError, TimeoutError, OSError) as error:
            if found := _STATUS.search(str(error)):
                raise self.refused(int(found[1]), "", what, may_create) from error
            raise PublishError(
                f"The hub cannot be reached for {what} ({type(error).__name__}: {clean(str(error))}). Check the "
                "network, then push again: what is there already is not sent twice."
            ) from error
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PublishError(
                f"The hub's answer about {what} cannot be used ({type(error).__name__}: {clean(str(error))}). Try "
                "again later."
            ) from error

    def refused(self, status: int, said: str, what: str, may_create: bool = False) -> PublishError:
        """The hub's answer `status` about `what` in words. said: its own."""
        quoted = f" It says: {clean(said).rstrip('.')}." if said else ""
        if status in (402, 413, 507) or (status == 403 and _FULL.search(said)):
            return PublishError(
                f"The hub has no room left for {what} ({status}).{quoted} Free some storage of that account or buy "
                "more, then push again."
            )
        if status == 401:
            return PublishError(
                f"The hub does not accept HF_TOKEN ({status}): it is wrong, expired or revoked. Set another one and "
                "start the panel anew."
            )
        if status == 403:
            return PublishError(
                f"HF_TOKEN may not write to {what} ({status}).{quoted} Use a token with write access to it, or push to "
                "an owner that the token's account belongs to."
            )
        if status == 404:
            why = "has no such owner, or hides it from HF_TOKEN" if may_create else "does not know it (any more)"
            return PublishError(f"The hub {why}: {what} ({status}). Check the name, and what the token may do.")
        if status == 429:
            return PublishError(f"The hub is asked too often ({status}). Wait some minutes, then push again.")
        return PublishError(f"The hub answered {status} about {what}.{quoted} Try again later.")

    def send(self, kind: str, name: str, files: Sequence[Sending], tell: Callable[[int], None]) -> list[str]:
        """Sends contents, which have no name there yet, and returns the hub's hash of each. tell: gets bytes done, of
        these files together, ten times a second; what it raises ends the upload. Pieces that an earlier attempt sent
        are not sent again, as far as the native library noted them (every 20 s or 64 pieces, in HF_XET_CACHE).

        Raises PublishError, also where a file is not the one that its sha256 says, or nothing moves for STALLED
        seconds."""
        import hf_xet
        from huggingface_hub.utils._xet import XetTokenType, xet_connection_info_refresh_url, xet_headers_without_auth

        headers = self.headers()
        revision = None if kind == "bucket" else "main"
        url = xet_connection_info_refresh_url(
            token_type=XetTokenType.WRITE, repo_id=name, repo_type=kind, revision=revision, endpoint=self.endpoint
        )
        commits: list[Any] = []
        found: list[Any] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                commit = hf_xet.XetSession().new_upload_commit(
                    token_refresh_url=url,
                    token_refresh_headers=headers,
                    custom_headers=xet_headers_without_auth(headers),
                )
                commits.append(commit)
                # Hashed from the very bytes that are sent: the file may be another by then.
                handles = [commit.start_upload_file(str(file.source), sha256=hf_xet.COMPUTE_SHA256) for file in files]
                commit.wait_to_finish()
                found.extend(handle.result().xet_info for handle in handles)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        moved: tuple[int, ...] = ()
        since = time.monotonic()
        try:
            while thread.is_alive():
                thread.join(LOOK)
                now = _moved(commits)
                if now != moved:
                    moved, since = now, time.monotonic()
                tell(now[0])
                if time.monotonic() - since > STALLED:
                    raise PublishError(
                        f"Nothing moved for {STALLED:.0f} s while {files[0].path} was sent to {kind} {name}. Check the "
                        "network, then push again: what is there already is not sent twice."
                    )
        except BaseException:
            for commit in commits:
                with suppress(Exception):
                    commit.abort()
            raise
        if failed:
            with self.words(f"{kind} {name}"):
                raise failed[0]
        for file, info in zip(files, found, strict=True):
            if (info.sha256, info.file_size) != (file.sha256, file.bytes):
                raise PublishError(
                    f"{file.path} is not the file that was approved: its sha256 was {str(info.sha256)[:12]}… when it "
                    f"was sent, not {file.sha256[:12]}…. It got no name in {kind} {name}. Look after what changes it."
                )
        return [info.hash for info in found]


def _moved(commits: Sequence[Any]) -> tuple[int, ...]:
    """Everything that grows while an upload goes on, the bytes that are done first."""
    if not commits:
        return (0,)
    told = commits[0].progress()
    shard = told.shard
    more = () if shard is None else (shard.total_shard_bytes_upload_completed, shard.total_shards_synced)
    return told.total_bytes_completed, told.total_transfer_bytes, told.total_transfer_bytes_completed, *more


def clean(text: str) -> str:
    """What a library said, short enough for a message and without a secret in it."""
    seen = " ".join(str(audit.without_secrets(_BEARER.sub(r"\1[secret]", text))).split())
    return seen if len(seen) <= _QUOTED else f"{seen[:_QUOTED]}…"


def place(text: str, account: Account | None = None) -> str:
    """owner/name of a bucket or repository, from that, from its address on the hub, or from a bare name (then the
    account's). Raises PublishError for what no name can be; with a bare name and no account, that name comes back."""
    wanted = text.strip().rstrip("/")
    for prefix in _PREFIXES:
        wanted = wanted.removeprefix(prefix)
    parts = wanted.split("/")
    if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts):
        raise PublishError(
            f"{text!r} cannot be a place on the hub. Give owner/name, each of letters, digits, -, _ and ., such as "
            "my-name/persona."
        )
    return f"{account.name}/{wanted}" if len(parts) == 1 and account else wanted


def xet_of(file: Path) -> str:
    """The hub's hash of a file here, without sending it. Raises PublishError where it cannot be read."""
    import hf_xet

    try:
        (found,) = hf_xet.hash_files([str(file)])
    except (OSError, RuntimeError) as error:
        raise PublishError(f"{file} cannot be read ({clean(str(error))}).") from error
    return found.hash


# ------------------------------------------------------------------------------------------------------------- buckets


@dataclass(frozen=True, slots=True)
class There:
    """A file in a bucket, by size and the hub's hash."""

    bytes: int
    xet: str


class Bucket:
    """A bucket, written to only while it is private."""

    def __init__(self, at: Hub, name: str):
        self.name = name
        self._hub = at

    @property
    def what(self) -> str:
        return f"bucket {self.name}"

    @property
    def url(self) -> str:
        return f"{self._hub.endpoint}/buckets/{self.name}"

    def open(self) -> bool:
        """Makes it, private, where it is not there, and reads it back as private either way. Returns whether it was
        made. Raises PublishError."""
        if made := self._info() is None:
            self._create()
        self.check_private()
        return made

    def _info(self) -> Any:
        from huggingface_hub.errors import BucketNotFoundError, HfHubHTTPError

        with self._hub.words(self.what):
            try:
                return self._hub.api.bucket_info(self.name)
            except BucketNotFoundError as error:
                # With a token that is not accepted, every bucket looks as if it were not there.
                if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
                    raise self._hub.refused(401, "", self.what) from error
                return None

    def _create(self) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        with self._hub.words(self.what, may_create=True):
            try:
                self._hub.api.create_bucket(self.name, private=True)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                if self._info() is None:
                    raise PublishError(
                        f"A {self.what} exists, and HF_TOKEN may not look into it. Name another one, or give the token "
                        "access to it."
                    ) from error

    def check_private(self) -> None:
        """Raises PublishError where it is not private (any more), or not there."""
        told = self._info()
        if told is None:
            raise PublishError(f"There is no {self.what} any more: it was removed meanwhile. Push again.")
        if told.id != self.name:
            raise PublishError(f"The hub calls {self.what} {told.id}. Push to that name.")
        if told.private is not True:
            raise PublishError(
                f"The {self.what} is public: anybody could read what is pushed there. Nothing was changed about that. "
                f"Make it private yourself at {self.url}, or name another one."
            )

    def there(self, paths: Iterable[str]) -> dict[str, There]:
        """Of these paths those that are there."""
        with self._hub.words(self.what):
            told = list(self._hub.api.get_bucket_paths_info(self.name, list(paths)))
            return {file.path: There(file.size, file.xet_hash) for file in told}

    def below(self, folder: str) -> list[str]:
        """Every path below a folder."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._hub.words(self.what):
            try:
                tree = list(self._hub.api.list_bucket_tree(self.name, prefix=folder, recursive=True))
            except EntryNotFoundError:
                return []
            return sorted(entry.path for entry in tree if entry.type == "file" and entry.path.startswith(f"{folder}/"))

    def put(
        self, files: Sequence[Sending], tell: Callable[[int], None], may: Callable[[], None] = lambda: None
    ) -> dict[str, str]:
        """Sends the files and gives them their names, all at once: path → the hub's hash. It may be broken off: none of
        them then has a name, or some have. Before they get their names, `may` has its say (it raises), and the bucket
        is read back as private once more: sending takes long enough for both to change."""
        from huggingface_hub._buckets import _BucketAddFile

        found = self._hub.send("bucket", self.name, files, tell)
        may()
        self.check_private()
        with self._hub.words(self.what):
            added = [
                _BucketAddFile(source=str(file.source), destination=file.path, xet_hash=xet, size=file.bytes)
                for file, xet in zip(files, found, strict=True)
            ]
            self._hub.api.batch_bucket_files(self.name, add=added)
        return {file.path: xet for file, xet in zip(files, found, strict=True)}

    def remove(self, paths: Sequence[str]) -> None:
        with self._hub.words(self.what):
            self._hub.api.batch_bucket_files(self.name, delete=list(paths))


# -------------------------------------------------------------------------------------------------- model repositories


class Repository:
    """A model repository, written to only while it is private. Everything gets its name in one commit."""

    def __init__(self, at: Hub, name: str):
        self.name = name
        self._hub = at

    @property
    def what(self) -> str:
        return f"model repository {self.name}"

    @property
    def url(self) -> str:
        return f"{self._hub.endpoint}/{self.name}"

    def open(self) -> bool:
        """As Bucket.open."""
        if made := self._info() is None:
            with self._hub.words(self.what, may_create=True):
                self._hub.api.create_repo(self.name, repo_type="model", private=True, exist_ok=True)
        self.check_private()
        return made

    def _info(self) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._hub.words(self.what):
            try:
                return self._hub.api.model_info(self.name)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise self._hub.refused(401, "", self.what) from error
                return None

    def check_private(self) -> None:
        """As Bucket.check_private."""
        told = self._info()
        if told is None:
            raise PublishError(f"There is no {self.what} any more: it was removed meanwhile. Push again.")
        if told.id != self.name:
            raise PublishError(f"The hub calls {self.what} {told.id}. Push to that name.")
        if told.private is not True:
            raise PublishError(
                f"The {self.what} is public: anybody could read what is pushed there. Nothing was changed about that. "
                f"Make it private yourself at {self.url}/settings, or name another one."
            )

    def differing(self, files: Sequence[Sending]) -> list[Sending]:
        """Those that are not there, or are others there."""
        with self._hub.words(self.what):
            told = self._hub.api.get_paths_info(self.name, [file.path for file in files], repo_type="model")
            there = {file.path: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in told}
        return [file for file in files if there.get(file.path, ()) not in _hashed(file)]

    def put(self, file: Sending, tell: Callable[[int], None]) -> None:
        """Sends the content of a large file; commit() gives it its name."""
        self._hub.send("model", self.name, [file], tell)

    def commit(self, large: Sequence[Sending], small: Sequence[Sending], summary: str) -> str:
        """Names all files at once; the small ones are in the commit itself. Returns the commit's id."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": summary, "description": ""}}]
        for file in large:
            value = {"path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.bytes}
            lines.append({"key": "lfsFile", "value": value})
        for file in small:
            content = file.source.read_bytes()
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise PublishError(f"{file.path} changed while it was pushed. Push again.")
            encoded = base64.b64encode(content).decode()
            lines.append({"key": "file", "value": {"path": file.path, "content": encoded, "encoding": "base64"}})
        with self._hub.words(self.what):
            answer = get_session().post(
                f"{self._hub.endpoint}/api/models/{self.name}/commit/main",
                headers=self._hub.headers() | {"Content-Type": "application/x-ndjson"},
                content=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
            )
            hf_raise_for_status(answer)
            return str(answer.json()["commitOid"])


def _hashed(file: Sending) -> list[tuple[int, str]]:
    """Size and hash as the hub may tell them: sha256 of a large file, git's own of a small one."""
    found = [(file.bytes, file.sha256)]
    if file.bytes <= 10 * 2**20:  # the hub takes no larger ones into git itself
        content = file.source.read_bytes()
        found.append((len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()))
    return found
