"""A talk: one question after another put to several columns side by side, each with its own memory of it. Owns what is
kept of it and how it reads as a transcript; who answers is jobs.asking's, what a person thinks of it reviews'.

    KATHERINE_HOME/talks/<id>.json    replaced whole
"""

import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from katherine import runs
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.settings import Home

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


class Answer(msgspec.Struct, frozen=True):
    """What one column said. note: why it waits or failed, in words. finish: as engines.Finish has it, "" before the end.
    tokens: generated. seconds: from the question reaching the engine to the last token. first_token_seconds: same
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
