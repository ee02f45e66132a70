"""A talk: one question after another put to several columns side by side, each with its own memory of it. Owns what is
kept of it and how it reads as a transcript; who answers is jobs.asking's, what a person thinks of it reviews'.

    KATHERINE_HOME/talks/<id>.json    replaced whole
"""

import functools
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from katherine import columns, engines, runs
from katherine.errors import DataError, KatherineError, NotFound, RecipeError
from katherine.examples import Message
from katherine.settings import Home
from katherine.units import moment

# Talks are kept in memory by their file's time and size: a page lists a few dozen, again and again.
_KEPT = 256
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]*")

# waiting: for memory, for the GPU, or behind another column; `note` says for what. loading: from the disk. answering:
# its text grows. The other three are ends.
State = Literal["waiting", "loading", "answering", "done", "stopped", "failed"]
OVER: frozenset[State] = frozenset({"done", "stopped", "failed"})


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same for every column of a talk. temperature 0 is greedy. The defaults are those that Qwen3.5's model card
    gives for answers without thinking, so that what is tried here is what other programs will show."""

    seed: int = 0
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    min_p: float = 0.0
    max_new_tokens: int = 400


def checked(sampling: Sampling) -> Sampling:
    """The same, if an engine can be asked so. Raises RecipeError with every reason."""
    bounds: dict[str, tuple[float, float]] = {
        # llama.cpp's seed has 32 bits, and all of them set means a random one.
        "seed": (0, 2**32 - 2),
        # Above 2 even a sure next token is a lottery.
        "temperature": (0, 2),
        "top_p": (0, 1),
        "top_k": (0, 1000),
        "min_p": (0, 1),
        "max_new_tokens": (1, engines.CONTEXT),
    }
    wrong = {}
    for name, (least, most) in bounds.items():
        value = getattr(sampling, name)
        whole = isinstance(getattr(Sampling(), name), int)
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            label = name.replace("_", " ")
            wrong[name] = f"{label}: {value!r} is no {'whole ' * whole}number from {least} to {most}."
    if wrong:
        raise RecipeError(list(wrong.values()), wrong)
    return sampling


class Answer(msgspec.Struct, frozen=True):
    """What one column said. note: why it waits or failed, in words. finish: as engines.Finish has it, "" before the
    end. tokens: generated. seconds: from the question reaching the engine to the last token. first_token_seconds: same
    to the first, None before it came."""

    column: str
    state: State = "waiting"
    text: str = ""
    note: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, as llama.cpp counts generation; None where there was no second one."""
        if self.first_token_seconds is None or self.tokens < 2 or self.seconds <= self.first_token_seconds:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_token_seconds)


class Round(msgspec.Struct, frozen=True):
    """One question and what each column answered, in the talk's order of columns."""

    question: str
    sampling: Sampling
    answers: tuple[Answer, ...]

    @property
    def is_over(self) -> bool:
        return all(answer.state in OVER for answer in self.answers)

    @property
    def stopped_at(self) -> int | None:
        """Characters of the stopped answer that had come least far, None where none was stopped. Who must not know how
        fast each file is reads no answer of the round further."""
        return min((len(answer.text) for answer in self.answers if answer.state == "stopped"), default=None)


class Talk(msgspec.Struct, frozen=True):
    """columns: their ids (see columns.Column). files: column → sha256 of the file that answered. role: of who talks,
    "operator" or "reviewer". system: an optional system prompt, "" for none. source: "" for a free talk, or
    "<probe set>/<probe id>" for a question of a set. export: the run that is being reviewed, "" outside of a review."""

    id: str
    created: str
    who: str
    role: str
    columns: tuple[str, ...]
    files: dict[str, str]
    sampling: Sampling = Sampling()
    system: str = ""
    source: str = ""
    export: str = ""
    rounds: tuple[Round, ...] = ()


