"""Probe sets: what is asked and by which rules it is scored, as text that a person writes. Owns the format and the
files; putting a set to models and scoring are probes'.

    katherine/sample/probes.toml         the built-in set: read only, and every field explained
    KATHERINE_HOME/probes/<name>.toml    the others, replaced whole
"""

import functools
import hashlib
import os
import re
import secrets
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from katherine.errors import DataError, KatherineError, NotFound
from katherine.settings import Home

SAMPLE = Path(__file__).parent / "sample"
BUILT_IN = "katherine"
SUFFIX = ".toml"
# A set is read whole, and shown whole in a browser; a thousand probes of the built-in one's length are 400 kB.
MAX_BYTES = 500_000
MAX_PROBES = 1_000
# Compiling takes up to a millisecond a character (ranges of letters whose case is ignored).
MAX_RULE = 500
# A third of an engine's context of 4,096 tokens at four characters a token, so that an answer has room.
MAX_QUESTION = 6_000
# As many as fit the context with answers in the corpus' manner between them.
MAX_TURNS = 24
# A page asks for its set every two seconds.
_KEPT = 8
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z _-]{0,59}")
# An id stands in one word of the command line, and behind a set's name and a slash in a talk's source.
_ID = re.compile(r"[^\s/]{1,64}")
_HEADER = re.compile(r"\s*\[\[\s*[\"']?probe[\"']?\s*\]\]")


MAY_RUN_ON = "need not end by itself"


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question (`ask`) or a longer talk (`turns`, each asked in order, the last answer scored).

    must: regular expressions that all match the answer; must_not: none does; min_words, max_words: its length.
    must_end: it ends by itself, and is not cut at the recipe's longest answer. compare: also put to the base and the
    adapters, to show before and after. A probe without must, must_not, min_words and max_words is for a person.
    """

    id: str
    category: str
    why: str = ""
    ask: str | None = None
    turns: tuple[str, ...] = ()
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    min_words: int | None = None
    max_words: int | None = None
    must_end: bool = True
    compare: bool = False

    @property
    def questions(self) -> tuple[str, ...]:
        return (self.ask,) if self.ask else self.turns

    @property
    def has_rule(self) -> bool:
        """Whether a rule of its own can say that an answer is right."""
        return bool(self.must or self.must_not or self.min_words or self.max_words)

    def rules(self) -> list[str]:
        """Its own rules in words; empty where it has none."""
        said = [f"must match {rule}" for rule in self.must] + [f"must not match {rule}" for rule in self.must_not]
        if self.min_words:
            said.append(f"at least {self.min_words} words")
        if self.max_words:
            said.append(f"at most {self.max_words} words")
        if not self.must_end:
            said.append(MAY_RUN_ON)
        return said


class ProbeSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    probe: tuple[Probe, ...]
    description: str = ""


def names(home: Home) -> list[str]:
    """The built-in set, then those of the home, by name; whether one of them can be read is not asked."""
    found = (path.stem for path in folder(home).glob(f"*{SUFFIX}"))
    return [BUILT_IN, *sorted(name for name in found if _NAME.fullmatch(name) and name != BUILT_IN)]


def is_own(name: str) -> bool:
    """Whether a set can be changed and removed: every one that is not built in."""
    return name != BUILT_IN


def folder(home: Home) -> Path:
    return home.root / "probes"


def text(home: Home, name: str) -> str:
    """A set's text, by its name or by the path of a .toml file, sound or not. Raises NotFound, or DataError for a file
    that is no text or too long."""
    path = _path(home, name)
    try:
        raw = path.read_bytes()
    except OSError:
        if name.endswith(SUFFIX):
            raise NotFound(f"There is no file {path}: check the probe set's path.") from None
        known = ", ".join(names(home))
        raise NotFound(f"There is no probe set {name!r}: there are {known}; or give a .toml file's path.") from None
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path} has {len(raw):,} bytes, more than the {MAX_BYTES:,} of a probe set: split it.")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from error


def load(home: Home, name: str) -> ProbeSet:
    """A set by its name, or by the path of a .toml file. Raises NotFound, or DataError as `read` does."""
    return read(text(home, name), str(_path(home, name)) if name.endswith(SUFFIX) else f"probe set {name}")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save(home: Home, name: str, text: str, over: str | None = None) -> ProbeSet:
    """Writes a set under a name of the home, which is written into the text as well. over: the sha256 of the text that
    it is meant to replace, "" for none; where another is there, nothing is written.

    Raises KatherineError for a name that cannot be taken, DataError as `read` does: then the old file is as it was.
    """
    name = name.strip()
    if not is_own(name):
        raise KatherineError(f"{name} is the built-in set, and stays as it is: save yours under another name.")
    if not _NAME.fullmatch(name):
        raise KatherineError(
            f"{name!r} cannot be a set's name: up to 60 letters, digits, spaces, - and _, a letter or digit first."
        )
    text = _named(text.replace("\r\n", "\n"), name)
    found = read(text, f"probe set {name}")
    path = folder(home) / f"{name}{SUFFIX}"
    if over is not None and _sha256_of(path) != over:
        raise KatherineError(
            f"A set {name} is there that is not the one you began from: somebody saved it meanwhile, or the name was "
            "taken. Save yours under another name, then look at both."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with draft.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return found


def remove(home: Home, name: str) -> None:
    """Deletes a set of the home; runs that asked it keep their own copy. Raises NotFound, KatherineError for the
    built-in one."""
    if not is_own(name):
        raise KatherineError(f"{name} is the built-in set: it cannot be deleted.")
    if name not in names(home):
        raise NotFound(f"There is no probe set {name!r} of yours.")
    (folder(home) / f"{name}{SUFFIX}").unlink(missing_ok=True)


@functools.lru_cache(maxsize=_KEPT)
def read(text: str, where: str) -> ProbeSet:
    """A set from its text. Raises DataError with everything that is wrong, a line each, naming the probe, the field
    and the text's line as far as they can be told; `where` begins each."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise DataError(f"{where}: it has more than {MAX_BYTES:,} bytes. Split it.")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{where}: this is not TOML: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: it is nested too deeply to be a probe set.") from error
    made, problems = _made(raw, _Lines(text))
    if problems:
        raise DataError("\n".join(f"{where}: {problem}" for problem in problems))
    assert made is not None
    return made


