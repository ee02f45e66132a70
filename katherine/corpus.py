"""Files in, a dataset folder out: finds the files, has them read (intake), writes what is left in an order of its own,
fingerprints it and reports. Tokens are counted by the template that is handed in.

A dataset folder does not change once it is there:
    raw/*.jsonl     the input, byte for byte
    sft.jsonl       the SFT examples, one a line, ordered by content hash
    dpo.jsonl       the pairs in use, likewise: the curated ones, and the others where they were asked for
    rejects.jsonl   every rejected line: file, line, reason, text, and whether the text was shortened
    report.json     what `prepare --json` prints, less the folder's own name and place
"""

import filecmp
import hashlib
import itertools
import os
import re
import secrets
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from katherine import findings
from katherine.errors import DataError, DiskError, NotFound
from katherine.examples import Conversation, Preference
from katherine.intake import BLOCK, Intake, Rows, Source
from katherine.lines import Problem
from katherine.runs import write_json
from katherine.settings import Home

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")  # 64: file systems take 255 with what is added, people less
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*")
_encode = msgspec.json.Encoder().encode
_conversation = msgspec.json.Decoder(Conversation).decode
_preference = msgspec.json.Decoder(Preference).decode
T = TypeVar("T")


class ChatTemplate(Protocol):
    """What counts tokens here: a base's tokenizer and chat template, as training renders them."""

    def count(self, conversation: Conversation) -> int:
        """Tokens of the whole conversation."""

    def count_pair(self, preference: Preference) -> int:
        """Tokens of the prompt with the longer of the two replies."""


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
    path = home.datasets / dataset_id
    if not _ID.fullmatch(dataset_id) or not (path / "report.json").is_file():
        there = ", ".join(sorted(report.parent.name for report in home.datasets.glob("[!.]*/report.json"))) or "none"
        raise NotFound(f"There is no dataset {dataset_id!r} in {home.datasets}. There are: {there}.")
    try:
        report = msgspec.json.decode((path / "report.json").read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path / 'report.json'} is damaged ({error}). Prepare the dataset again.") from error
    return Dataset(path, {"dataset": path.name, "path": str(path)} | report)