def create(
    home: Home,
    *,
    who: str,
    role: str,
    files: Mapping[str, str],
    sampling: Sampling,
    system: str = "",
    source: str = "",
    export: str = "",
) -> Talk:
    """A talk without a question yet, saved. files: column id → sha256, in the order in which they are shown."""
    talk_id = f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}"
    talk = Talk(talk_id, runs.now(), who, role, tuple(files), dict(files), sampling, system, source, export)
    save(home, talk)
    return talk


def save(home: Home, talk: Talk) -> None:
    path = _path(home, talk.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, msgspec.to_builtins(talk))


def load(home: Home, talk_id: str) -> Talk:
    """Raises NotFound for an id that is not a talk's, DataError for a damaged file."""
    path = _path(home, talk_id)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Talk)
    except OSError:
        raise NotFound(f"There is no talk {talk_id!r} in {path.parent}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it.") from error


def stamp(home: Home, talk_id: str) -> tuple[int, int]:
    """Time of change (ns) and size of its file, which differ once it does. Raises NotFound."""
    path = _path(home, talk_id)
    try:
        at = path.stat()
    except OSError:
        raise NotFound(f"There is no talk {talk_id!r} in {path.parent}.") from None
    return at.st_mtime_ns, at.st_size


def everyone(home: Home, role: str | None = None, most: int | None = None) -> list[Talk]:
    """Talks, newest first, those of one role where it is given, and no more than `most`. Damaged files are left out.
    Reads no more files than it has to: an id begins with its time."""

    def found() -> Iterator[Talk]:
        for path in sorted((home.root / "talks").glob("[!.]*.json"), reverse=True):
            with suppress(OSError, DataError, NotFound):
                at = path.stat()
                talk = _read(home, path.stem, at.st_mtime_ns, at.st_size)
                if role in (None, talk.role):
                    yield talk

    return list(islice(found(), most))


@functools.lru_cache(maxsize=_KEPT)
def _read(home: Home, talk_id: str, changed: int, size: int) -> Talk:
    return load(home, talk_id)


def remove(home: Home, talk_id: str) -> None:
    """What people thought of it stays: a verdict holds its own words. Raises NotFound."""
    path = _path(home, talk_id)
    try:
        path.unlink()
    except FileNotFoundError:
        raise NotFound(f"There is no talk {talk_id!r} in {path.parent}.") from None


def heard(talk: Talk, column: str, before: int) -> list[Message]:
    """What the column knows of the talk before round `before`: the system prompt, and the rounds that it answered. A
    round in which it said nothing is left out whole, since turns alternate."""
    found = [Message("system", talk.system)] if talk.system else []
    for each in talk.rounds[:before]:
        said = next((answer.text for answer in each.answers if answer.column == column), "")
        if said:
            found += [Message("user", each.question), Message("assistant", said)]
    return found


def _path(home: Home, talk_id: str) -> Path:
    if not _ID.fullmatch(talk_id):
        raise NotFound(f"{talk_id!r} is not a talk's id.")
    return home.root / "talks" / f"{talk_id}.json"


# ------------------------------------------------------------------------------------------------ transcripts


def titles(home: Home, talk: Talk) -> dict[str, str]:
    """Column → what it is called where this talk is shown: its quant, and of which export, where there are several. A
    file that is no longer there goes by its id."""
    owners = [column.partition(":")[0] for column in talk.columns]
    exports = {owner for owner in owners if owner != "base"}
    found = {}
    for column, owner in zip(talk.columns, owners, strict=True):
        name = column.partition(":")[2] or column
        try:
            title = columns.title(columns.get(home, column))
        except KatherineError:
            title = "base" if owner == "base" else name
        if owner == "base" and owners.count("base") > 1:
            title = f"{title} ({name})"
        elif owner != "base" and len(exports) > 1:
            title = f"{title} of {owner.rpartition('-')[2]}"
        found[column] = title
    return found


