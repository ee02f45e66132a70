"""Files in, a dataset folder out: finds the files, has them read (intake), writes what is left in an order of its own,
fingerprints it and reports. Tokens are counted by the template that is handed in.

A dataset folder does not change once it is there:
    raw/*.jsonl      the input, byte for byte, with the files that were left out
    sft.jsonl        the SFT examples, one a line, ordered by content hash
    dpo.jsonl        the pairs in use, likewise: the curated ones, and the others where they were asked for
    rejects.jsonl    every rejected line: file, line, reason, text, and whether the text was shortened
    uncurated.jsonl  the pairs without a curator's tags, shortened, with their content hashes: to choose among
    problems.jsonl   the report's problems, those of one kind together
    summary.json     the report with counts in place of its problems, and when it was made
    report.json      what `prepare --json` prints, less the folder's own name and place
What lists, compares and removes datasets is in shelf.
"""

import filecmp
import itertools
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from katherine import disk
from katherine.errors import DataError, DiskError, NotFound
from katherine.examples import Conversation, Preference
from katherine.intake import BLOCK, Intake, Source
from katherine.progress import Progress, Quiet
from katherine.runs import now, write_json
from katherine.settings import Home
from katherine.writing import ChatTemplate, Writing

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")  # 64: file systems take 255 with what is added, people less
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*")
# A draft that nobody has written to for this long (seconds) was left by a process that is gone: a preparation writes
# all the time, and a dead machine's draft may hold gigabytes.
ABANDONED = 3600
_conversation = msgspec.json.Decoder(Conversation).decode
_preference = msgspec.json.Decoder(Preference).decode
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset folder. `report` is what `prepare --json` prints."""

    path: Path
    report: dict[str, Any]

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def fingerprint(self) -> str:
        return self.report["fingerprint"]

    def conversations(self) -> list[Conversation]:
        return conversations(self.path)

    def preferences(self) -> list[Preference]:
        return preferences(self.path)


def conversations(dataset: Path) -> list[Conversation]:
    """The SFT examples of a dataset folder, in the order of their content hashes. Raises NotFound or DataError."""
    return _read(dataset / "sft.jsonl", _conversation)


def preferences(dataset: Path) -> list[Preference]:
    """The pairs in use of a dataset folder, in the order of their content hashes. Raises NotFound or DataError."""
    return _read(dataset / "dpo.jsonl", _preference)


def _read(path: Path, decode: Callable[[bytes], T]) -> list[T]:
    try:
        with path.open("rb") as file:
            return [decode(line) for line in file]
    except FileNotFoundError:
        raise NotFound(f"{path.parent} has no {path.name}: prepare the dataset again.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the dataset again.") from error


def load(home: Home, dataset_id: str) -> Dataset:
    """Takes some 640 bytes of memory for each problem in the report while it is read.

    Raises NotFound for an id that is not a dataset's, DataError for a folder whose report cannot be read."""
    path = folder(home, dataset_id)
    try:
        report = msgspec.json.decode((path / "report.json").read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path / 'report.json'} is damaged ({error}). Prepare the dataset again.") from error
    return Dataset(path, {"dataset": path.name, "path": str(path)} | report)


def folder(home: Home, dataset_id: str) -> Path:
    """Raises NotFound for an id that is not a dataset's."""
    path = home.datasets / dataset_id
    if not _ID.fullmatch(dataset_id) or not (path / "report.json").is_file():
        there = ", ".join(sorted(report.parent.name for report in home.datasets.glob("[!.]*/report.json"))) or "none"
        raise NotFound(f"There is no dataset {dataset_id!r} in {home.datasets}. There are: {there}.")
    return path


