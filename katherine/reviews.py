"""What people think of an export's answers: verdicts and recommendations, each line as it was given. Owns their files;
what follows from them is judgement's and feedback's, approving an export is approval's.

    KATHERINE_HOME/reviews/<export>/verdicts.jsonl  recommendations.jsonl    appended to, never changed
"""

import msgspec

from katherine.examples import Message


class Judged(msgspec.Struct, frozen=True):
    """One answer and what was thought of it. column, quant, sha256: which file gave it. before: all that this column
    had been told, ending with the question. thumb: -1, 0 (none) or 1. rewrite: what to say instead, "" for none."""

    column: str
    quant: str
    sha256: str
    before: tuple[Message, ...]
    text: str
    thumb: int = 0
    note: str = ""
    rewrite: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """One person's view of one question. order: the columns as they were shown, first to last. preferred: a column, or
    "" where none was chosen. tie: they were said to be equally good. The last of a reviewer, talk and round counts."""

    id: str
    time: str
    reviewer: str
    role: str
    export: str
    talk: str
    round: int
    source: str
    question: str
    order: tuple[str, ...]
    answers: tuple[Judged, ...]
    preferred: str = ""
    tie: bool = False


class Recommendation(msgspec.Struct, frozen=True):
    """One person's last word on an export. good: whether it may go out. column: the one they would take, or "" for no
    preference. judged: verdicts of theirs at that time. The last of a reviewer counts."""

    id: str
    time: str
    reviewer: str
    role: str
    export: str
    good: bool
    column: str = ""
    note: str = ""
    judged: int = 0