# ---------------------------------------------------------------------------------------------------- judging


class _Lines:
    """Where in the text the probes and their fields are."""

    def __init__(self, text: str):
        self._lines = text.split("\n")
        self._headers = [number for number, line in enumerate(self._lines) if _HEADER.match(line)]
        self.probes = len(self._headers)

    def top(self, field: str) -> int | None:
        return self._find(field, 0, self._headers[0] if self._headers else len(self._lines))

    def of(self, probe: int, field: str) -> int | None:
        """The line of a probe's field, or that where the probe begins; counted from 1."""
        begin = self._headers[probe]
        end = self._headers[probe + 1] if probe + 1 < self.probes else len(self._lines)
        return self._find(field, begin, end) or begin + 1

    def _find(self, field: str, begin: int, end: int) -> int | None:
        key = re.compile(rf"\s*[\"']?{re.escape(field)}[\"']?\s*=")
        return next((number + 1 for number in range(begin, end) if key.match(self._lines[number])), None)


def _made(raw: dict[str, Any], lines: _Lines) -> tuple[ProbeSet | None, list[str]]:
    problems = []
    for name in raw.keys() - {"name", "description", "probe"}:
        problems.append(
            f"{_at(lines.top(name))}{name} is not a field of a set: it has name, description and [[probe]]."
        )
    for name in ("name", "description"):
        if not isinstance(raw.get(name, ""), str):
            problems.append(f"{_at(lines.top(name))}{name} is not a text in quotes.")
    if not raw.get("name"):
        problems.append('it has no name: begin with name = "…".')
    given = raw.get("probe", [])
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        return None, [*problems, "its probes are not tables: each begins with a line [[probe]]."]
    if not given:
        problems.append("it has no [[probe]].")
    if len(given) > MAX_PROBES:
        return None, [*problems, f"it has {len(given):,} probes, more than {MAX_PROBES:,}: split it."]
    # A line that only looks like a header, in a long text, would put every line after it wrong.
    known = lines.probes == len(given)
    probes: list[Probe] = []
    seen: dict[str, int] = {}
    for index, each in enumerate(given):
        probe, wrong = _probe(each)
        named = each.get("id") if isinstance(each.get("id"), str) else None
        who = f"probe {named!r}" if named else f"probe number {index + 1}"
        if named in seen:
            wrong.append(("id", f"the id is used twice, first by probe number {seen[named] + 1}."))
        elif named:
            seen[named] = index
        for field, problem in wrong:
            line = lines.of(index, field) if known else None
            problems.append(f"{_at(line)}{who}{f', {field}' if field else ''}: {problem}")
        if probe is not None:
            probes.append(probe)
    if problems:
        return None, problems
    return ProbeSet(raw["name"], tuple(probes), raw.get("description", "")), []