def transcript(talk: Talk, titles: Mapping[str, str]) -> dict[str, Any]:
    """The talk as JSON values: everything that is known of it, under names that explain themselves. titles: column →
    what to call it."""
    return {
        "talk": talk.id,
        "begun": talk.created,
        "who": talk.who,
        "role": talk.role,
        "export": talk.export,
        "source": talk.source,
        "system": talk.system,
        "columns": [
            {"column": column, "title": titles.get(column, column), "sha256": talk.files.get(column, "")}
            for column in talk.columns
        ],
        "rounds": [
            {
                "question": each.question,
                "sampling": msgspec.to_builtins(each.sampling),
                "answers": [
                    msgspec.to_builtins(answer)
                    | {
                        "title": titles.get(answer.column, answer.column),
                        "tokens_per_second": answer.tokens_per_second,
                    }
                    for answer in each.answers
                ],
            }
            for each in talk.rounds
        ],
    }


def markdown(talk: Talk, titles: Mapping[str, str]) -> str:
    """The talk as a Markdown document. What people and models wrote stands in fenced blocks, letter by letter, and is
    never read as Markdown or HTML. titles: column → what to call it."""
    lines = [
        f"# Talk of {moment(talk.created)}",
        "",
        f"- Asked by: {_plain(talk.who)} ({_plain(talk.role)})",
        f"- Talk: {_plain(talk.id)}",
    ]
    lines += [f"- {name}: {_plain(value)}" for name, value in (("Export", talk.export), ("From", talk.source)) if value]
    lines += ["", "| Column | File | SHA-256 |", "|---|---|---|"]
    for column in talk.columns:
        cells = (titles.get(column, column), column, talk.files.get(column, ""))
        lines.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    if talk.system:
        lines += ["", "System prompt:", "", *_fenced(talk.system)]
    for number, each in enumerate(talk.rounds, 1):
        lines += ["", f"## Question {number}", "", *_fenced(each.question), "", f"Sampling: {_sampling(each.sampling)}"]
        for answer in each.answers:
            lines += ["", f"### {_plain(titles.get(answer.column, answer.column))}", ""]
            lines += [*_fenced(answer.text), ""] if answer.text else []
            lines.append(_ending(answer))
    return "\n".join(lines) + "\n"


def ending(answer: Answer) -> str:
    """How an answer ended, in words; "" while it has not."""
    if answer.state == "failed":
        return "failed"
    if answer.state == "stopped" or answer.finish == "stopped":
        return "stopped"
    if answer.state != "done":
        return ""
    return "cut at the limit" if answer.finish == "length" else "ended by itself"


def measured(answer: Answer) -> list[str]:
    """Speed and length of an answer, in words; what is not known is left out."""
    speed, first = answer.tokens_per_second, answer.first_token_seconds
    return [
        *([f"{speed:.3g} tokens/s"] if speed is not None else []),
        *([f"first token after {first:.2g} s"] if first is not None else []),
        *([f"{answer.tokens:,} token{'s' if answer.tokens != 1 else ''}"] if answer.tokens else []),
    ]


def _sampling(sampling: Sampling) -> str:
    values = msgspec.to_builtins(sampling)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _ending(answer: Answer) -> str:
    said = ", ".join([ending(answer) or f"not ended ({answer.state})", *measured(answer)])
    note = f": {_plain(answer.note)}" if answer.note else ""
    return f"*{said}*{note}"


def _fenced(text: str) -> list[str]:
    """As a fenced block, whose fence is longer than any run of backticks in the text."""
    # A carriage return alone would end a line too, and a control character is nothing to show.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return [f"{fence}text", *text.split("\n"), fence]


def _plain(text: str) -> str:
    """A few words within a line: every sign that Markdown could read is escaped, so that nothing is marked up, linked
    or taken for the end of a table's cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&@:$]|\.(?=\S))", r"\\\1", " ".join(text.split()))
