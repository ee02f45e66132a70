"""The audit log: who approved, withdrew, allowed or pushed what. Owns the file and its chain; what is worth a line is
for those who do it to say.

    KATHERINE_HOME/audit.jsonl    appended to, never changed; each line names the sha256 of the one before

The chain shows a line that was changed, removed or put in between. It cannot show lines that are gone from the end, nor
a log that somebody wrote anew from the changed line on: for that, `head` is put down elsewhere (a receipt).
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from katherine import runs, settings
from katherine.errors import DataError, DiskError
from katherine.settings import Home
from katherine.turns import turn

FILE = "audit.jsonl"
# What stands for a line that the machine did not finish writing.
TORN = "torn"
# Lines are read back from the end in pieces of this size: an approval's is a few kB.
_PIECE = 65_536
# Tokens of the hub and keys of RunPod by their look: somebody may paste one into a note.
_TOKENS = re.compile(r"\b(hf|rpa|api_org)_[A-Za-z0-9]{16,}")
# A shorter text would be found in ordinary words.
_LEAST = 6


class Entry(msgspec.Struct, frozen=True):
    """A line. number: its place in the file, from 1. event: what was done, or TORN. facts: about what, as the event has
    it. previous: sha256 of the line before ("" in the first). sha256: of this one. torn: the machine went away while it
    was written; what can be read of it is in `text`."""

    number: int
    event: str
    time: str
    who: str
    role: str
    facts: dict[str, Any]
    previous: str
    sha256: str
    torn: bool = False
    text: str = ""


def path(home: Home) -> Path:
    return home.root / FILE


def append(home: Home, event: str, *, who: str, role: str, **facts: Any) -> None:
    """Adds a line, and returns once it is on the disk. facts: JSON values. What looks like a secret is left out of
    every text. Safe between processes. Raises DiskError where it cannot be written, Busy."""
    given = without_secrets({"event": event, "who": who, "role": role, "facts": facts})
    with turn(home, "audit", "the audit log"):
        try:
            home.root.mkdir(parents=True, exist_ok=True)
            _append(path(home), {"time": runs.now()} | given)
        except OSError as error:
            raise DiskError(
                f"{path(home)} cannot be written ({error.strerror}), so nothing was done. Make room, then try again."
            ) from error


def _append(file: Path, line: dict[str, Any]) -> None:
    fresh = not file.exists()
    opened = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        last, whole = _last(opened)
        line["previous"] = hashlib.sha256(last).hexdigest() if last or whole else ""
        if last and not whole:
            line["after_torn"] = True
        # ASCII alone, so that no text can look like the end of a line, and a lone surrogate can be written.
        written = json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        if last and not whole:
            written = b"\n" + written
        while written:
            written = written[os.write(opened, written) :]
        os.fsync(opened)
    finally:
        os.close(opened)
    if fresh:
        _sync_folder(file.parent)


def _last(opened: int) -> tuple[bytes, bool]:
    """The last line without its end, and whether it has one; (b"", False) for an empty file."""
    begin = size = os.fstat(opened).st_size
    found = b""
    while begin:
        at = max(begin - _PIECE, 0)
        found = os.pread(opened, begin - at, at) + found
        begin = at
        if b"\n" in found[:-1]:
            break
    if not size:
        return b"", False
    whole = found.endswith(b"\n")
    return found[: -1 if whole else None].rpartition(b"\n")[2], whole


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(home: Home) -> list[Entry]:
    """Every line, oldest first; [] before there is one. What cannot be read as a line is an entry too, with its text:
    nothing is left out. Raises DataError where the file cannot be read at all."""
    return list(_read_now(home)[0])


def broken(home: Home) -> str:
    """ "" where the chain holds, else where it breaks first and what that means. A line that a dying machine tore is no
    break: the next one carries its sha256. Raises DataError where the file cannot be read at all."""
    return _read_now(home)[1]


def head(home: Home) -> tuple[int, str]:
    """How many lines there are, and the last one's sha256 ("" without one): put down elsewhere, it shows later whether
    lines are gone from the end."""
    entries = _read_now(home)[0]
    return (entries[-1].number, entries[-1].sha256) if entries else (0, "")


def _read_now(home: Home) -> tuple[tuple[Entry, ...], str]:
    try:
        found = path(home).stat()
        return _read(path(home), found.st_size, found.st_mtime_ns, found.st_ino)
    except FileNotFoundError:
        return (), ""
    except OSError as error:
        raise DataError(f"{path(home)} cannot be read ({error.strerror}). Look after its volume.") from error


# A page looks every two seconds; the file changes a few times a day.
@functools.lru_cache(maxsize=8)
def _read(file: Path, size: int, changed: int, inode: int) -> tuple[tuple[Entry, ...], str]:
    content = file.read_bytes()
    if not content:
        return (), ""
    lines = content.split(b"\n")
    ends = lines[-1] == b""
    if ends:
        lines.pop()
    rows = [_row(line) for line in lines]
    # Whoever writes after a torn line says so.
    torn_ones = [bool(row and row.get("after_torn")) for row in rows[1:]] + [not ends]
    entries: list[Entry] = []
    wrong = previous = ""
    for number, (line, row, torn) in enumerate(zip(lines, rows, torn_ones, strict=True), start=1):
        sha256 = hashlib.sha256(line).hexdigest()
        entries.append(_entry(number, line, row, sha256, torn))
        if not wrong:
            if row is None and not torn:
                wrong = f"Line {number} of {file} is no entry: it was changed after it was written."
            elif row is not None and row["previous"] != previous:
                wrong = _break(file, number)
        previous = sha256
    return tuple(entries), wrong


def _break(file: Path, number: int) -> str:
    if number == 1:
        return f"Line 1 of {file} does not begin the log: lines before it are gone."
    return (
        f"Line {number} of {file} does not follow from line {number - 1}: that one was changed after it was written, "
        "or lines between the two are gone."
    )


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = ("time", "event", "who", "role", "previous")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in texts):
        return None
    return row if isinstance(row.get("facts"), dict) else None


def _entry(number: int, line: bytes, row: dict[str, Any] | None, sha256: str, torn: bool) -> Entry:
    text = line.decode(errors="replace")
    if row is None:
        return Entry(number, TORN if torn else "unreadable", "", "", "", {}, "", sha256, torn, text)
    return Entry(
        number, row["event"], row["time"], row["who"], row["role"], row["facts"], row["previous"], sha256, torn,
        text if torn else "",
    )  # fmt: skip


def words(entry: Entry) -> str:
    """What a line is about, for a list: its facts in short. Of a torn or unreadable one its text."""
    if entry.torn or not entry.event or not entry.facts:
        return entry.text[:200]
    said = []
    for name, value in entry.facts.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            files = value.get("files")
            count = f" of {len(files)} {'file' if len(files) == 1 else 'files'}" if isinstance(files, list) else ""
            said.append(f"{label} {value.get('id', '')}{count}")
            said += [f"note: {value['note']}"] if value.get("note") else []
        elif isinstance(value, bool):
            said.append(f"{label}: {'yes' if value else 'no'}")
        elif isinstance(value, str | int | float) and value != "":
            said.append(f"{label} {value:,}" if isinstance(value, int) else f"{label} {value}")
    return ", ".join(said)


def without_secrets(value: Any) -> Any:
    """A JSON value in whose texts every secret of this process, and what looks like a token, is left out."""
    if isinstance(value, str):
        for name in settings.SECRETS:
            secret = settings.secret(name)
            if secret and len(secret) >= _LEAST:
                value = value.replace(secret, "[secret]")
        return _TOKENS.sub("[secret]", value)
    if isinstance(value, dict):
        return {without_secrets(str(name)): without_secrets(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value
