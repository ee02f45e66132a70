"""The approval of an export: who said that which exact files may leave, and what had been seen of them by then. Owns
approval.json and the right to give one; the push asks `require`, the log of it all is audit's.

    KATHERINE_HOME/reviews/rights.json                whether reviewers may approve
    KATHERINE_HOME/reviews/<export>/approval.json     the one that stands; the audit log has every one
    KATHERINE_HOME/reviews/<export>/hashed.json       what each file had when it was last read whole

An approval counts only while the audit log's last word on the export is that very approval, so that none can be slipped
in beside the log.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from katherine import adapters, audit, manifests, reviews, runs
from katherine import export as exports
from katherine.audit import Entry
from katherine.errors import ApprovalError, DataError, DiskError, NotFound
from katherine.history import History
from katherine.manifests import Manifest
from katherine.progress import Progress, Quiet, Stopped
from katherine.reviews import Recommendation
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.turns import turn

OPERATOR, REVIEWER = "operator", "reviewer"
# Events of the audit log.
APPROVED, WITHDRAWN, REFUSED, RIGHTS = "approved", "withdrawn", "refused", "rights"
# Larger pieces are no faster to hash, and a stop is heard between two.
_PIECE = 4 * 2**20


class File(msgspec.Struct, frozen=True):
    """quant: as the manifest has it, "" for a file that is no GGUF."""

    file: str
    quant: str
    bytes: int
    sha256: str


class Adapter(msgspec.Struct, frozen=True):
    """The adapter of a training run, as it lies in the run's folder."""

    run: str
    kind: str
    files: tuple[File, ...]


class Count(msgspec.Struct, frozen=True):
    """Probes that one column was asked, and how many it passed."""

    column: str
    asked: int
    passed: int


class Probed(msgspec.Struct, frozen=True):
    """A probe run that was there to be seen. set: the name of its probe set."""

    run: str
    set: str
    counts: tuple[Count, ...]


class Verdicts(msgspec.Struct, frozen=True):
    """fingerprint: as reviews has it. by: reviewer → verdicts."""

    count: int
    fingerprint: str
    by: dict[str, int]


class Evidence(msgspec.Struct, frozen=True):
    """What there was to be seen of an export at a moment."""

    probes: tuple[Probed, ...]
    verdicts: Verdicts
    recommendations: tuple[Recommendation, ...]


