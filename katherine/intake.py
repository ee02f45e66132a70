"""Reading a corpus: every line of every file, once, into rows of unique examples, in memory that grows with the lines
but not with their text. Writes the raw copies and the rejects as it goes. What a line may hold is decided in lines;
the dataset folder belongs to corpus."""

import hashlib
import os
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import msgspec

from katherine import findings, lines
from katherine.errors import DataError
from katherine.examples import Conversation, Preference
from katherine.lines import Problem
from katherine.progress import Progress, Stopped

# A line longer than this is rejected unread: 8 MiB of text is over a million tokens, more than any context holds, and
# the limit keeps memory flat whatever the file holds.
MAX_LINE = 8 * 2**20
# Of a rejected line this much is kept in rejects.jsonl; the whole of it is in raw/.
MAX_REJECT = 2**20
SHOWN_TEXT = 160  # characters of a line in a problem: two terminal lines
# Problems that show their line's text: more than anyone reads through, in some 2 MB (7 where every character is wide).
# Of the others rejects.jsonl and raw/ have it.
SHOWN_TEXTS = 10_000
TOP_REASONS = 5  # in the error that nothing was usable: more would scroll the first away
BLOCK = 2**20  # bytes a read and a write: big enough that system calls vanish, small against any memory
LONGEST_NAME = 255  # bytes: what the usual file systems take as a name
BOM = b"\xef\xbb\xbf"
# Lines between two looks at whether to stop: a tenth of a second at 70,000 lines a second, and too few to cost any.
OFTEN = 8192

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Source:
    """One input file. `label` is its name in every report: unique, and the same wherever the folder lies."""

    label: str
    path: Path


def digest(content: bytes) -> bytes:
    """BLAKE2b, 16 bytes: two of a million examples share one by chance in 1 of 10^26 datasets."""
    return hashlib.blake2b(content, digest_size=16).digest()


class Rows:
    """The unique examples of one kind: where each was first seen, and where its canonical line lies in the spool.
    No text is held, so a million examples take some 150 MB."""

    def __init__(self) -> None:
        self.row: dict[bytes, int] = {}
        self.file = array("L")
        self.line = array("Q")
        self.raw = array("Q")
        self.spool = array("Q")
        self.length = array("L")
        self.duplicates = 0
        self.rejected = 0

    def ordered(self) -> Iterator[tuple[bytes, int]]:
        """(content hash, row), ordered by hash: the one order that no order of input can change."""
        for content in sorted(self.row):
            yield content, self.row[content]