def _at(line: int | None) -> str:
    return "" if line is None else f"line {line}, "


_FIELDS = Probe.__struct_fields__
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.(?P<field>\w+)(?P<rest>.*)`)?$", re.S)
_KINDS = {"str": "a text in quotes", "array": "a list in [ ]", "int": "a whole number", "bool": "true or false"}


def _probe(raw: dict[str, Any]) -> tuple[Probe | None, list[tuple[str, str]]]:
    """The probe, and what is wrong with it: (field, sentence)."""
    wrong = [
        (name, f"there is no such field of a probe: the fields are {', '.join(_FIELDS)}.")
        for name in raw
        if name not in _FIELDS
    ]
    try:
        probe = msgspec.convert({name: value for name, value in raw.items() if name in _FIELDS}, Probe)
    except msgspec.ValidationError as error:
        return None, [*wrong, _worded(str(error))]
    return probe, wrong + list(_problems(probe))


def _worded(error: str) -> tuple[str, str]:
    """msgspec's sentence in ours: (field, sentence)."""
    if missing := re.search(r"missing required field `(\w+)`", error):
        return missing.group(1), "it is missing."
    found = _AT.match(error)
    assert found is not None
    field, what = found["field"] or "", found["what"]
    if kinds := re.match(r"Expected `([^`]*)`, got `([^`]*)`", what):
        wanted = kinds.group(1).removesuffix(" | null")
        return field, f"it is not {_KINDS.get(wanted, wanted)}."
    return field, f"{what}."


def _problems(probe: Probe) -> Iterator[tuple[str, str]]:
    if not _ID.fullmatch(probe.id):
        yield "id", "an id has up to 64 characters, no space and no slash."
    if not probe.category.strip():
        yield "category", "it is empty: name one, such as identity or voice."
    if bool(probe.ask) == bool(probe.turns):
        yield "ask", "give either ask or turns."
    for field, questions in (("ask", (probe.ask or "",) if probe.ask else ()), ("turns", probe.turns)):
        for question in questions:
            if not question.strip():
                yield field, "a question is empty."
            if len(question) > MAX_QUESTION:
                yield field, f"a question has {len(question):,} characters, more than {MAX_QUESTION:,}."
    if len(probe.turns) > MAX_TURNS:
        yield "turns", f"a talk of {len(probe.turns)} turns is longer than the {MAX_TURNS} that a model has room for."
    for field, rules in (("must", probe.must), ("must_not", probe.must_not)):
        for rule in rules:
            if reason := unusable(rule):
                yield field, f"{rule[:80]!r} is not a regular expression ({reason})."
    for field, words in (("min_words", probe.min_words), ("max_words", probe.max_words)):
        if words is not None and words < 1:
            yield field, "it is less than 1: leave it out instead."
    if probe.min_words and probe.max_words and probe.min_words > probe.max_words:
        yield "min_words", f"it is more than max_words, which is {probe.max_words}."


def unusable(rule: str) -> str:
    """Why a regular expression cannot be used, else empty. One that takes for ever is not known before it meets a
    text; scoring bounds its time."""
    if len(rule) > MAX_RULE:
        return f"it has {len(rule):,} characters, more than {MAX_RULE}"
    try:
        re.compile(rule)
    except (re.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return ""


# ---------------------------------------------------------------------------------------------------- files


def _path(home: Home, name: str) -> Path:
    if name.endswith(SUFFIX):
        return Path(name)
    if name == BUILT_IN:
        return SAMPLE / "probes.toml"
    if not _NAME.fullmatch(name):
        raise NotFound(f"There is no probe set {name!r}: there are {', '.join(names(home))}.")
    return folder(home) / f"{name}{SUFFIX}"


def _named(text: str, name: str) -> str:
    """The text with its own name set to the file's: "save as" then needs no second edit."""
    lines = _Lines(text)
    line = f'name = "{name}"'
    at = lines.top("name")
    if at is None:
        return f"{line}\n{text}"
    rows = text.split("\n")
    rows[at - 1] = line
    return "\n".join(rows)


def _sha256_of(path: Path) -> str:
    """Of the text of a file as `text` reads it; "" where there is none."""
    try:
        return sha256(path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n"))
    except OSError:
        return ""
