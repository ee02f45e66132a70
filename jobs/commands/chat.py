"""Talking to columns on the terminal, one answer under another, and making the file of a bare base."""

import argparse
import sys
import time
from contextlib import closing
from typing import TextIO

from jobs.asking import Asking
from jobs.commands.terminal import Commands, command, done, say
from jobs.pool import Pool
from katherine import columns, runs, talks
from katherine.columns import Column
from katherine.errors import KatherineError, NotFound
from katherine.rendering import Renderer
from katherine.settings import Home, home
from katherine.talks import OVER, Answer, Sampling

# Often enough that words seem to flow; the answers themselves come from memory.
_LOOK = 0.05


def chat(options: argparse.Namespace) -> None:
    at = home()
    chosen = _columns(at, options.columns)
    talk = talks.create(
        at,
        who="command line",
        role="operator",
        files={column.id: column.sha256 for column in chosen},
        sampling=Sampling(seed=options.seed, temperature=options.temperature),
        system=options.system,
    )
    titles = {column.id: _title(column, chosen) for column in chosen}
    renderer, pool = Renderer(at), Pool(at)
    with closing(renderer), closing(pool), closing(Asking(at, pool, renderer)) as asking:
        if options.once is not None:
            if not _ask(asking, talk.id, options.once, titles):
                raise KatherineError("Not every column has answered.")
            return
        say(f"Talk {talk.id}. An empty line ends it; Ctrl-C ends an answer.")
        while question := _line(sys.stdin):
            try:
                _ask(asking, talk.id, question, titles)
            except KeyboardInterrupt:
                asking.stop(talk.id)
                print()


def _columns(at: Home, named: list[str]) -> list[Column]:
    """Columns by their ids, and of an export all that it offers."""
    found: dict[str, Column] = {}
    for name in named:
        those = [columns.get(at, name)] if ":" in name else columns.of_export(at, runs.load(at, name))
        if not those:
            raise NotFound(f"{name} offers no file to talk to: is it an export, and has it succeeded?")
        found |= {column.id: column for column in those}
    return list(found.values())


def _title(column: Column, chosen: list[Column]) -> str:
    several = len({each.export for each in chosen if each.export}) > 1
    title = columns.title(column)
    return f"{title} of {column.export}" if several and column.export else title


def _line(source: TextIO) -> str:
    if source.isatty():
        print("\n> ", end="", flush=True)
    try:
        return source.readline().strip()
    except KeyboardInterrupt:
        return ""


def _ask(asking: Asking, talk_id: str, question: str, titles: dict[str, str]) -> bool:
    """Prints the answers as they come, one column after another; whether all of them ended well."""
    asking.ask(talk_id, question)
    well = True
    for number, title in enumerate(titles.values()):
        print(f"\n[{title}]")
        answer = _follow(asking, talk_id, number)
        well = well and answer.state == "done"
    return well


def _follow(asking: Asking, talk_id: str, number: int) -> Answer:
    shown, noted = 0, ""
    while True:
        answer = asking.view(talk_id).rounds[-1].answers[number]
        print(answer.text[shown:], end="", flush=True)
        shown = len(answer.text)
        if answer.note and answer.note != noted:
            noted = answer.note
            say(f"({noted})")
        if answer.state in OVER:
            print()
            words = [answer.state, *([talks.ending(answer)] if answer.state == "done" else []), *talks.measured(answer)]
            say(f"({', '.join(words)})")
            return answer
        time.sleep(_LOOK)


def make_base(options: argparse.Namespace) -> None:
    at = home()
    print(done(at, "base", {"export": options.export})["column"])


def register(commands: Commands) -> None:
    usual = Sampling()
    p = command(commands, "chat", chat, "talk to files of exports, side by side")
    p.add_argument("columns", nargs="+", metavar="EXPORT_OR_COLUMN", help="all files of an export, or RUN:q4_k_m")
    p.add_argument("--system", default="", help="a system prompt, to try to break the persona")
    p.add_argument("--seed", type=int, default=usual.seed, help="the same for every column (default: %(default)s)")
    p.add_argument(
        "--temperature", type=float, default=usual.temperature, help="0: the likeliest word (default: %(default)s)"
    )
    p.add_argument("--once", metavar="QUESTION", help="ask this and end")

    p = command(commands, "base", make_base, "make the bare base of an export into a file to talk to")
    p.add_argument("export")
