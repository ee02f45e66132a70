"""The datasets that are there: listed, looked into, compared, removed; none of it reads a whole report, which may name
a million problems. Making them is corpus's."""

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from katherine import corpus, findings, runs
from katherine.errors import Busy, DataError, DiskError, KatherineError, NotFound
from katherine.examples import Preference
from katherine.intake import digest
from katherine.lines import Problem
from katherine.settings import Home

_problem = msgspec.json.Decoder(Problem).decode
_preference = msgspec.json.Decoder(Preference).decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Summary:
    """A dataset without its problems' texts. created: ISO 8601, UTC. report: what `prepare --json` prints, with
    `problem_groups` in place of `problems`: each a dict of group, severity, count, files, and one reason."""

    path: Path
    created: str
    report: dict[str, Any]

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def fingerprint(self) -> str:
        return self.report["fingerprint"]

    @property
    def base(self) -> str | None:
        """The base whose tokenizer counted, or None where nothing was counted."""
        return (self.report["tokens"] or {}).get("base")


class _Old(msgspec.Struct):
    """A report written before there were summaries: everything that matters but its problems, which are skipped."""

    options: dict[str, Any]
    files: int
    lines: int
    sft: dict[str, Any]
    dpo: dict[str, Any]
    unrecognised: int
    tokens: dict[str, Any] | None
    fingerprint: str
    by_file: list[dict[str, Any]]


class _Problems(msgspec.Struct):
    problems: list[Problem]


def everyone(home: Home) -> list[Summary]:
    """All datasets, newest first. Folders that cannot be read are left out."""
    found = []
    for report in home.datasets.glob("[!.]*/report.json"):
        try:
            found.append(summary(home, report.parent.name))
        except KatherineError:
            continue
    return sorted(found, key=lambda one: (one.created, one.id), reverse=True)


def summary(home: Home, dataset_id: str) -> Summary:
    """Raises NotFound for an id that is not a dataset's, DataError for a folder that cannot be read."""
    path = corpus.folder(home, dataset_id)
    there = path / "summary.json"
    file = there if there.is_file() else path / "report.json"
    try:
        found = file.stat()
        return _summary(path, file, (found.st_mtime_ns, found.st_size, found.st_ino))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}). Prepare the dataset again.") from error


# A dataset does not change, so what was read once stays true; the mark is for one removed and made again.
@lru_cache(maxsize=512)
def _summary(path: Path, file: Path, mark: tuple[int, int, int]) -> Summary:
    raw = file.read_bytes()
    if file.name == "summary.json":
        report = msgspec.json.decode(raw, type=dict[str, Any])
        return Summary(path, report.pop("created"), report)
    made = datetime.fromtimestamp(mark[0] / 1e9, UTC).isoformat(timespec="seconds")
    report = msgspec.structs.asdict(msgspec.json.decode(raw, type=_Old))
    groups = [group | {"start": 0, "end": 0} for group, _ in _grouped(file, mark)]
    return Summary(path, made, report | {"histograms": None, "problem_groups": groups})


# One at a time: it may hold a million problems.
@lru_cache(maxsize=1)
def _grouped(report: Path, mark: tuple[int, int, int]) -> list[tuple[dict[str, Any], list[Problem]]]:
    """The problems of a dataset without problems.jsonl, in the order of that file."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in msgspec.json.decode(report.read_bytes(), type=_Problems).problems:
        groups.setdefault((problem.severity, findings.group(problem.reason)), []).append(problem)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    return [
        (
            {
                "group": name,
                "severity": severity,
                "count": len(members),
                "files": len({problem.file for problem in members} - {""}),
                "reason": members[0].reason,
            },
            members,
        )
        for (severity, name), members in ordered
    ]


@dataclass(frozen=True, slots=True)
class ProblemPage:
    """Some problems of one group; next: where the following page begins, or None after the last."""

    problems: list[Problem]
    next: int | None


def problems(home: Home, dataset_id: str, group: int, start: int = 0, count: int = 100) -> ProblemPage:
    """`count` problems of the group with that place in the summary's `problem_groups`, from `start`, which is 0 or a
    page's `next`. Raises NotFound for a group that is not there."""
    found = summary(home, dataset_id)
    groups = found.report["problem_groups"]
    if not 0 <= group < len(groups):
        raise NotFound(f"Dataset {dataset_id} has no problem group {group}: it has {len(groups)}.")
    path = found.path / "problems.jsonl"
    if not path.is_file():
        report = found.path / "report.json"
        stat = report.stat()
        members = _grouped(report, (stat.st_mtime_ns, stat.st_size, stat.st_ino))[group][1]
        return ProblemPage(members[start : start + count], start + count if start + count < len(members) else None)
    at, end = groups[group]["start"] + start, groups[group]["end"]
    page: list[Problem] = []
    with path.open("rb") as file:
        file.seek(at)
        while at < end and len(page) < count:
            line = file.readline()
            page.append(_problem(line))
            at += len(line)
    return ProblemPage(page, at - groups[group]["start"] if at < end else None)