class Intake:
    """What was read so far. Writes raw/ and rejects.jsonl as it goes; canonical lines go to `spool`, an unnamed file.

    An example's canonical line is compact JSON in UTF-8 with its keys in schema order, without the curator's tags;
    its content hash is the digest of that line.

    A problem takes some 100 bytes here: its file, its severity and its reason are shared with the others like it. A
    reason that no other line has adds its own length and some 150 bytes.
    """

    def __init__(self, draft: Path, spool: IO[bytes], progress: Progress) -> None:
        self.raw_folder = draft / "raw"
        self.progress = progress
        self.size = self.done = 0  # bytes of all files that are read, and of those that have been
        self.rejects = (draft / "rejects.jsonl").open("wb", buffering=BLOCK)
        self.spool = spool
        self.spooled = 0
        self.sources: list[Source] = []
        self.by_file: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.reasons: dict[str, str] = {}  # each once, however many lines have it
        self.texts = 0
        self.notes: dict[tuple[int, str], tuple[int, str]] = {}
        self.note_counts: Counter[tuple[int, str]] = Counter()
        self.unrecognised = 0
        self.sft = Rows()
        self.dpo = Rows()
        # Every SFT reply's hash() and row: enough to know the few rows that may repeat a rejected reply, without
        # reading all of them again.
        self.reply_hashes = array("q")
        self.reply_rows = array("L")
        self.tags: list[tuple[str, str] | None] = []
        self.sides: list[tuple[bytes, bytes]] = []
        self.contradicted: set[int] = set()

    def __enter__(self) -> "Intake":
        return self

    def __exit__(self, *_: object) -> None:
        self.rejects.close()

    def read(self, source: Source) -> None:
        counts = dict.fromkeys(("lines", "sft", "dpo", "duplicates", "rejected"), 0)
        self.sources.append(source)
        self.by_file.append({"file": source.label, "raw": self._raw_name(source.label), **counts})
        try:
            file = source.path.open("rb", buffering=BLOCK)
        except OSError as error:
            self._file_problem(len(self.sources) - 1, f"the file cannot be opened: {error.strerror}")
            return
        with file, (self.raw_folder / self.by_file[-1]["raw"]).open("wb", buffering=BLOCK) as copy:
            if _is_one_array(file):
                self._read_array(file, copy)
            else:
                self._read_lines(file, copy)
            self.done += copy.tell()
        self.tell(0)

    def leave_out(self, source: Source) -> None:
        """Keep the file in raw/, so that it can be put back in, but read nothing of it."""
        counts = dict.fromkeys(("lines", "sft", "dpo", "duplicates", "rejected"), 0)
        self.sources.append(source)
        self.by_file.append({"file": source.label, "raw": self._raw_name(source.label), **counts, "left_out": True})
        shutil.copyfile(source.path, self.raw_folder / self.by_file[-1]["raw"])

    def tell(self, offset: int) -> None:
        """Say where reading is: whole MB, of those in all files. Raises Stopped where somebody asked for it."""
        self.progress.step((self.done + offset) // 10**6, self.size // 10**6)
        if self.progress.stop_requested():
            raise Stopped

    def _read_lines(self, file: BinaryIO, copy: BinaryIO) -> None:
        counts = self.by_file[-1]
        read, isspace = lines.read, bytes.isspace
        for number, offset, size, line in _split(file, copy):
            if not number % OFTEN:
                self.tell(offset)
            if isspace(line):
                continue
            counts["lines"] += 1
            try:
                if size > MAX_LINE:
                    raise lines.Rejected(f"the line has {size:,} bytes; the limit is {MAX_LINE:,}")
                example, notes = read(line)
            except lines.Rejected as rejected:
                self._reject(number, line, str(rejected))
                continue
            for note in notes:
                key = len(self.sources) - 1, note
                if key not in self.notes:
                    self.notes[key] = number, self._text(line)
                self.note_counts[key] += 1
            if isinstance(example, Conversation):
                row, new = self._add(self.sft, "sft", _encode(example), number, offset)
                if new:
                    for reply in example.messages[1::2]:
                        self.reply_hashes.append(hash(reply.content))
                        self.reply_rows.append(row)
            else:
                self._add_pair(example, number, offset)

    def _read_array(self, file: BinaryIO, copy: BinaryIO) -> None:
        reason = "this is one JSON array; write one object a line, without the brackets and commas around them"
        for number, _, _, line in _split(file, copy):
            if not line.isspace():
                self.by_file[-1]["lines"] += 1
                self._count_rejected("unrecognised")
                self._keep_reject(len(self.sources) - 1, number, line, reason)
        self._file_problem(len(self.sources) - 1, reason)

    def _add(self, rows: Rows, kind: Literal["sft", "dpo"], line: bytes, number: int, offset: int) -> tuple[int, bool]:
        """The example's row, and whether it is new. The first to arrive is the one that is kept."""
        row = rows.row.setdefault(digest(line), len(rows.line))
        if row < len(rows.line):
            rows.duplicates += 1
            self.by_file[-1]["duplicates"] += 1
            return row, False
        self.by_file[-1][kind] += 1
        rows.file.append(len(self.sources) - 1)
        rows.line.append(number)
        rows.raw.append(offset)
        rows.spool.append(self.spooled)
        rows.length.append(len(line) + 1)
        self.spool.write(line + b"\n")
        self.spooled += len(line) + 1
        return row, True

    def _add_pair(self, pair: Preference, number: int, offset: int) -> None:
        tag = (pair.category, pair.type) if pair.category is not None and pair.type is not None else None
        untagged = Preference(pair.prompt, pair.chosen, pair.rejected)
        row, new = self._add(self.dpo, "dpo", _encode(untagged), number, offset)
        if new:
            self.tags.append(tag)
            chosen, rejected = _encode((pair.prompt, pair.chosen)), _encode((pair.prompt, pair.rejected))
            self.sides.append((digest(chosen), digest(rejected)))
        elif tag is not None:
            # Curated somewhere is curated; of two curators' tags the first by name, whatever the order of files.
            self.tags[row] = min(tag, self.tags[row] or tag)

    def settle_contradictions(self) -> None:
        """Two lines that swap chosen and rejected teach nothing together: both are left out, except that a curator's
        judgement stands against an uncurated line. The same reply chosen here and rejected there is worth a look."""
        found = findings.contradictions(self.sides)
        for row, other in sorted(found.swapped.items()):
            reason = f"chosen and rejected are swapped in {self._pair_place(other)}"
            curated, other_curated = self.tags[row] is not None, self.tags[other] is not None
            if curated and not other_curated:
                self.warn(self.dpo, row, f"{reason}; that line is left out, this curated one stands")
                continue
            reason += "; both are left out" if curated == other_curated else "; that one stands, this one is left out"
            self.contradicted.add(row)
            file = self.dpo.file[row]
            self.by_file[file]["dpo"] -= 1
            self.by_file[file]["rejected"] += 1
            self.dpo.rejected += 1
            raw = self._raw_line(self.dpo, row)
            self._keep_reject(file, self.dpo.line[row], raw, reason)
            self._add_problem(self.sources[file].label, self.dpo.line[row], reason, "rejected", self._text(raw))
        for row, other in sorted(found.at_odds.items()):
            chosen_here = self.sides[row][0] == self.sides[other][1]
            here, there = ("chosen", "rejected") if chosen_here else ("rejected", "chosen")
            where = self._pair_place(other)
            self.warn(self.dpo, row, f"conflicting preferences: the reply {here} here is {there} in {where}")

    def note_unusable_files(self) -> None:
        """Raises DataError where no file holds anything usable."""
        named = {problem.file for problem in self.problems if problem.line is None}
        for file, counts in enumerate(self.by_file):
            if counts.get("left_out"):
                continue
            if counts["lines"] == counts["rejected"] and counts["file"] not in named:
                all_of_them = f"all {counts['lines']} lines are rejected" if counts["lines"] else "the file is empty"
                self._file_problem(file, f"nothing usable: {all_of_them}")
        if self.sft.row or len(self.tags) > len(self.contradicted):
            return
        reasons = Counter(problem.reason for problem in self.problems)
        first = {problem.reason: problem for problem in reversed(self.problems)}
        shown = []
        for reason, count in reasons.most_common(TOP_REASONS):
            problem = first[reason]
            line = "" if problem.line is None else f", line {problem.line}"
            shown.append(f"- {problem.file}{line}: {reason}" + (f" ({count:,} times)" if count > 1 else ""))
        raise DataError("Nothing in these files can be used:\n" + "\n".join(shown))

    def used_pairs(self, uncurated: bool | Collection[bytes]) -> Iterator[tuple[bytes, int]]:
        """(content hash, row) of the pairs in use, ordered by hash: the curated ones, and of the others all, none, or
        those with the given content hashes."""
        for content, row in self.dpo.ordered():
            if row in self.contradicted:
                continue
            wanted = uncurated if isinstance(uncurated, bool) else content in uncurated
            if wanted or self.tags[row] is not None:
                yield content, row

    def uncurated_pairs(self) -> Iterator[tuple[bytes, int]]:
        """(content hash, row) of the pairs without a curator's tags that contradict no other, ordered by hash."""
        for content, row in self.dpo.ordered():
            if row not in self.contradicted and self.tags[row] is None:
                yield content, row

    def rows_saying(self, texts: Collection[int]) -> set[int]:
        """The SFT rows with a reply that probably is one of `texts`, given by their hash()."""
        return {row for row, reply in zip(self.reply_rows, self.reply_hashes, strict=True) if reply in texts}

    def line(self, rows: Rows, row: int) -> bytes:
        """A canonical line from the spool. Only after the last write, and a flush."""
        return os.pread(self.spool.fileno(), rows.length[row], rows.spool[row])

    def all_problems(self) -> list[Problem]:
        """Every problem so far; those that many lines of a file share stand once, at the first."""
        noted = []
        for (file, note), (number, text) in self.notes.items():
            more = self.note_counts[file, note] - 1
            also = f" (and in {more} more lines of this file)" if more else ""
            noted.append(Problem(self.sources[file].label, number, note + also, "warning", text))
        return self.problems + noted

    def place(self, rows: Rows, row: int) -> str:
        return f"{self.sources[rows.file[row]].label}, line {rows.line[row]}"

    def _pair_place(self, row: int) -> str:
        return self.place(self.dpo, row) + ("" if self.tags[row] is not None else " (uncurated)")

    def _raw_name(self, label: str) -> str:
        """The file's own name with .jsonl at its end; with a mark of its label where that is taken or too long."""
        name = Path(label).name
        stem = name[: -len(".jsonl")] if name.lower().endswith(".jsonl") else name
        mark = f"-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
        short = stem.encode()[: LONGEST_NAME - len(f"{mark}.jsonl")].decode(errors="ignore")
        if short != stem or any(counts["raw"] == f"{stem}.jsonl" for counts in self.by_file):
            short += mark
        return f"{short}.jsonl"

    def _raw_line(self, rows: Rows, row: int) -> bytes:
        with (self.raw_folder / self.by_file[rows.file[row]]["raw"]).open("rb") as file:
            file.seek(rows.raw[row])
            return file.readline().removeprefix(BOM)

    def warn(self, rows: Rows, row: int, reason: str) -> None:
        text = self._text(self._raw_line(rows, row)) if self.texts < SHOWN_TEXTS else ""
        self._add_problem(self.sources[rows.file[row]].label, rows.line[row], reason, "warning", text)

    def note_unread(self, label: str) -> None:
        reason = "not read: of a folder only .jsonl files are; put one object a line into a .jsonl file"
        self._add_problem(label, None, reason, "warning")

    def _reject(self, number: int, line: bytes, reason: str) -> None:
        self._count_rejected(lines.kind_of(line))
        self._keep_reject(len(self.sources) - 1, number, line, reason)
        self._add_problem(self.sources[-1].label, number, reason, "rejected", self._text(line))

    def _count_rejected(self, kind: lines.Kind) -> None:
        self.by_file[-1]["rejected"] += 1
        if kind == "sft":
            self.sft.rejected += 1
        elif kind == "dpo":
            self.dpo.rejected += 1
        else:
            self.unrecognised += 1

    def _keep_reject(self, file: int, number: int, line: bytes, reason: str) -> None:
        """Bytes that are not UTF-8 are written as \\xff; a text over MAX_REJECT bytes is cut, and marked so."""
        text = line[:MAX_REJECT].decode(errors="backslashreplace").rstrip("\r\n")
        entry = {"file": self.sources[file].label, "line": number, "reason": reason, "text": text}
        self.rejects.write(_encode(entry | {"shortened": len(line) > MAX_REJECT}) + b"\n")

    def _file_problem(self, file: int, reason: str) -> None:
        self._add_problem(self.sources[file].label, None, reason, "rejected")

    def _add_problem(
        self, file: str, line: int | None, reason: str, severity: Literal["rejected", "warning"], text: str = ""
    ) -> None:
        self.problems.append(Problem(file, line, self.reasons.setdefault(reason, reason), severity, text))

    def _text(self, line: bytes) -> str:
        """The line as a problem shows it, or "" once SHOWN_TEXTS have been."""
        self.texts += 1
        return _shown(line) if self.texts <= SHOWN_TEXTS else ""


def _split(file: BinaryIO, copy: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Number, offset, size (less its end) and bytes of every line, split at \\n alone; all of it also goes to `copy`.
    Of a line over MAX_LINE only the beginning is held. A byte-order mark before the first line is left out of it."""
    number = offset = 0
    while line := file.readline(MAX_LINE + 1):
        copy.write(line)
        size, last = len(line), line
        if size > MAX_LINE and not line.endswith(b"\n"):
            while last := file.readline(MAX_LINE):
                copy.write(last)
                size += len(last)
                if last.endswith(b"\n"):
                    break
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if line:
            yield number, offset, size - last.endswith(b"\n"), line
        offset += size


def _is_one_array(file: BinaryIO) -> bool:
    """Whether the file is one JSON array by mistake: it opens with [ and an object, or with [ alone, it closes with ],
    and its first line is not an array in itself (that would be one bad line among others). Rewinds the file."""
    head = file.read(BLOCK).removeprefix(BOM).lstrip()
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - BLOCK))
    tail = file.read().rstrip()
    file.seek(0)
    first, _, rest = head.partition(b"\n")
    if re.match(rb"\[\s*([{\]]|$)", head) is None or not tail.endswith(b"]"):
        return False
    return not rest.strip() or not first.rstrip().endswith(b"]")


def _shown(line: bytes) -> str:
    """The beginning of a line; four bytes are the most that a character takes."""
    text = line[: 4 * SHOWN_TEXT].decode(errors="backslashreplace").strip()
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