class Approval(msgspec.Struct, frozen=True):
    """time: when it was asked for; what came later was not seen. files: the GGUFs it covers. checks: quant → names of
    the acceptance checks it passed. adapters: in the order in which they were trained, all that lie behind the
    export."""

    id: str
    time: str
    who: str
    role: str
    export: str
    base: str
    files: tuple[File, ...]
    adapters: tuple[Adapter, ...]
    manifest_sha256: str
    adapter_sha256: str
    template_sha256: str
    checks: dict[str, tuple[str, ...]]
    probes: tuple[Probed, ...]
    verdicts: Verdicts
    recommendations: tuple[Recommendation, ...]
    note: str = ""

    @property
    def bytes(self) -> int:
        """Of the GGUFs together."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Standing:
    """How an export's approval stands. reasons: why it is not valid, a sentence each. unsure: no more is known than
    that files were touched; reading them whole (`require`) settles it. later: what came after it, which does not void
    it. since: the audit log's last word on the export."""

    approval: Approval | None
    valid: bool
    reasons: tuple[str, ...] = ()
    unsure: bool = False
    later: tuple[str, ...] = ()
    since: Entry | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be approved now, as far as can be told without reading the files. reasons: why nothing can."""

    files: tuple[File, ...]
    reasons: tuple[str, ...]


# ----------------------------------------------------------------------------------------------------------- rights


def reviewers_may_approve(home: Home) -> bool:
    """Whether an operator allowed it. A file that cannot be read allows nothing."""
    try:
        return json.loads(_rights(home).read_bytes())["reviewers_may_approve"] is True
    except (OSError, ValueError, TypeError, KeyError):
        return False


def let_reviewers_approve(home: Home, allowed: bool, *, who: str, role: str = OPERATOR) -> None:
    """Raises ApprovalError for anybody but an operator."""
    if role != OPERATOR:
        _refuse(home, who, role, "Only an operator may say who approves.")
    with _turn(home, "rights"):
        before = reviewers_may_approve(home)
        if before == allowed:
            return
        audit.append(home, RIGHTS, who=_name(who), role=role, reviewers_may_approve=allowed, before=before)
        _write(_rights(home), {"reviewers_may_approve": allowed})


def may_approve(home: Home, role: str) -> bool:
    return role == OPERATOR or (role == REVIEWER and reviewers_may_approve(home))


def check_right(home: Home, who: str, role: str, export_id: str) -> None:
    """Raises ApprovalError for who may not approve or withdraw, and puts it into the log."""
    if not may_approve(home, role):
        _refuse(
            home, who, role, f"A {role} may not approve or withdraw. An operator can allow it to reviewers.", export_id
        )


def _refuse(home: Home, who: str, role: str, why: str, export_id: str = "") -> None:
    audit.append(home, REFUSED, who=who[: reviews.LONGEST_NAME], role=str(role)[:20], export=export_id[:80], why=why)
    raise ApprovalError(why)


# -------------------------------------------------------------------------------------------------- giving and taking


def approve(
    home: Home,
    export_id: str,
    *,
    who: str,
    role: str,
    note: str = "",
    files: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Approval:
    """Approves the accepted files of an export, or those of them named in `files` (by file name or quant), after
    reading every one whole. An earlier approval is replaced.

    Takes minutes for 20 GB: phases "read <file>", steps in MB of all. Raises ApprovalError for who may not, for files
    that are not the accepted ones, and where somebody else approved or withdrew meanwhile; NotFound, DataError,
    DiskError, Stopped.
    """
    role = str(role)
    check_right(home, who, role, export_id)
    who, note, asked = _name(who), _note(note), runs.now()
    run = _export(home, export_id)
    before = last_word(home, export_id)
    seen = evidence(home, export_id)
    content, manifest = _manifest(run)
    entries = _chosen(manifest, files)
    expected = [(_gguf(run, each.file), each.file, each.bytes, each.sha256) for each in entries]
    behind = list(_adapters(home, run))
    if not behind:
        raise ApprovalError(f"The adapter that export {export_id} was made from is gone. Train and export again.")
    wanted = [path for path, *_ in expected] + [path for _, folder in behind for path in folder]
    if strays := _strays(run, manifest):
        raise ApprovalError("\n".join(strays))
    marks = _read_whole(wanted, progress or Quiet())
    wrong = [_differs(name, marks[path], size, sha256) for path, name, size, sha256 in expected]
    wrong += [_differs(path.name, None, 0, "") for path in wanted if marks[path] is None]
    own = marks[behind[-1][1][0]]
    if own is not None and own.sha256 != manifest.adapter_sha256:
        wrong.append(f"The adapter of {behind[-1][0].id} is not the one that this export was made from. Export again.")
    if reasons := list(dict.fromkeys(filter(None, wrong))):
        raise ApprovalError("\n".join(reasons))
    approval = Approval(
        id=secrets.token_hex(8),
        time=asked,
        who=who,
        role=role,
        export=export_id,
        base=manifest.base,
        files=tuple(File(each.file, each.quant, each.bytes, each.sha256) for each in entries),
        adapters=tuple(
            Adapter(of.id, of.record.kind, tuple(_file(path, marks[path]) for path in folder)) for of, folder in behind
        ),
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        adapter_sha256=manifest.adapter_sha256,
        template_sha256=manifest.template_sha256,
        checks={each.quant: tuple(check.name for check in each.checks if check.passed) for each in entries},
        probes=seen.probes,
        verdicts=seen.verdicts,
        recommendations=seen.recommendations,
        note=note,
    )
    facts = audit.without_secrets(msgspec.to_builtins(approval))
    with _turn(home, export_id):
        # Again, since minutes may have passed.
        check_right(home, who, role, export_id)
        _check_unchanged(home, export_id, before)
        touched = any(not mark.is_like(_mark(path)) for path, mark in marks.items() if mark)
        if touched or _bytes(run.out / "gguf" / exports.MANIFEST) != content:
            raise ApprovalError("Files of the export changed while they were read. Look at it again, then approve.")
        # In this order: there is never an approval that the log does not know.
        replaced = before.facts["approval"].get("id", "") if before and before.event == APPROVED else ""
        audit.append(home, APPROVED, who=who, role=role, export=export_id, approval=facts, replaces=replaced)
        _keep_marks(home, export_id, marks)
        _write(stored(home, export_id), facts)
    return msgspec.convert(facts, Approval)


def withdraw(home: Home, export_id: str, *, who: str, role: str, note: str = "") -> None:
    """Takes the approval back. Raises ApprovalError for who may not, or where there is none."""
    role = str(role)
    check_right(home, who, role, export_id)
    who, note = _name(who), _note(note)
    with _turn(home, export_id):
        word = last_word(home, export_id)
        if word is None or word.event != APPROVED:
            raise ApprovalError(f"Export {export_id} is not approved: there is nothing to withdraw.")
        given = word.facts["approval"]
        taken = {name: given.get(name) for name in ("id", "time", "who", "files")}
        audit.append(home, WITHDRAWN, who=who, role=role, export=export_id, approval=taken, note=note)
        stored(home, export_id).unlink(missing_ok=True)


def _check_unchanged(home: Home, export_id: str, before: Entry | None) -> None:
    now = last_word(home, export_id)
    if now is not None and now != before:
        raise ApprovalError(
            f"While the files were read, {now.who} said something else ({now.event}). Look at it again, then approve."
        )


def last_word(home: Home, export_id: str) -> Entry | None:
    """The audit log's last line by which the export was approved or withdrawn. Raises DataError where the log cannot be
    read."""
    for entry in reversed(audit.read(home)):
        if (
            entry.event in (APPROVED, WITHDRAWN)
            and not entry.torn
            and entry.facts.get("export") == export_id
            and isinstance(entry.facts.get("approval"), dict)
        ):
            return entry
    return None


# ----------------------------------------------------------------------------------------------------------- asking


def require(home: Home, export_id: str, progress: Progress | None = None) -> Approval:
    """The approval, after every file that it covers, the adapters and the manifest were read whole and are what was
    approved. Raises ApprovalError with every reason, NotFound, DataError, Stopped."""
    run = _export(home, export_id)
    approval, reasons, _ = _given(home, export_id)
    if approval is None:
        raise ApprovalError("\n".join(reasons))
    files = list(_covered(home, run, approval))
    marks = _read_whole([path for path, *_ in files], progress or Quiet())
    _keep_marks(home, export_id, marks)
    wrong = list(reasons) + _of_manifest(run, approval)
    wrong += [_differs(name, marks[path], file.bytes, file.sha256) for path, name, file in files]
    # Whoever withdraws while we read has the last word.
    if _given(home, export_id)[0] != approval:
        wrong.append("The approval was withdrawn or given anew while the files were read.")
    if found := [reason for reason in wrong if reason]:
        raise ApprovalError("\n".join(found))
    return approval


def standing(home: Home, export_id: str) -> Standing:
    """How the approval stands, told from sizes and times alone. Never reads a large file. Raises NotFound for what is
    no export, DataError where the audit log cannot be read."""
    run = runs.load(home, export_id)
    approval, reasons, since = _given(home, export_id)
    if approval is None:
        return Standing(None, False, reasons, since=since)
    certain = list(reasons) + _of_manifest(run, approval)
    doubts = []
    known = _kept_marks(home, export_id)
    for path, name, file in _covered(home, run, approval):
        now, then = _mark(path), known.get(_relative(home, path))
        if now is None or now.size != file.bytes:
            certain.append(_differs(name, now, file.bytes, file.sha256))
        elif then is None or not now.is_like(then):
            doubts.append(
                f"{name} was touched or put there anew since it was last read; its size is the same. Check the files."
            )
        else:
            certain.append(_differs(name, then, file.bytes, file.sha256))
    wrong = tuple(filter(None, certain))
    later = _later(home, approval)
    return Standing(
        approval, not wrong and not doubts, wrong or tuple(doubts), not wrong and bool(doubts), later, since
    )


def offer(home: Home, export_id: str) -> Offer:
    """Raises NotFound for what is no export."""
    run = runs.load(home, export_id)
    try:
        _export(home, export_id)
        _, manifest = _manifest(run)
        entries = _chosen(manifest, None)
    except (ApprovalError, NotFound, DataError) as error:
        return Offer((), tuple(str(error).split("\n")))
    reasons = _strays(run, manifest)
    reasons += [
        f"{each.file} is gone, or not as long as it was." for each in entries if not manifests.is_there(run, each)
    ]
    if not list(_adapters(home, run)):
        reasons.append(f"The adapter that export {export_id} was made from is gone. Train and export again.")
    return Offer(tuple(File(each.file, each.quant, each.bytes, each.sha256) for each in entries), tuple(reasons))


def evidence(home: Home, export_id: str, history: History | None = None) -> Evidence:
    """Probe runs on the export that succeeded, oldest first, and what people said of it. history: the home's, where
    there is one at hand."""
    known = history or History(home)
    probed = [
        Probed(
            seen.id,
            str(seen.run.record.recipe.get("probes", "")),
            tuple(Count(*each) for each in known.outcome(seen).probes),
        )
        for seen in known.children(export_id)
        if (seen.kind, seen.status.state) == ("probe", State.succeeded)
    ]
    given = reviews.verdicts(home, export_id)
    by: dict[str, int] = {}
    for verdict in given:
        by[verdict.reviewer] = by.get(verdict.reviewer, 0) + 1
    verdicts = Verdicts(len(given), reviews.fingerprint(home, export_id), by)
    return Evidence(tuple(probed), verdicts, tuple(reviews.recommendations(home, export_id)))


def _later(home: Home, approval: Approval) -> tuple[str, ...]:
    """What people said after the approval was asked for."""
    if reviews.fingerprint(home, approval.export) == approval.verdicts.fingerprint:
        return ()
    verdicts = sum(each.time > approval.time for each in reviews.verdicts(home, approval.export))
    words = [each for each in reviews.recommendations(home, approval.export) if each.time > approval.time]
    against = sum(not each.good for each in words)
    said = []
    if verdicts:
        said.append(f"{verdicts} {'verdict' if verdicts == 1 else 'verdicts'} came after the approval.")
    if words:
        each = "recommendation" if len(words) == 1 else "recommendations"
        said.append(
            f"{len(words)} {each} came after the approval" + (f", {against} of them against it." if against else ".")
        )
    return tuple(said) or ("Something that people said was changed or taken back after the approval.",)


def _given(home: Home, export_id: str) -> tuple[Approval | None, tuple[str, ...], Entry | None]:
    """The approval that the log and approval.json agree on, else why there is none; and the log's last word."""
    word = last_word(home, export_id)
    if word is None:
        return None, ("Nobody has approved this export.",), None
    if word.event == WITHDRAWN:
        return None, ("The approval was withdrawn.",), word
    path = stored(home, export_id)
    try:
        facts: Any = json.loads(path.read_bytes())
        if facts != word.facts["approval"]:
            return None, (f"{path} is not the approval that the audit log has. Approve again.",), word
        approval = msgspec.convert(facts, Approval)
    except FileNotFoundError:
        return None, (f"{path} is gone. Approve again.",), word
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        return None, (f"{path} cannot be read ({error}). Approve again.",), word
    if approval.export != export_id or not approval.files:
        return None, (f"{path} is the approval of something else. Approve again.",), word
    return approval, (), word


