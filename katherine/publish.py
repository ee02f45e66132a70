"""The push: an approved export's files, adapters and papers to a private bucket on the hub, compared there, and the
receipt of it. Owns the order and the receipts; who may is approval's, how the hub is spoken to destinations', what the
papers say modelcard's.

    KATHERINE_HOME/reviews/<export>/pushes/<id>.json    one for each push that came to its end

In the bucket, below a folder named after the export; the manifest is there only while all it names is:

    gguf/*.gguf  adapters/<n>-<kind>/  README.md  recipe.json  acceptance.json  probes.json  approval.json
    manifest.json
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from katherine import adapters, approval, audit, manifests, modelcard, runs
from katherine.approval import Approval
from katherine.destinations import Bucket, Hub, Repository, Sending, place, xet_of
from katherine.errors import ApprovalError, Busy, DiskError, NotFound, PublishError
from katherine.progress import Progress, Stopped
from katherine.runs import Run
from katherine.settings import Home, secret
from katherine.turns import bind

MANIFEST = "manifest.json"
TOKEN = "HF_TOKEN"
# Events of the audit log. The first is written before the first byte: a push that fails may have sent something.
BEGUN, PUSHED = "push begun", "push"
# What a push that was broken off leaves behind.
LEFT = "What had arrived stays there, with a manifest only if all of it had. Push again to finish it."
# A file's name goes into addresses, tables and shell commands.
_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_NO_HASH = "0" * 64


class Item(msgspec.Struct, frozen=True):
    """A file of a push. path: below the export's folder there. kind: "gguf", "adapter", "paper" or "manifest"."""

    path: str
    kind: str
    bytes: int
    quant: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What would go where. folder: in the bucket. files: in the order in which they go. approved: whether that is by an
    approval that stands, as far as sizes and times tell; else `reasons` say why nothing can go yet."""

    export: str
    folder: str
    files: tuple[Item, ...]
    bytes: int
    approved: bool
    reasons: tuple[str, ...] = ()


class Sent(msgspec.Struct, frozen=True):
    """A file as it is there. path: in the bucket. xet: the hub's hash. now: whether this push sent it, or it had been
    there."""

    path: str
    bytes: int
    sha256: str
    xet: str
    now: bool


class Receipt(msgspec.Struct, frozen=True):
    """A push that came to its end, with every file compared. bucket: owner/name. url: the bucket's page. folder: in it.
    made: whether this push made the bucket. bytes: of all files; sent: of those that this push sent. repository,
    commit: of the model repository, "" for none, and where all was there. others: paths in the folder that are not of
    this push. audit_lines, audit_sha256: the audit log's head just before the push's own line."""

    id: str
    time: str
    who: str
    role: str
    export: str
    approval: str
    bucket: str
    url: str
    folder: str
    made: bool
    files: tuple[Sent, ...]
    bytes: int
    sent: int
    seconds: float
    repository: str = ""
    repository_url: str = ""
    commit: str = ""
    others: tuple[str, ...] = ()
    audit_lines: int = 0
    audit_sha256: str = ""


@dataclass(frozen=True, slots=True)
class _Source:
    """A file here. sha256: as approved, or of what was just written."""

    item: Item
    file: Path
    sha256: str


# ----------------------------------------------------------------------------------------------------------- the plan


def plan(home: Home, export_id: str) -> Plan:
    """What a push would send now. Reads small files alone and asks nobody. Raises NotFound for what is no export,
    DataError where its manifest is damaged."""
    run = _export(home, export_id)
    standing = approval.standing(home, export_id)
    reasons = list(standing.reasons)
    if standing.approval is not None:
        sources = _approved(home, run, standing.approval)
        papers = _papers(home, run, standing.approval)
    else:
        sources = _offered(home, run)
        papers = _papers(home, run, None)
    items = [source.item for source in sources]
    items += [Item(name, "paper", len(content)) for name, content in papers.items()]
    # Hashes have one length, so the manifest's size is known before they are.
    listed = [_Listed(item.path, item.bytes, _NO_HASH, _NO_HASH) for item in items]
    written = _manifest(export_id, standing.approval.id if standing.approval else "", listed)
    items.append(Item(MANIFEST, "manifest", len(written)))
    approved = standing.approval is not None and standing.valid
    return Plan(export_id, export_id, tuple(items), sum(item.bytes for item in items), approved, tuple(reasons))


def _export(home: Home, export_id: str) -> Run:
    run = runs.load(home, export_id)
    if run.record.kind != "export":
        raise NotFound(f"Run {export_id} is not an export.")
    return run


def _approved(home: Home, run: Run, given: Approval) -> list[_Source]:
    """The files that an approval covers. Raises ApprovalError for a name that is none."""
    found = []
    named = {entry.file: entry for entry in manifests.read(run).files}
    for file in given.files:
        entry = named.get(file.file)
        if entry is None or entry.sha256 != file.sha256 or not _PLAIN.fullmatch(file.file):
            raise ApprovalError(f"{file.file!r} is not a file that the export's manifest names. Approve again.")
        item = Item(f"gguf/{file.file}", "gguf", file.bytes, file.quant)
        found.append(_Source(item, run.out / "gguf" / file.file, file.sha256))
    for number, adapter in enumerate(given.adapters, start=1):
        of = runs.load(home, adapter.run)
        for file in adapter.files:
            if file.file not in adapters.FILES:
                raise ApprovalError(f"{file.file!r} is not a file of an adapter. Approve again.")
            item = Item(f"adapters/{number}-{of.record.kind}/{file.file}", "adapter", file.bytes)
            found.append(_Source(item, of.out / "adapter" / file.file, file.sha256))
    return found


def _offered(home: Home, run: Run) -> list[_Source]:
    """What an approval would cover, as far as can be told now."""
    found = [
        _Source(Item(f"gguf/{file.file}", "gguf", file.bytes, file.quant), run.out / "gguf" / file.file, file.sha256)
        for file in approval.offer(home, run.id).files
    ]
    trained = [each for each in modelcard.line(home, run) if _is_whole(each.out / "adapter")]
    for number, of in enumerate(trained, start=1):
        for name in adapters.FILES:
            file = of.out / "adapter" / name
            item = Item(f"adapters/{number}-{of.record.kind}/{name}", "adapter", file.stat().st_size)
            found.append(_Source(item, file, ""))
    return found


def _is_whole(adapter: Path) -> bool:
    return all((adapter / name).is_file() and not (adapter / name).is_symlink() for name in adapters.FILES)


def _papers(home: Home, run: Run, given: Approval | None) -> dict[str, bytes]:
    manifest = manifests.read(run)
    chosen = {file.file for file in (given.files if given else approval.offer(home, run.id).files)}
    facts = modelcard.gather(home, run, [entry for entry in manifest.files if entry.file in chosen])
    return modelcard.documents(facts, given)


@dataclass(frozen=True, slots=True)
class _Listed:
    path: str
    bytes: int
    sha256: str
    xet: str


def _manifest(export_id: str, approval_id: str, listed: Sequence[_Listed]) -> bytes:
    """The same files and approval give the same bytes."""
    files = [{"path": one.path, "bytes": one.bytes, "sha256": one.sha256, "xet": one.xet} for one in listed]
    whole = {"export": export_id, "approval": approval_id, "files": files}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


# ----------------------------------------------------------------------------------------------------------- the push


def push(
    home: Home,
    export_id: str,
    target: str,
    *,
    who: str,
    role: str,
    also_repo: str | None = None,
    progress: Progress,
) -> Receipt:
    """Sends an approved export to the bucket `target` (owner/name, or a name of the token's account), and to the model
    repository `also_repo` where one is given; both are made private where they are not there, and refused where they
    are public. Begun again after any end, it sends what is missing or differs, and nothing else.

    Only for a process that was given HF_TOKEN. One push at a time in a home. Phases name what is done or the file that
    is sent; steps are MB of all that is sent.

    Raises ApprovalError before anything is asked of the hub, and again before the manifest goes; PublishError, Busy,
    NotFound, DataError, DiskError, Stopped.
    """
    held = bind(home, "push")
    if held is None:
        raise Busy("Another push is under way. Wait for its end, or stop it.")
    # Which pieces of a file have arrived, the hub's native library writes down here: kept on the volume, a push goes
    # on in the middle of a file even after the machine went away.
    os.environ.setdefault("HF_XET_CACHE", str(home.cache / "xet"))
    with held:
        return _Push(home, export_id, who, role, progress).run(target, also_repo)


class _Push:
    def __init__(self, home: Home, export_id: str, who: str, role: str, progress: Progress):
        self._home, self._export, self._who, self._role = home, _export(home, export_id), who, role
        self._progress = progress
        self._began = time.monotonic()
        self._done = self._total = 0
        # Path in the bucket → the hub's hash of the file here.
        self._hashes: dict[str, str] = {}

    def run(self, target: str, also_repo: str | None) -> Receipt:
        given = self._given = approval.require(self._home, self._export.id, self._progress)
        sources = _approved(self._home, self._export, given)
        for source in sources:
            _check_plain(self._home, source.file)
        for old in _pushes(self._home, self._export.id).glob(".draft-*"):
            # What a push left behind that was killed: there is no other one now.
            shutil.rmtree(old, ignore_errors=True)
        place(target)
        if also_repo:
            place(also_repo)
        self._phase("ask the hub")
        token = secret(TOKEN)
        if token is None:
            raise PublishError(
                f"There is no {TOKEN} in the environment. Make a token that may write, on the hub's page of tokens, "
                f"set {TOKEN} to it and start the panel anew."
            )
        hub = Hub(token)
        account = hub.account()
        bucket = Bucket(hub, place(target, account))
        repository = Repository(hub, place(also_repo, account)) if also_repo else None
        audit.append(
            self._home, BEGUN, who=self._who, role=self._role, export=self._export.id, approval=given.id,
            bucket=bucket.name, repository=repository.name if repository else "",
        )  # fmt: skip
        made = bucket.open()
        self._say(f"{bucket.what} {'was made' if made else 'is there'}, and is private.")
        if repository:
            made_too = repository.open()
            self._say(f"{repository.what} {'was made' if made_too else 'is there'}, and is private.")
        with self._written(_papers(self._home, self._export, given)) as papers:
            everything = [*sources, *papers]
            sent = self._to_bucket(bucket, everything)
            again = self._require_again(given)
            bucket.check_private()
            files = self._seal(bucket, everything, again.id, sent)
            commit = ""
            if repository:
                try:
                    commit = self._to_repository(repository, everything, files, given)
                except BaseException:
                    # A stop too (SystemExit): the bucket has everything all the same, and that should not go unsaid.
                    self._receipt(given, bucket, made, files, None, "")
                    raise
        return self._receipt(given, bucket, made, files, repository, commit)

    # -------------------------------------------------------------------------------------------------- to the bucket

    def _to_bucket(self, bucket: Bucket, everything: Sequence[_Source]) -> dict[str, bool]:
        """Sends what is missing or differs: path there → whether it was sent."""
        self._phase("compare with what is there")
        paths = [self._path(source) for source in everything]
        manifest = f"{self._export.id}/{MANIFEST}"
        there = bucket.there([*paths, manifest])
        same = set()
        for source, path in zip(everything, paths, strict=True):
            # A file of another size is another file, and needs no reading to know.
            if path in there and there[path].bytes == source.item.bytes:
                self._heed()
                self._hashes[path] = xet_of(source.file)
                if there[path].xet == self._hashes[path]:
                    same.add(path)
        missing = [source for source, path in zip(everything, paths, strict=True) if path not in same]
        if missing and manifest in there:
            # From an earlier push: it would name files that are about to be others.
            bucket.remove([manifest])
        self._total = sum(source.item.bytes for source in missing)
        self._done = 0
        large = [source for source in missing if _is_large(source)]
        for number, source in enumerate(large, start=1):
            bucket.check_private()
            self._send(bucket, [source], f"send {source.item.path} ({number} of {len(large)})")
        if small := [source for source in missing if not _is_large(source)]:
            bucket.check_private()
            self._send(bucket, small, "send the small files")
        return {path: path not in same for path in paths}

    def _send(self, bucket: Bucket, sources: Sequence[_Source], phase: str) -> None:
        self._phase(phase)
        self._tell(0)
        began, size = time.monotonic(), sum(source.item.bytes for source in sources)
        sending = [Sending(self._path(each), each.file, each.item.bytes, each.sha256) for each in sources]
        self._check_standing()
        self._hashes |= bucket.put(sending, self._tell, self._check_standing)
        self._done += size
        self._tell(0)
        names = ", ".join(source.item.path for source in sources)
        self._say(f"{names}: {size:,} bytes in {time.monotonic() - began:.1f} s")

    def _path(self, source: _Source) -> str:
        return f"{self._export.id}/{source.item.path}"

    def _check_standing(self) -> None:
        """Raises ApprovalError where the approval was withdrawn or given anew. Reads no file: that is require's."""
        now = approval.standing(self._home, self._export.id).approval
        if now is None:
            raise ApprovalError(f"The approval was withdrawn while it was pushed. {LEFT}")
        if now.id != self._given.id:
            raise ApprovalError("The export was approved anew while it was pushed. Push again: it goes by that one.")

    def _require_again(self, given: Approval) -> Approval:
        again = approval.require(self._home, self._export.id, self._progress)
        if again.id != given.id:
            raise ApprovalError("The export was approved anew while it was pushed. Push again: it goes by that one.")
        return again

    def _seal(
        self, bucket: Bucket, everything: Sequence[_Source], approval_id: str, sent: Mapping[str, bool]
    ) -> list[Sent]:
        """Compares everything with what is there, sends the manifest, and compares that."""
        self._phase("compare what arrived")
        found = self._compared(bucket, everything)
        listed = [
            _Listed(source.item.path, source.item.bytes, source.sha256, xet)
            for source, xet in zip(everything, found, strict=True)
        ]
        written = {MANIFEST: _manifest(self._export.id, approval_id, listed)}
        with self._written(written) as papers:
            (last,) = papers
            path = self._path(last)
            there = bucket.there([path]).get(path)
            self._hashes[path] = xet_of(last.file)
            is_there = there is not None and there.xet == self._hashes[path]
            if not is_there:
                self._total, self._done = last.item.bytes, 0
                self._send(bucket, papers, "send the manifest")
            self._compared(bucket, papers)
        files = [
            Sent(f"{self._export.id}/{one.path}", one.bytes, one.sha256, one.xet, sent[f"{self._export.id}/{one.path}"])
            for one in listed
        ]
        return [*files, Sent(path, last.item.bytes, last.sha256, self._hashes[path], not is_there)]

    def _compared(self, bucket: Bucket, sources: Sequence[_Source]) -> list[str]:
        """The hub's hash of each file there, which is that of the file here. Raises PublishError."""
        paths = [self._path(source) for source in sources]
        there = bucket.there(paths)
        # What is not there, the hub leaves out without a word.
        wrong = [f"{path} is not there." for path in paths if path not in there]
        for source, path in zip(sources, paths, strict=True):
            if path in there and (there[path].bytes, there[path].xet) != (source.item.bytes, self._hashes[path]):
                wrong.append(f"{path} is another file there: {there[path].bytes:,} bytes, {there[path].xet[:12]}….")
        if wrong:
            raise PublishError("\n".join([f"Not everything arrived in {bucket.what}. Push again.", *wrong]))
        return [there[path].xet for path in paths]

    # ----------------------------------------------------------------------------------------------- to a repository

    def _to_repository(
        self, repository: Repository, everything: Sequence[_Source], files: Sequence[Sent], given: Approval
    ) -> str:
        """All in one commit, the manifest in it. Returns the commit, "" where all of it was there."""
        self._phase(f"compare with {repository.what}")
        listed = [
            _Listed(source.item.path, source.item.bytes, source.sha256, file.xet)
            for source, file in zip(everything, files[:-1], strict=True)
        ]
        written = {MANIFEST: _manifest(self._export.id, given.id, listed)}
        with self._written(written) as papers:
            # At its root, where the hub looks for the card.
            all_of_it = [
                Sending(source.item.path, source.file, source.item.bytes, source.sha256)
                for source in (*everything, *papers)
            ]
            large = {source.item.path for source in everything if _is_large(source)}
            missing = repository.differing(all_of_it)
            if not missing:
                return ""
            sending = [file for file in missing if file.path in large]
            self._total, self._done = sum(file.bytes for file in sending), 0
            for number, file in enumerate(sending, start=1):
                self._check_standing()
                repository.check_private()
                self._phase(f"send {file.path} to {repository.what} ({number} of {len(sending)})")
                self._tell(0)
                repository.put(file, self._tell)
                self._done += file.bytes
            self._require_again(given)
            repository.check_private()
            self._phase(f"commit to {repository.what}")
            small = [file for file in missing if file.path not in large]
            commit = repository.commit(sending, small, f"Export {self._export.id}")
            if wrong := repository.differing(all_of_it):
                names = ", ".join(file.path for file in wrong)
                raise PublishError(f"Not everything arrived in {repository.what}: {names}. Push again.")
            return commit

    # -------------------------------------------------------------------------------------------------------- the rest

    def _receipt(
        self,
        given: Approval,
        bucket: Bucket,
        made: bool,
        files: Sequence[Sent],
        repository: Repository | None,
        commit: str,
    ) -> Receipt:
        self._progress.phase("write the receipt")
        ours = {file.path for file in files}
        others = [path for path in bucket.below(self._export.id) if path not in ours]
        if others:
            self._say(f"Also there, and not of this push: {', '.join(others)}")
        lines, last = audit.head(self._home)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        receipt = Receipt(
            id=f"{stamp}-{secrets.token_hex(3)}",
            time=runs.now(),
            who=self._who,
            role=self._role,
            export=self._export.id,
            approval=given.id,
            bucket=bucket.name,
            url=bucket.url,
            folder=self._export.id,
            made=made,
            files=tuple(files),
            bytes=sum(file.bytes for file in files),
            sent=sum(file.bytes for file in files if file.now),
            seconds=round(time.monotonic() - self._began, 3),
            repository=repository.name if repository else "",
            repository_url=repository.url if repository else "",
            commit=commit,
            others=tuple(others),
            audit_lines=lines,
            audit_sha256=last,
        )
        folder = _pushes(self._home, self._export.id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            runs.write_json(folder / f"{receipt.id}.json", audit.without_secrets(msgspec.to_builtins(receipt)))
        except OSError as error:
            raise DiskError(
                f"Everything arrived in {bucket.what}, but the receipt cannot be written to {folder} "
                f"({error.strerror}). Make room, then push again: nothing is sent twice."
            ) from error
        audit.append(
            self._home, PUSHED, who=self._who, role=self._role, export=self._export.id, approval=given.id,
            bucket=bucket.name, repository=receipt.repository, commit=commit, receipt=receipt.id,
            files=len(files), bytes=receipt.bytes, sent=receipt.sent, manifest=files[-1].sha256,
        )  # fmt: skip
        return receipt

    @contextmanager
    def _written(self, contents: Mapping[str, bytes]) -> Iterator[list[_Source]]:
        """The contents as files, for as long as they are needed."""
        folder = _pushes(self._home, self._export.id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
            for name, content in contents.items():
                (draft / name).write_bytes(content)
        except OSError as error:
            raise DiskError(f"{folder} cannot be written ({error.strerror}). Make room, then push again.") from error
        try:
            yield [
                _Source(
                    Item(name, "manifest" if name == MANIFEST else "paper", len(content)),
                    draft / name,
                    hashlib.sha256(content).hexdigest(),
                )
                for name, content in contents.items()
            ]
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _phase(self, name: str) -> None:
        self._progress.phase(name)
        self._heed()

    def _tell(self, done: int) -> None:
        self._progress.step((self._done + done) // 10**6, self._total // 10**6)
        self._heed()

    def _heed(self) -> None:
        if self._progress.stop_requested():
            raise Stopped

    def _say(self, text: str) -> None:
        self._progress.say(text)


def _is_large(source: _Source) -> bool:
    return source.file.suffix in (".gguf", ".safetensors")


def _check_plain(home: Home, file: Path) -> None:
    """Raises ApprovalError for what is not a plain file in its own place: a link may lead anywhere."""
    try:
        own = home.runs.resolve() / file.relative_to(home.runs)
        if stat.S_ISREG(file.lstat().st_mode) and file.resolve(strict=True) == own:
            return
    except (OSError, ValueError):
        pass
    raise ApprovalError(f"{file} is no plain file in its own folder (a link, perhaps). Put the file itself there.")


def _pushes(home: Home, export_id: str) -> Path:
    return home.root / "reviews" / export_id / "pushes"


# -------------------------------------------------------------------------------------------------------- the receipts


def receipts(home: Home, export_id: str) -> list[Receipt]:
    """Newest first; [] where nothing was pushed. One that cannot be read is left out. Raises NotFound for what is no
    export."""
    _export(home, export_id)
    found = []
    for path in _pushes(home, export_id).glob("[!.]*.json"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Receipt))
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return sorted(found, key=lambda receipt: (receipt.time, receipt.id), reverse=True)