def prepare(
    paths: Sequence[Path],
    home: Home,
    *,
    include_uncurated: bool = False,
    template: ChatTemplate | None = None,
    base: str | None = None,
    max_length: int = 1024,
    name: str | None = None,
) -> Dataset:
    """Read files, and every .jsonl file below folders (.json files there are named, not read), into one dataset.

    Bad lines are set aside and named, and so are bad files, as long as something usable is left. The folder appears
    whole or not at all; the same input with the same options finds the folder that is there already.

    template: counts tokens; without it the report has none. base: its name, for the report. max_length: tokens that
    training takes of a row, leaving longer ones out (1024: four times the 99th percentile of the corpus that the
    recipes were derived on); here only to say what exceeds it.

    Memory: some 150 bytes an example, and some 310 a rejected line or warning: 100 while reading, 210 for its entry in
    the report. A reason that no other line has, such as a foreign line's keys, adds some 150 and its own length.

    Raises DataError for a path that is not there and where nothing at all is usable, DiskError where room runs out.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r} cannot name a dataset: use up to 64 letters, digits, - and _, a letter or digit first."
        )
    sources, unread = _sources([Path(path) for path in paths])
    _check_room(home.datasets, sources)
    draft = home.datasets / f".draft-{secrets.token_hex(6)}"
    try:
        (draft / "raw").mkdir(parents=True)
        with tempfile.TemporaryFile("w+b", buffering=BLOCK) as spool, Intake(draft, spool) as intake:
            for label in unread:
                intake.note_unread(label)
            for source in sources:
                intake.read(source)
            intake.settle_contradictions()
            intake.note_unusable_files()
            report = _Writing(draft, intake, template, base, max_length).write(include_uncurated)
        write_json(draft / "report.json", report)
        return _keep(draft, home, name or "dataset", report)
    except OSError as error:
        raise DiskError(f"The dataset could not be made in {home.datasets}: {error}. Nothing was kept.") from error
    finally:
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
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise DiskError(
            f"{there} has {free / 1e9:.1f} GB free, and this input needs {size / 1e9:.1f} GB. "
            "Make room there, or point KATHERINE_HOME elsewhere."
        )


class _Writing:
    """From what was read to sft.jsonl, dpo.jsonl and the report."""

    def __init__(
        self, draft: Path, intake: Intake, template: ChatTemplate | None, base: str | None, max_length: int
    ) -> None:
        self.draft = draft
        self.intake = intake
        self.template = template
        self.base = base
        self.max_length = max_length
        self.hash = hashlib.sha256()
        self.refused: dict[int, int] = {}  # hash() of a rejected reply → the row of its pair

    def write(self, include_uncurated: bool) -> dict[str, Any]:
        """The report. The fingerprint is SHA-256 over the content hashes of the examples in use, in their order, each
        kind under its name and count.

        Raises DataError where only pairs are there that were not asked for."""
        intake = self.intake
        intake.spool.flush()
        used = list(intake.used_pairs(include_uncurated))
        curated = sum(tag is not None for row, tag in enumerate(intake.tags) if row not in intake.contradicted)
        uncurated = len(intake.tags) - len(intake.contradicted) - curated
        if not used and not intake.sft.row:
            raise DataError(
                f"There is nothing here but {uncurated} uncurated pairs, and these are left out unless asked for. "
                "Ask for uncurated pairs, or give them `_cat` and `_type`."
            )
        pair_tokens, lengths = self._pairs(used)
        sft_tokens = self._conversations()
        problems = intake.all_problems() + self._dataset_problems(lengths, len(used))
        problems.sort(key=lambda p: (p.file, p.line or 0, p.reason))
        tokens = None
        if self.template is not None:
            pairs = findings.spread(pair_tokens, self.max_length)
            tokens = (findings.spread(sft_tokens, self.max_length) or pairs or {}) | {
                "max_length": self.max_length,
                "base": self.base,
                "pairs": pairs,
            }
        return {
            "options": {"include_uncurated": include_uncurated, "max_length": self.max_length, "base": self.base},
            "files": len(intake.by_file),
            "lines": sum(counts["lines"] for counts in intake.by_file),
            "sft": {
                "unique": len(intake.sft.row),
                "duplicates": intake.sft.duplicates,
                "rejected": intake.sft.rejected,
            },
            "dpo": {
                "curated": curated,
                "uncurated": uncurated,
                "used": len(used),
                "duplicates": intake.dpo.duplicates,
                "rejected": intake.dpo.rejected,
                "lengths": lengths,
            },
            "unrecognised": intake.unrecognised,
            "tokens": tokens,
            "fingerprint": self.hash.hexdigest(),
            "by_file": intake.by_file,
            "problems": msgspec.to_builtins(problems),
        }

    def _pairs(self, used: list[tuple[bytes, int]]) -> tuple["array[int]", dict[str, float | bool] | None]:
        rows, tokens, lengths = self.intake.dpo, array("L"), findings.Lengths()
        self.hash.update(b"dpo %d\n" % len(used))
        with (self.draft / "dpo.jsonl").open("wb", buffering=BLOCK) as out:
            for content, row in used:
                self.hash.update(content)
                pair = self._pair(row)
                if tag := self.intake.tags[row]:
                    pair = msgspec.structs.replace(pair, category=tag[0], type=tag[1])
                out.write(_encode(pair) + b"\n")
                lengths.add(pair.chosen[0].content, pair.rejected[0].content)
                self.refused.setdefault(hash(pair.rejected[0].content), row)
                if self.template is not None:
                    tokens.append(self.template.count_pair(pair))
                    self._warn_if_long(rows, row, tokens[-1])
        return tokens, lengths.figures()

    def _conversations(self) -> "array[int]":
        rows, tokens = self.intake.sft, array("L")
        suspects = self.intake.rows_saying(self.refused) if self.refused else set()
        self.hash.update(b"sft %d\n" % len(rows.row))
        with (self.draft / "sft.jsonl").open("wb", buffering=BLOCK) as out:
            for content, row in rows.ordered():
                self.hash.update(content)
                line = self.intake.line(rows, row)
                out.write(line)
                if row not in suspects and self.template is None:
                    continue
                conversation = _conversation(line)
                for reply in conversation.messages[1::2]:
                    pair = self.refused.get(hash(reply.content))
                    if pair is not None and self._pair(pair).rejected == (reply,):
                        where = self.intake.place(self.intake.dpo, pair)
                        self.intake.warn(rows, row, f"an assistant's turn equals the rejected reply of {where}")
                if self.template is not None:
                    tokens.append(self.template.count(conversation))
                    self._warn_if_long(rows, row, tokens[-1])
        return tokens

    def _pair(self, row: int) -> Preference:
        return _preference(self.intake.line(self.intake.dpo, row))

    def _warn_if_long(self, rows: Rows, row: int, tokens: int) -> None:
        if tokens > self.max_length:
            self.intake.warn(
                rows, row, f"{tokens:,} tokens; training takes up to {self.max_length:,} and leaves this one out"
            )

    def _dataset_problems(self, lengths: dict[str, float | bool] | None, pairs: int) -> list[Problem]:
        if lengths is None or not lengths["biased"]:
            return []
        reason = (
            f"length bias: the chosen reply is the longer one in {lengths['chosen_longer_share']:.0%} of {pairs} pairs "
            f"(mean {lengths['chosen_mean']:.0f} against {lengths['rejected_mean']:.0f} characters, "
            f"{lengths['ratio']:.2f} times as long); DPO may learn length instead of manner"
        )
        return [Problem("", None, reason, "warning")]


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