# ------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class _Mark:
    """A file as it was when looked at; sha256 where it was read whole."""

    size: int
    changed: int
    inode: int
    sha256: str = ""

    def is_like(self, other: "_Mark | None") -> bool:
        return other is not None and astuple(self)[:3] == astuple(other)[:3]


def _mark(path: Path) -> _Mark | None:
    """None for what is no plain file: a link may lead anywhere, and elsewhere tomorrow."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return _Mark(found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _read_whole(paths: Sequence[Path], progress: Progress) -> dict[Path, _Mark | None]:
    """Each with its sha256, read anew from end to end; None for what is not there. Raises ApprovalError for a file that
    changes meanwhile, DataError for one that cannot be read."""
    megabytes = sum(mark.size for path in paths if (mark := _mark(path))) // 10**6
    done = 0
    found: dict[Path, _Mark | None] = {}
    for path in paths:
        progress.phase(f"read {path.name}")
        progress.step(done // 10**6, megabytes)
        found[path] = None
        if _mark(path) is None:
            continue
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                before, digest = os.fstat(file.fileno()), hashlib.sha256()
                for piece in iter(partial(file.read, _PIECE), b""):
                    if progress.stop_requested():
                        raise Stopped
                    digest.update(piece)
                    done += len(piece)
                    progress.step(done // 10**6, megabytes)
                after = os.fstat(file.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ApprovalError(f"{path.name} changed while it was read. Look after what writes to it, then try again.")
        found[path] = _Mark(after.st_size, after.st_mtime_ns, after.st_ino, digest.hexdigest())
    return found


def _differs(name: str, now: _Mark | None, size: int, sha256: str) -> str:
    """ "" where it is the file of that size and sha256."""
    if now is None:
        return f"{name} is gone, or no plain file any more."
    if now.size != size:
        return f"{name} has {now.size:,} bytes now, and {size:,} before: it is another file."
    if now.sha256 and now.sha256 != sha256:
        return f"{name} was changed: its sha256 is {now.sha256[:12]}… now, and was {sha256[:12]}…."
    return ""


def _of_manifest(run: Run, approval: Approval) -> list[str]:
    """What is wrong with the manifest and what lies beside it."""
    path = run.out / "gguf" / exports.MANIFEST
    content = _bytes(path)
    if content is None:
        return [f"{exports.MANIFEST} is gone."]
    if hashlib.sha256(content).hexdigest() != approval.manifest_sha256:
        return [f"{exports.MANIFEST} was changed: it is not the one that was approved."]
    return _strays(run, manifests.parse(path, content))


def _strays(run: Run, manifest: Manifest) -> list[str]:
    """GGUFs in the export's folder that its manifest does not name."""
    named = {entry.file for entry in manifest.files}
    return [
        f"{path.name} was added: the manifest does not name it. Remove it, or move it elsewhere."
        for path in sorted((run.out / "gguf").glob("*.gguf"))
        if path.name not in named
    ]


