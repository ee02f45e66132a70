"""What every word needs: to be entered, to have something done, and to say something. Results go to stdout, remarks to
stderr."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs import errands
from katherine.errors import KatherineError
from katherine.runs import ENDED, State
from katherine.settings import Home

# What argparse gives for adding words to; its class has no public name.
Commands = Any


def command(commands: Commands, name: str, action: Any, text: str) -> argparse.ArgumentParser:
    """A word of the command line: `action(options)` carries it out."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    added.set_defaults(action=action)
    return added


def say(text: str) -> None:
    """Progress and remarks go to stderr, so that --json stays one object on stdout."""
    print(text, file=sys.stderr, flush=True)


def show(rows: Sequence[Sequence[Any]], heads: Sequence[str]) -> None:
    """A plain table on stdout, columns as wide as their widest cell."""
    cells = [[str(c) for c in row] for row in [heads, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def figure(value: float | None, form: str) -> str:
    """A number in a format, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def done(home: Home, kind: str, request: dict[str, Any], who: str = "command line") -> dict[str, Any]:
    """Have an errand carried out, saying where it is; what came of it. Raises KatherineError where it did not succeed,
    in its own words."""
    errand = errands.start(home, kind, request, who)
    said = ""
    while (status := errands.wait(home, errand.id, timeout=1)).state not in ENDED:
        steps = f", {status.step} of {status.of}" if status.of else ""
        if (now := status.phase + steps) != said:
            said = now
            say(now)
    if status.state is not State.succeeded:
        raise KatherineError(f"{status.reason} {status.remedy}".strip())
    return errand.result()
