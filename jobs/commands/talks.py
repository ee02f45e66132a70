"""Words on talks: list them, read one, remove one. Talking is `chat`'s."""

import argparse
import json

from jobs.commands.terminal import Commands, command, show
from katherine import talks
from katherine.settings import home
from katherine.units import moment

# Of a first question, so that a talk stays on one line.
SHOWN = 60


def list_talks(options: argparse.Namespace) -> None:
    at = home()
    if options.remove:
        talks.remove(at, options.remove)
        return
    if options.talk:
        talk = talks.load(at, options.talk)
        titles = talks.titles(at, talk)
        if options.json:
            print(json.dumps(talks.transcript(talk, titles), indent=2, ensure_ascii=False))
        else:
            print(talks.markdown(talk, titles), end="")
        return
    found = talks.everyone(at, options.role)
    if options.json:
        print(json.dumps([talks.transcript(talk, talks.titles(at, talk)) for talk in found], ensure_ascii=False))
        return
    rows = []
    for talk in found:
        first = " ".join(talk.rounds[0].question.split()) if talk.rounds else ""
        shown = first if len(first) <= SHOWN else f"{first[: SHOWN - 1]}…"
        rows.append([talk.id, moment(talk.created), talk.role, len(talk.rounds), len(talk.columns), shown])
    show(rows, ["talk", "begun", "who", "questions", "columns", "first question"])


def register(commands: Commands) -> None:
    p = command(commands, "talks", list_talks, "list the talks, show one as Markdown or JSON, or remove one")
    p.add_argument("talk", nargs="?", help="show this one")
    p.add_argument("--json", action="store_true", help="with everything that was measured")
    p.add_argument("--role", choices=("operator", "reviewer"), help="only theirs")
    p.add_argument("--remove", metavar="TALK", help="for good; verdicts on it stay")