def _covered(home: Home, run: Run, approval: Approval) -> Iterator[tuple[Path, str, File]]:
    """Every file that the approval covers: where it lies, what to call it."""
    for file in approval.files:
        yield _gguf(run, file.file), file.file, file
    for adapter in approval.adapters:
        folder = home.runs / Path(adapter.run).name / "out" / "adapter"
        for file in adapter.files:
            yield folder / Path(file.file).name, f"{file.file} of {adapter.run}", file


def _adapters(home: Home, run: Run) -> Iterator[tuple[Run, tuple[Path, ...]]]:
    """The trainings behind an export whose adapters are there, in order, each with its files. Nothing at all where the
    one that the export was made from is not."""
    found = []
    try:
        while run.record.parent is not None:
            run = runs.load(home, run.record.parent)
            files = tuple(run.out / "adapter" / name for name in adapters.FILES)
            if all(_mark(path) for path in files):
                found.append((run, files))
            elif not found:
                return
    except (NotFound, DataError):
        pass
    yield from reversed(found)


def _file(path: Path, mark: _Mark | None) -> File:
    assert mark is not None
    return File(path.name, "", mark.size, mark.sha256)


def _gguf(run: Run, name: str) -> Path:
    return run.out / "gguf" / Path(name).name


def _manifest(run: Run) -> tuple[bytes, Manifest]:
    path = run.out / "gguf" / exports.MANIFEST
    content = _bytes(path)
    if content is None:
        raise NotFound(f"Run {run.id} has no manifest: its export has not finished.")
    return content, manifests.parse(path, content)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _chosen(manifest: Manifest, names: Sequence[str] | None) -> list[manifests.Entry]:
    """The accepted entries, or those named. Raises ApprovalError for one that was not accepted, and for none."""
    accepted = [entry for entry in manifest.files if entry.accepted and all(check.passed for check in entry.checks)]
    if names is None:
        chosen = accepted
    else:
        by_name = {name: entry for entry in accepted for name in (entry.quant, entry.file)}
        if unknown := [name for name in names if name not in by_name]:
            raise ApprovalError(f"{', '.join(unknown)} cannot be approved: the export has no such file that passed.")
        chosen = [entry for entry in accepted if {entry.quant, entry.file} & set(names)]
    if not chosen:
        raise ApprovalError("No file of this export passed every check, so none can be approved. Export again.")
    return chosen


