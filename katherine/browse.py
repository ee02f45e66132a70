"""Looking into a dataset: its examples a page at a time, and searched. Reads no more of a file than it has time for: a
dataset may hold a million examples. How training sees an example is rendering's."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from katherine.errors import DataError, NotFound
from katherine.examples import Conversation, Preference

Kind = Literal["sft", "dpo"]
# Seconds a search takes before it gives back what it has, and where to go on: a page waits no longer without a word.
BUDGET = 0.5
# Bytes that are looked through at once. Large against the overhead of a call, small against the budget.
BLOCK = 2**20

_conversation = msgspec.json.Decoder(Conversation).decode
_preference = msgspec.json.Decoder(Preference).decode


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a dataset's file: bytes from its start, and examples before it."""

    offset: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """One example. number: its place in the file, from 1."""

    number: int
    example: Conversation | Preference


@dataclass(frozen=True, slots=True)
class Page:
    """found: examples in the file's order. next: where to go on, or None at the end. searched: the share of the file
    that lies before `next`. in_time: false where the page is short because the time was up."""

    found: list[Found]
    next: Cursor | None
    searched: float
    in_time: bool


def page(
    dataset: Path, kind: Kind, at: Cursor | None = None, search: str = "", count: int = 5, budget: float = BUDGET
) -> Page:
    """The next `count` examples from a cursor, those only that hold `search` in a text or tag, whatever its case.

    Raises NotFound where the file is gone, DataError where it is damaged."""
    path = dataset / f"{kind}.jsonl"
    decode = _conversation if kind == "sft" else _preference
    wanted = search.casefold()
    deadline = time.monotonic() + budget
    at = at or Cursor()
    found: list[Found] = []
    offset, index = at.offset, at.index
    in_time = True
    try:
        with path.open("rb") as file:
            total = file.seek(0, 2)
            file.seek(offset)
            while len(found) < count and offset < total:
                if wanted and time.monotonic() > deadline:
                    in_time = False
                    break
                if wanted and (skipped := _skip(file, offset, wanted)):
                    offset, index = offset + skipped[0], index + skipped[1]
                    file.seek(offset)
                    continue
                for line in _lines(file, BLOCK if wanted else None):
                    offset, index = offset + len(line), index + 1
                    example: Conversation | Preference = decode(line)
                    if not wanted or any(wanted in text.casefold() for text in _texts(example)):
                        found.append(Found(index, example))
                        if len(found) == count:
                            break
                    if wanted and time.monotonic() > deadline:
                        break
    except FileNotFoundError:
        raise NotFound(f"{path.parent} has no {path.name}: prepare the dataset again.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the dataset again.") from error
    return Page(found, Cursor(offset, index) if offset < total else None, offset / total if total else 1.0, in_time)


def _lines(file, size: int | None) -> Iterator[bytes]:
    """Lines from where the file is: all, or those that begin in the next `size` bytes."""
    for line in file:
        yield line
        if size is not None:
            size -= len(line)
            if size <= 0:
                return


def _skip(file, offset: int, wanted: str) -> tuple[int, int] | None:
    """Bytes and lines of a block of whole lines that do not hold `wanted`, or None where they may. Far faster than
    looking at each: nearly all blocks of a large file are passed over like this."""
    block = file.read(BLOCK) + file.readline()
    # As it is written in JSON: a quote, a backslash and a control character are escaped, nothing else is.
    written = msgspec.json.encode(wanted)[1:-1].decode()
    # Half the work, where there are no other letters than ASCII's.
    text = block.lower().decode() if block.isascii() else block.decode().casefold()
    if written in text:
        file.seek(offset)
        return None
    return len(block), block.count(b"\n")


def _texts(example: Conversation | Preference) -> Iterator[str]:
    if isinstance(example, Conversation):
        yield from (message.content for message in example.messages)
        return
    for message in itertools.chain(example.prompt, example.chosen, example.rejected):
        yield message.content
    yield from (tag for tag in (example.category, example.type) if tag)
