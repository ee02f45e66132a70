"""Training data from the Hugging Face hub: the JSONL files of a dataset repository or a bucket, fetched into the inbox.
Nothing is written to the hub here. Meant for a process of its own: the hub's library has settings of its process."""

import glob
import hashlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

from katherine import disk
from katherine.errors import DataError, DiskError, NotFound, SetupError
from katherine.progress import Progress, Stopped
from katherine.settings import Home, secret

# Seconds without a byte after which the hub counts as silent. Its own library would wait for ever.
PATIENCE = 30.0
# A bucket's files come through a native library that retries on its own; after this many seconds without growth of the
# file it is given up.
STALLED = 120.0
# How often a file is asked for again where the connection broke off; each goes on where the last one ended.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Place:
    """Where on the hub. kind: "dataset" or "bucket". id: owner/name. path: a file or folder in it, "" for all.
    revision: a branch, tag or commit, or None for the main branch; buckets have none."""

    kind: str
    id: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.kind}s/{self.id}{revision}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True, slots=True)
class File:
    """A JSONL file there. path: below the repository's or bucket's root. size: bytes. remote: what the bucket API wants
    back, else None."""

    path: str
    size: int
    remote: Any = None


def parse(text: str) -> Place:
    """Reads owner/name, owner/name/folder, owner/name@revision, datasets/..., buckets/..., hf://datasets/...,
    hf://buckets/... and the hub's web addresses. A bare owner/name is a dataset. Raises DataError."""
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    wanted = text.strip()
    uri = wanted
    if "://" not in wanted:
        uri = "hf://" + (wanted if wanted.startswith(("datasets/", "buckets/")) else f"datasets/{wanted}")
    try:
        found = parse_hf_uri(uri)
    except (HfUriError, ValueError) as error:
        raise DataError(f"{wanted!r} is no place on the hub: {error} {_EXAMPLES}") from None
    if found.type not in ("dataset", "bucket"):
        raise DataError(f"{wanted!r} is a {found.type}, which holds no training data. {_EXAMPLES}")
    return Place(found.type, found.id, found.path_in_repo.strip("/"), found.revision)


_EXAMPLES = (
    "Write owner/name for a dataset, buckets/owner/name for a bucket, with a folder or file behind it if needed."
)


def files(place: Place) -> list[File]:
    """The .jsonl files there, with sizes, by path. Raises NotFound, SetupError."""
    api = _api()

    def ask() -> list[File]:
        if place.kind == "bucket":
            tree = api.list_bucket_tree(place.id, recursive=True, token=_token())
        else:
            tree = api.list_repo_tree(
                place.id, recursive=True, revision=place.revision, repo_type="dataset", token=_token()
            )
        inside = (entry for entry in tree if hasattr(entry, "size") and _within(entry.path, place.path))
        return [File(entry.path, entry.size, entry if place.kind == "bucket" else None) for entry in inside]

    every = _asked(place, ask)
    found = sorted((file for file in every if file.path.lower().endswith(".jsonl")), key=lambda file: file.path)
    if found:
        return found
    if place.path and not every:
        raise NotFound(f"There is no {place.path} in {place.kind}s/{place.id}. Check the path.")
    others = sorted({PurePosixPath(file.path).suffix or "without an ending" for file in every}) or ["nothing at all"]
    raise NotFound(f"{place} holds no .jsonl file (it holds: {', '.join(others[:8])}). Only JSONL can be read here.")