def prepare(
    paths: Sequence[Path],
    home: Home,
    *,
    include_uncurated: bool | Collection[str] = False,
    leave_out: Collection[str] = (),
    template: ChatTemplate | None = None,
    base: str | None = None,
    max_length: int = 1024,
    name: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read files, and every .jsonl file below folders (.json files there are named, not read), into one dataset.

    Bad lines are set aside and named, and so are bad files, as long as something usable is left. The folder appears
    whole or not at all; the same input with the same options finds the folder that is there already.

    include_uncurated: whether pairs without a curator's tags go in: all of them, none, or those whose content hashes
    (hexadecimal, as in uncurated.jsonl) are given. leave_out: files that are kept in raw/ but not read, by the names
    that the report gives them or by their paths. template: counts tokens; without it the report has none. base: its
    name, for the report. max_length: tokens that training takes of a row, leaving longer ones out (1024: four times
    the 99th percentile of the corpus that the recipes were derived on); here only to say what exceeds it. progress:
    phases "read" (steps: MB) and "count" (steps: examples).

    Memory: some 150 bytes an example, and some 310 a rejected line or warning: 100 while reading, 210 for its entry in
    the report. A reason that no other line has, such as a foreign line's keys, adds some 150 and its own length.

    Raises DataError for a path or a file to leave out that is not there and where nothing at all is usable, DiskError
    where room runs out, Stopped where progress asks for it.
    """
    sources, unread = _sources([Path(path) for path in paths])
    options = _Options(include_uncurated, leave_out, template, base, max_length, name, progress or Quiet())
    return _prepare(sources, unread, home, options)


def change(
    home: Home,
    dataset_id: str,
    *,
    also: Sequence[Path] = (),
    include_uncurated: bool | Collection[str] = False,
    leave_out: Collection[str] = (),
    template: ChatTemplate | None = None,
    base: str | None = None,
    max_length: int = 1024,
    name: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Another dataset from the files of one that is there, those left out then included, with other choices. also:
    files that are added to them, by names that none of those has. The other options are `prepare`'s; so is what it
    raises, and NotFound for the id."""
    path = folder(home, dataset_id)
    report = msgspec.json.decode((path / "report.json").read_bytes(), type=_Files)
    files = [(file["file"], path / "raw" / file["raw"]) for file in report.by_file]
    sources = [Source(label, raw) for label, raw in files if raw.is_file()]
    if also:
        added, _ = _sources(also)
        if taken := {source.label for source in added} & {source.label for source in sources}:
            raise DataError(f"Dataset {dataset_id} has a file of this name already: {', '.join(sorted(taken))}.")
        sources = sorted([*sources, *added], key=lambda source: source.label)
    options = _Options(include_uncurated, leave_out, template, base, max_length, name, progress or Quiet())
    return _prepare(sources, [], home, options)


class _Files(msgspec.Struct):
    by_file: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Options:
    include_uncurated: bool | Collection[str]
    leave_out: Collection[str]
    template: ChatTemplate | None
    base: str | None
    max_length: int
    name: str | None
    progress: Progress


def _prepare(sources: list[Source], unread: list[str], home: Home, options: _Options) -> Dataset:
    if options.name is not None and not _NAME.fullmatch(options.name):
        raise DataError(
            f"{options.name!r} cannot name a dataset: use up to 64 letters, digits, - and _, a letter or digit first."
        )
    left_out = _left_out(sources, options.leave_out)
    uncurated = _hashes(options.include_uncurated)
    _check_room(home.datasets, sources)
    _remove_abandoned(home.datasets)
    draft = home.datasets / f".draft-{secrets.token_hex(6)}"
    try:
        (draft / "raw").mkdir(parents=True)
        options.progress.phase("read")
        with tempfile.TemporaryFile("w+b", buffering=BLOCK) as spool, Intake(draft, spool, options.progress) as intake:
            intake.size = sum(source.path.stat().st_size for source in sources if source.label not in left_out)
            for label in unread:
                intake.note_unread(label)
            for source in sources:
                if source.label in left_out:
                    intake.leave_out(source)
                else:
                    intake.read(source)
            intake.settle_contradictions()
            intake.note_unusable_files()
            options.progress.phase("count")
            writing = Writing(draft, intake, options.template, options.base, options.max_length, options.progress)
            report, summary = writing.write(uncurated)
        write_json(draft / "summary.json", {"created": now()} | summary)
        write_json(draft / "report.json", report)
        return _keep(draft, home, options.name or "dataset", report)
    except OSError as error:
        raise DiskError(f"The dataset could not be made in {home.datasets}: {error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _left_out(sources: Sequence[Source], names: Collection[str]) -> set[str]:
    """The labels of the files to leave out. Raises DataError for a name that is no file's, or where none is left."""
    labels = {source.label for source in sources}
    by_path = {str(source.path): source.label for source in sources}
    found, wrong = set(), []
    for name in names:
        label = name if name in labels else by_path.get(str(Path(name).resolve()))
        if label is None:
            wrong.append(f"There is no file {name!r} to leave out. There are: {', '.join(sorted(labels))}.")
        else:
            found.add(label)
    if not wrong and found == labels:
        wrong.append("Every file is left out. Leave one in.")
    if wrong:
        raise DataError("\n".join(wrong))
    return found


def _hashes(include_uncurated: bool | Collection[str]) -> bool | frozenset[bytes]:
    if isinstance(include_uncurated, bool):
        return include_uncurated
    try:
        return frozenset(bytes.fromhex(text) for text in include_uncurated)
    except ValueError as error:
        raise DataError(f"A pair is chosen by its content hash, in hexadecimal: {error}.") from None


def _remove_abandoned(datasets: Path) -> None:
    """Drafts left by a process that was killed, perhaps with its machine."""
    for draft in datasets.glob(".draft-*"):
        with suppress(OSError):
            written = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
            if time.time() - written > ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _sources(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """Every file once, ordered by its label: the path below the folder that was given, or the bare name; with more of
    its path in front where two would share one. Then the labels of the .json files in folders, which are not read."""
    labels: dict[Path, str] = {}
    read: set[Path] = set()
    wrong = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if _ends(file, ".jsonl", ".json") and file.is_file()]
            labels |= {file.resolve(): file.relative_to(path).as_posix() for file in inside}
            lines = {file.resolve() for file in inside if _ends(file, ".jsonl")}
            read |= lines
            if not lines:
                wrong.append(f"{path} is a folder without any .jsonl file." + _instead(inside))
        elif path.is_file():
            labels.setdefault(path.resolve(), path.name)
            read.add(path.resolve())
        else:
            wrong.append(f"{path} is neither a file nor a folder." if path.exists() else f"{path} does not exist.")
    if wrong or not labels:
        raise DataError("\n".join(wrong) or "No files were named. Name .jsonl files, or folders that hold some.")
    while clashing := {label for label, count in Counter(labels.values()).items() if count > 1}:
        for file, label in labels.items():
            if label in clashing:
                labels[file] = "/".join(file.parts[-(label.count("/") + 2) :])
    named = sorted((_printable(label), file) for file, label in labels.items())
    sources = [Source(label, file) for label, file in named if file in read]
    return sources, [label for label, file in named if file not in read]


def _ends(file: Path, *suffixes: str) -> bool:
    return file.name.lower().endswith(suffixes)


def _instead(files: Sequence[Path]) -> str:
    """What to do about a folder that holds .json files alone."""
    if not files:
        return ""
    first = _printable(min(file.name for file in files))
    more = f" and {len(files) - 1} more .json files" if len(files) > 1 else ""
    return f" It holds {first}{more}: put one object a line into a .jsonl file."


def _printable(name: str) -> str:
    """A file name may hold bytes that are not UTF-8; in a report they are written as \\xff."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _check_room(folder: Path, sources: Sequence[Source]) -> None:
    """Three times the input: the raw copy, the examples (at most as large), and these once more in the temporary
    folder, which may lie on the same disk."""
    size = 3 * sum(source.path.stat().st_size for source in sources)
    free = disk.room(folder).free
    if free < size:
        raise DiskError(
            f"There are {free / 1e9:.1f} GB free for {folder}, and this input needs {size / 1e9:.1f} GB. "
            "Make room there, or point KATHERINE_HOME elsewhere."
        )


def _keep(draft: Path, home: Home, name: str, report: dict[str, Any]) -> Dataset:
    """Gives the draft its place, unless a dataset with this very report is there. Content that was prepared before
    from other files or with other options gets a number after its id, so that no report speaks of another input."""
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    for number in itertools.count(1):
        dataset_id = f"{name}-{report['fingerprint'][:8]}" + (f"-{number}" if number > 1 else "")
        path = home.datasets / dataset_id
        if not path.exists():
            try:
                draft.rename(path)
            except OSError:
                if not path.exists():  # otherwise somebody else's took the place just now
                    raise
            else:
                _sync(home.datasets)
                return Dataset(path, {"dataset": dataset_id, "path": str(path)} | report)
        there = path / "report.json"
        # Byte by byte: a report may name a million lines, and one such in memory is enough.
        if there.is_file() and filecmp.cmp(draft / "report.json", there, shallow=False):
            return Dataset(path, {"dataset": dataset_id, "path": str(path)} | report)
    raise AssertionError("itertools.count ended")


def _sync(path: Path) -> None:
    """To the disk itself: a folder that survives a power cut by name must survive it whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