def _export(home: Home, export_id: str) -> Run:
    run = runs.load(home, export_id)
    if run.record.kind != "export":
        raise NotFound(f"Run {export_id} is not an export.")
    if (state := run.status().state) is not State.succeeded:
        raise ApprovalError(f"Export {export_id} has not succeeded: it is {state}.")
    return run


# -------------------------------------------------------------------------------------------------------- what is kept


def stored(home: Home, export_id: str) -> Path:
    """Where an export's approval lies, if it has one. The id must be a run's."""
    return _place(home, export_id) / "approval.json"


def _place(home: Home, export_id: str) -> Path:
    return home.root / "reviews" / export_id


def _rights(home: Home) -> Path:
    return home.root / "reviews" / "rights.json"


def _turn(home: Home, what: str) -> Any:
    return turn(home, f"approval {what}", "the approval")


def _write(path: Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, value)
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror}). Make room, then try again.") from error


def _relative(home: Home, path: Path) -> str:
    return path.relative_to(home.root).as_posix()


def _keep_marks(home: Home, export_id: str, marks: dict[Path, _Mark | None]) -> None:
    rows = {
        _relative(home, path): [mark.size, mark.changed, mark.inode, mark.sha256]
        for path, mark in marks.items()
        if mark is not None
    }
    _write(_place(home, export_id) / "hashed.json", rows)


def _kept_marks(home: Home, export_id: str) -> dict[str, _Mark]:
    try:
        rows = json.loads((_place(home, export_id) / "hashed.json").read_bytes())
        return {name: _Mark(int(row[0]), int(row[1]), int(row[2]), str(row[3])) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, IndexError, AttributeError):
        return {}


def _name(text: str) -> str:
    return reviews.name(text)


def _note(text: str) -> str:
    if len(text) > reviews.LONGEST_NOTE:
        raise DataError(
            f"The note is too long: {len(text):,} characters, and at most {reviews.LONGEST_NOTE:,} are kept."
        )
    return text.strip()