def fetch(home: Home, text: str, progress: Progress) -> Path:
    """Downloads the JSONL files of a place on the hub into a folder of the inbox, and returns that folder. It appears
    whole or not at all; what a broken attempt had finished is used by the next one of the same place.

    Phases "list" and "download" (steps: MB). The token is HF_READ_TOKEN, and no other that this machine may know.

    Raises DataError for what is no place, NotFound where there is none or nothing in it, SetupError where the hub
    cannot be reached or a token is missing, DiskError, Stopped.
    """
    place = parse(text)
    progress.phase("list")
    commit = _commit(place)
    pinned = replace(place, revision=commit) if commit else place
    wanted = files(pinned)
    total = sum(file.size for file in wanted)
    progress.say(f"{place}: {len(wanted)} files, {total / 1e6:.1f} MB")
    _check_room(home, total)
    draft = _draft(home, place, commit)
    progress.phase("download")
    done = 0
    try:
        for file in wanted:
            target = draft / _safe(file.path)
            # A file has its name here only once it is whole, and the draft is of this very commit.
            if not target.is_file():
                _fetch_one(pinned, file, target, partial(_tell, progress, total, done))
            done += file.size
            _tell(progress, total, done, 0)
        return _keep(draft, home.inbox / _folder_name(place))
    except (Stopped, SystemExit):
        # Only a broken attempt is gone on with; who stops one does not want it.
        shutil.rmtree(draft, ignore_errors=True)
        raise
    except OSError as error:
        if disk.is_full(error):
            raise DiskError(
                f"The disk is full: {place} does not fit into {home.inbox}. Make room, then fetch it again."
            ) from error
        raise DiskError(f"{place} could not be written to {home.inbox}: {error}.") from error


def _commit(place: Place) -> str | None:
    """The commit that the revision names now, so that an attempt goes on with the very files that the last one began
    with; None for a bucket, which has none."""
    if place.kind == "bucket":
        return None
    return _asked(place, lambda: _api().dataset_info(place.id, revision=place.revision, token=_token()).sha)


def _draft(home: Home, place: Place, commit: str | None) -> Path:
    """Where the files are gathered. One of the same commit is gone on with; others of the place are removed."""
    name = f".{_folder_name(place)}"
    draft = home.inbox / f"{name}@{commit[:16] if commit else 'now'}"
    for other in home.inbox.glob(f"{glob.escape(name)}@*"):
        if other != draft or not commit:
            shutil.rmtree(other)
    draft.mkdir(parents=True, exist_ok=True)
    return draft


