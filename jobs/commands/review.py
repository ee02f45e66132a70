"""Words of reviewers: who reviews an export and how far they are, one more verdict, a recommendation."""

import argparse
import secrets
from collections.abc import Sequence

import msgspec

from jobs.commands.terminal import Commands, command, say, show
from katherine import blind, reviews, runs, talks
from katherine.errors import DataError, NotFound
from katherine.reviews import Mark, Recommendation
from katherine.settings import home
from katherine.units import moment

# What the command line knows of its user: whoever has a terminal here may do everything.
ROLE = "operator"


def list_reviews(options: argparse.Namespace) -> None:
    at = home()
    exports = (
        [options.export] if options.export else [run.id for run in runs.everyone(at) if run.record.kind == "export"]
    )
    rows = []
    for export in exports:
        if runs.load(at, export).record.kind != "export":
            raise NotFound(f"Run {export} is not an export.")
        verdicts = reviews.verdicts(at, export)
        given = [reviews.person(each) for each in verdicts]
        words = {reviews.person(each): each for each in reviews.recommendations(at, export)}
        begun = {reviews.person(each): each for each in blind.sessions(at, export)}
        said_by: list[reviews.Person] = [*verdicts, *words.values(), *begun.values()]
        names = {reviews.person(each): each.reviewer for each in said_by}
        for who, name in names.items():
            session, word = begun.get(who), words.get(who)
            courses = session.courses.items() if session else ()
            where = ", ".join(f"{course or 'free talk'} {_place(at_course)}" for course, at_course in courses)
            said = "" if word is None else ("yes" if word.good else "no")
            since = moment(session.created) if session else ""
            rows.append([export, name, who[1], since, given.count(who), where, said])
    if not rows:
        say("Nobody reviews yet. Reviewers do so at /review/ of the panel.")
        return
    show(rows, ["export", "who", "role", "since", "verdicts", "where they are", "recommends it"])


def judge(options: argparse.Namespace) -> None:
    at = home()
    talk = talks.load(at, options.talk)
    if not talk.export:
        raise DataError(f"Talk {talk.id} is not about an export under review, so nobody's verdict on it is kept.")
    marks: dict[str, Mark] = {}
    for given, field in ((options.good, "good"), (options.bad, "bad")):
        for quant in given or ():
            column = _column(talk, quant)
            mark = marks.get(column, Mark())
            marks[column] = Mark(1 if field == "good" else -1, mark.note, mark.rewrite)
    for quant, text in _pairs(options.note):
        mark = marks.get(_column(talk, quant), Mark())
        marks[_column(talk, quant)] = Mark(mark.thumb, text, mark.rewrite)
    for quant, text in _pairs(options.rewrite):
        mark = marks.get(_column(talk, quant), Mark())
        marks[_column(talk, quant)] = Mark(mark.thumb, mark.note, text)
    verdict = reviews.judge(
        at,
        talk,
        round=(options.question or len(talk.rounds)) - 1,
        reviewer=options.who,
        role=ROLE,
        marks=marks,
        preferred=_column(talk, options.prefer) if options.prefer else "",
        tie=options.tie,
        none_good=options.none_good,
    )
    print(verdict.id)


def recommend(options: argparse.Namespace) -> None:
    at, who = home(), reviews.name(options.who)
    column = f"{options.export}:{options.prefer}" if options.prefer else ""
    word = Recommendation(
        secrets.token_hex(8), runs.now(), who, ROLE, options.export, options.word == "yes", column, options.note
    )
    mine = [each for each in reviews.verdicts(at, options.export) if reviews.person(each) == reviews.person(word)]
    word = msgspec.structs.replace(word, judged=len(mine))
    reviews.recommend(at, word)
    print(word.id)


def _place(course: blind.Course) -> str:
    return f"{course.at + 1} of {len(course.questions)}" if course.questions else f"{len(course.talks)} begun"


def _column(talk: talks.Talk, quant: str) -> str:
    for column in talk.columns:
        if quant in (column, column.rpartition(":")[2]):
            return column
    known = ", ".join(column.rpartition(":")[2] for column in talk.columns)
    raise DataError(f"{quant!r} did not answer in talk {talk.id}; these did: {known}.")


def _pairs(given: Sequence[str] | None) -> list[tuple[str, str]]:
    found = []
    for text in given or ():
        quant, equals, words = text.partition("=")
        if not equals:
            raise DataError(f'{text!r} does not say of what: give QUANT=TEXT, as in q4_k_m="too long".')
        found.append((quant, words))
    return found


def register(commands: Commands) -> None:
    p = command(commands, "reviews", list_reviews, "who reviews which export, how far they are, what they recommend")
    p.add_argument("export", nargs="?")

    p = command(
        commands, "verdict", judge, "say what you think of the answers to a question; it replaces what you said"
    )
    p.add_argument("talk")
    p.add_argument("--who", required=True, help="your name")
    p.add_argument("--question", type=int, metavar="N", help="the talk's Nth question (default: the last)")
    better = p.add_mutually_exclusive_group()
    better.add_argument("--prefer", metavar="QUANT")
    better.add_argument("--tie", action="store_true", help="they are equally good")
    better.add_argument("--none-good", action="store_true", help="none of them is good")
    p.add_argument("--good", nargs="+", metavar="QUANT")
    p.add_argument("--bad", nargs="+", metavar="QUANT")
    p.add_argument("--note", action="append", metavar="QUANT=TEXT")
    p.add_argument("--rewrite", action="append", metavar="QUANT=TEXT", help="what it should have said")

    p = command(commands, "recommend", recommend, "say whether an export may go out; it replaces what you said")
    p.add_argument("export")
    p.add_argument("word", choices=("yes", "no"))
    p.add_argument("--who", required=True, help="your name")
    p.add_argument("--prefer", metavar="QUANT", help="the one you would take")
    p.add_argument("--note", default="")