def every_problem(home: Home, dataset_id: str) -> Iterator[Problem]:
    """All problems, group by group, as they are read."""
    path = corpus.folder(home, dataset_id)
    if (path / "problems.jsonl").is_file():
        with (path / "problems.jsonl").open("rb") as file:
            yield from map(_problem, file)
        return
    stat = (path / "report.json").stat()
    for _, members in _grouped(path / "report.json", (stat.st_mtime_ns, stat.st_size, stat.st_ino)):
        yield from members


def problems_csv(home: Home, dataset_id: str) -> Iterator[str]:
    """The problems as lines of CSV, with a head."""
    out = io.StringIO()
    write = csv.writer(out).writerow
    write(["severity", "file", "line", "reason", "text"])
    for problem in every_problem(home, dataset_id):
        line = "" if problem.line is None else problem.line
        write([problem.severity, inert(problem.file), line, inert(problem.reason), inert(problem.text)])
        if out.tell() > 2**16:  # in pieces of 64 KB: few writes, little memory
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    yield out.getvalue()


def inert(text: str) -> str:
    """A spreadsheet would run what begins like a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


class UncuratedPair(msgspec.Struct, frozen=True):
    """A pair without a curator's tags. id: its content hash, as `prepare` takes it. Texts are shortened."""

    id: str
    file: str
    line: int
    used: bool
    prompt: str
    chosen: str
    rejected: str


def uncurated(home: Home, dataset_id: str, count: int) -> list[UncuratedPair] | None:
    """The first `count` uncurated pairs, in the order of their hashes; None where the dataset was made before there
    was a list of them."""
    path = corpus.folder(home, dataset_id) / "uncurated.jsonl"
    if not path.is_file():
        return None
    decode = msgspec.json.Decoder(UncuratedPair).decode
    with path.open("rb") as file:
        return [decode(line) for line, _ in zip(file, range(count), strict=False)]


# ---------------------------------------------------------------------------------------------- two of them


@dataclass(frozen=True, slots=True)
class Shared:
    """Examples of one kind in either of two datasets, by content."""

    only_first: int
    only_second: int
    both: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two datasets. options: name → the values that differ."""

    first: Summary
    second: Summary
    sft: Shared
    dpo: Shared
    options: dict[str, tuple[Any, Any]]


def compare(home: Home, first: str, second: str) -> Comparison:
    """Reads both once, in step, in memory that does not grow with them. Raises NotFound or DataError."""
    a, b = summary(home, first), summary(home, second)
    sft = _shared(_contents(a.path / "sft.jsonl", _whole), _contents(b.path / "sft.jsonl", _whole))
    dpo = _shared(_contents(a.path / "dpo.jsonl", _untagged), _contents(b.path / "dpo.jsonl", _untagged))
    names = sorted({*a.report["options"], *b.report["options"]})
    pairs = {name: (a.report["options"].get(name), b.report["options"].get(name)) for name in names}
    return Comparison(a, b, sft, dpo, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})


def _contents(path: Path, content: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """The content hashes of a dataset's file, which is ordered by them."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield digest(content(line.rstrip(b"\n")))
    except FileNotFoundError:
        raise NotFound(f"{path.parent} has no {path.name}: prepare the dataset again.") from None
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is damaged ({error}): prepare the dataset again.") from error


def _whole(line: bytes) -> bytes:
    return line


def _untagged(line: bytes) -> bytes:
    pair = _preference(line)
    return _encode(Preference(pair.prompt, pair.chosen, pair.rejected))


def _shared(first: Iterator[bytes], second: Iterator[bytes]) -> Shared:
    only_first = only_second = both = 0
    a, b = next(first, None), next(second, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a < b):
            only_first += 1
            a = next(first, None)
        elif a is None or b < a:
            only_second += 1
            b = next(second, None)
        else:
            both += 1
            a, b = next(first, None), next(second, None)
    return Shared(only_first, only_second, both)


def refuse_removal(home: Home, dataset_id: str) -> None:
    """Raises Busy where a run was made with the dataset: what a run learned from stays. Raises NotFound."""
    corpus.folder(home, dataset_id)
    if used := [run.id for run in runs.everyone(home) if run.record.dataset == dataset_id]:
        more = f" and {len(used) - 1} more" if len(used) > 1 else ""
        raise Busy(f"Dataset {dataset_id} is what run {used[-1]}{more} learned from, so it stays.")


def remove(home: Home, dataset_id: str) -> None:
    """Deletes a dataset that no run was made with. Raises Busy, NotFound, DiskError."""
    refuse_removal(home, dataset_id)
    path = corpus.folder(home, dataset_id)
    gone = path.with_name(f".removed-{path.name}")
    try:
        # Renamed first: half a dataset is never seen.
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise DiskError(f"{path} could not be deleted: {error}.") from error
