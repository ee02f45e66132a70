"""A run's log as one text: its end, a search, and what may be downloaded. Its lines come from libraries, data and
models: they are made printable here, and escaped by whoever shows them. Writing and rotating is the supervisor's."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from katherine.runs import Run

# Longer lines are cut on a page, with a mark; the download has them whole.
SHOWN_CHARACTERS = 400
# The supervisor writes lines of up to 64 kB: enough for a screen of ordinary ones, and never all 16 MB.
TAIL_BYTES = 128_000
# Read, and decoded, so much at a time.
PIECE_BYTES = 1_000_000
# A search answers with what it has found by then and a place to go on from: a handler takes under a second.
SEARCH_SECONDS = 0.5

# CSI sequences with their parameters, OSC ones to their end, and the two-character escapes.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_a-z0-9=>])")
# What is left of control characters, and what turns the direction of text or hides in it.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass(frozen=True, slots=True)
class Line:
    """number: from 1, in what is kept of the log. text: printable, at most SHOWN_CHARACTERS and a mark."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """lines: where the search met its text, in order. next: the line to go on from, or None when all was searched."""

    lines: list[Line]
    next: int | None


def parts(run: Run) -> list[Path]:
    """The files that make up the log, oldest first: what may be downloaded."""
    return [path for path in (run.log.with_name("log.1.txt"), run.log) if path.is_file()]


def size(run: Run) -> int:
    """Bytes kept."""
    total = 0
    for path in parts(run):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # rotated away since
    return total


def mark(run: Run) -> str:
    """Changes whenever the log does."""
    try:
        found = run.log.stat()
    except OSError:
        return ""
    return f"{found.st_ino}.{found.st_size}"


def tail(run: Run, lines: int = 200) -> list[str]:
    """The last lines, printable, oldest first; fewer where they are very long."""
    with ExitStack() as stack:
        data, short = b"", False
        for file in reversed(_opened(run, stack)):
            wanted = TAIL_BYTES - len(data)
            length = os.fstat(file.fileno()).st_size
            file.seek(max(length - wanted, 0))
            data = file.read(wanted) + data
            short = length > wanted
            if short or data.count(b"\n") > lines:
                break
    kept = data.split(b"\n")
    if kept and not kept[-1]:
        kept.pop()
    if short and len(kept) > 1:
        kept = kept[1:]  # begins in the middle
    return [_shown(_printable(line.decode("utf-8", "replace"))) for line in kept[-lines:]] if data else []


def search(run: Run, text: str, start: int = 1, limit: int = 100, seconds: float = SEARCH_SECONDS) -> Found:
    """Lines from number `start` on that hold the text, in whatever case, at most `limit` of them and for about
    `seconds`. An empty text is found nowhere."""
    wanted = text.casefold()
    if not wanted.strip():
        return Found([], None)
    deadline = time.monotonic() + seconds
    found: list[Line] = []
    begun = False
    with ExitStack() as stack:
        for number, piece in _pieces(_opened(run, stack)):
            count = piece.count(b"\n") + (not piece.endswith(b"\n"))
            if number + count <= start:
                continue
            # One piece at least, or a slow disk would never let it end.
            if begun and time.monotonic() > deadline:
                return Found(found, number)
            begun = True
            lines = _printable(piece.decode("utf-8", "replace")).split("\n")
            # The whole piece first: most hold nothing.
            if wanted not in "\n".join(lines).casefold():
                continue
            for place, line in enumerate(lines[:count], number):
                if place >= start and wanted in line.casefold():
                    if len(found) == limit:
                        return Found(found, place)
                    found.append(Line(place, _shown(line)))
    return Found(found, None)


def _opened(run: Run, stack: ExitStack) -> list[BinaryIO]:
    """The parts, oldest first. The newer is opened first: rotated in between, it is both, and then one."""
    files: list[BinaryIO] = []
    for path in (run.log, run.log.with_name("log.1.txt")):
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            continue
        if not any(os.path.sameopenfile(file.fileno(), other.fileno()) for other in files):
            files.insert(0, file)
    return files


def _pieces(files: list[BinaryIO]) -> Iterator[tuple[int, bytes]]:
    """Whole lines, about PIECE_BYTES at a time, with the number of the first."""
    number = 1
    for file in files:
        rest = b""
        while data := file.read(PIECE_BYTES):
            data = rest + data
            end = data.rfind(b"\n") + 1 or len(data)
            yield number, data[:end]
            number += data.count(b"\n", 0, end)
            rest = data[end:]
        if rest:
            yield number, rest
            number += 1


def _printable(text: str) -> str:
    """Without escape sequences and control characters; tabs and line ends stay."""
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    return _CONTROLS.sub("", text)


def _shown(line: str) -> str:
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " …"