def _tell(progress: Progress, total: int, before: int, size: int) -> None:
    """Bytes: of all files, of those that are there, and of the one that is coming."""
    progress.step((before + size) // 10**6, total // 10**6)
    if progress.stop_requested():
        raise Stopped


def _fetch_one(place: Place, file: File, target: Path, tell: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    if place.kind == "bucket":
        _from_bucket(place, file, part, tell)
    else:
        _asked(place, lambda: _from_dataset(place, file, part, tell))
    size = part.stat().st_size
    if size != file.size:
        part.unlink()
        raise SetupError(f"{file.path} came with {size:,} bytes, not {file.size:,}. Fetch it again.")
    part.rename(target)


def _from_dataset(place: Place, file: File, part: Path, tell: Callable[[int], None]) -> None:
    """Over plain HTTP, going on where a broken connection ended."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(place.id, file.path, repo_type="dataset", revision=place.revision, endpoint=_api().endpoint)
    for attempt in range(1, ATTEMPTS + 1):
        have = part.stat().st_size if part.exists() else 0
        if have >= file.size:
            part.unlink(missing_ok=True)
            have = 0
        headers = build_hf_headers(token=_token()) | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with _session().stream("GET", url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                goes_on = have > 0 and response.status_code == 206
                with part.open("ab" if goes_on else "wb") as out:
                    for block in response.iter_raw():
                        out.write(block)
                        tell(out.tell())
            return
        except httpx.TransportError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(attempt)


def _from_bucket(place: Place, file: File, part: Path, tell: Callable[[int], None]) -> None:
    """Through the hub's own library, which fetches chunks natively. It cannot be interrupted, so it works in a thread
    that is left behind where it hangs."""
    part.unlink(missing_ok=True)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _api().download_bucket_files(place.id, [(file.remote, part)], token=_token())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    size, grown = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        now = part.stat().st_size if part.exists() else 0
        if now != size:
            size, grown = now, time.monotonic()
        if time.monotonic() - grown > STALLED:
            raise SetupError(f"The hub sent nothing of {file.path} for {STALLED:.0f} s. Try again later.")
        tell(size)
    if failed:
        _asked(place, lambda: _raise(failed[0]))


def _raise(error: BaseException) -> None:
    raise error


def _asked(place: Place, ask: Callable[[], Any]) -> Any:
    """The answer, with the library's errors in words."""
    from huggingface_hub.errors import (
        BucketNotFoundError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = "" if secret("HF_READ_TOKEN") else " Set HF_READ_TOKEN if it is private."
    try:
        return ask()
    except GatedRepoError as error:
        raise SetupError(f"{place} is gated: accept its terms on the hub, as the owner of HF_READ_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{place.kind}s/{place.id} has no revision {place.revision!r}.") from error
    except EntryNotFoundError as error:
        raise NotFound(f"There is no {place.path or 'such file'} in {place.kind}s/{place.id}.") from error
    except (RepositoryNotFoundError, BucketNotFoundError) as error:
        private = token or " If it is private, HF_READ_TOKEN may not read it."
        raise NotFound(f"The hub knows no {place.kind} {place.id}.{private}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise SetupError(f"The hub lets nobody without the right token read {place} ({status}).{token}") from error
        raise SetupError(f"The hub answered {status} for {place}. Try again later.") from error
    except (httpx.HTTPError, ConnectionError, TimeoutError) as error:
        name = type(error).__name__
        raise SetupError(f"The hub cannot be reached ({name}). Check the network, then try again.") from error
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"The hub's answer about {place} cannot be used: {error}.") from error


def api(token: str | bool) -> Any:
    """The hub's library, which asks with this token (False: with none) and never waits for ever."""
    from huggingface_hub import HfApi

    _session()
    return HfApi(token=token)


def _api() -> Any:
    return api(_token())


def _token() -> str | bool:
    # False, not None: None would let the library use a token cached on this machine, unasked.
    return secret("HF_READ_TOKEN") or False


class _Bounded(httpx.Client):
    """Asks with a time limit where the library asks without one."""

    def send(self, request: httpx.Request, **given: Any) -> httpx.Response:
        limits = request.extensions.get("timeout") or {}
        if not limits or None in limits.values():
            request.extensions = request.extensions | {"timeout": httpx.Timeout(PATIENCE).as_dict()}
        return super().send(request, **given)


def _session() -> httpx.Client:
    from huggingface_hub.utils import get_session, set_client_factory

    session = get_session()
    if not isinstance(session, _Bounded):
        set_client_factory(lambda: _Bounded(follow_redirects=True))
        session = get_session()
    return session


def _within(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(folder + "/")


def _safe(path: str) -> Path:
    """A path on the hub as one below a folder of ours. Raises DataError for one that would lead out of it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise DataError(f"The hub names a file {path!r}, which leads out of the inbox; nothing was fetched.")
    return Path(*parts)


def _folder_name(place: Place) -> str:
    """Readable, the same for the same place, and another for every other: no owner or name on the hub holds "--"."""
    name = ("bucket--" if place.kind == "bucket" else "") + place.id.replace("/", "--")
    if place.path or place.revision:
        shown = re.sub(r"[^0-9A-Za-z._-]+", "-", PurePosixPath(place.path).name or place.revision or "")[:60]
        name += f"--{shown}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    return name


def _check_room(home: Home, size: int) -> None:
    free = disk.room(home.inbox).free
    if free < size:
        raise DiskError(
            f"{home.inbox} has {free / 1e9:.1f} GB free, and these files need {size / 1e9:.1f} GB. "
            "Make room there, or point KATHERINE_HOME elsewhere."
        )


def _keep(draft: Path, folder: Path) -> Path:
    """Gives the draft its place. What was fetched from there before makes way."""
    for part in draft.rglob(".*.part"):
        with suppress(OSError):
            part.unlink()
    if folder.exists():
        old = folder.with_name(f".old-{secrets.token_hex(4)}")
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(folder)
    return folder
