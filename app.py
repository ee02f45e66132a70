"""The command line: the panel, and the words of jobs.commands."""

import argparse
import gc
import importlib
import logging
import sys
from collections.abc import Sequence

from jobs.commands import (
    approval,
    chat,
    datasets,
    machine,
    probes,
    publish,
    recipes,
    review,
    runs,
    talks,
    verdicts,
)
from jobs.commands.terminal import command, say
from katherine.errors import KatherineError
from katherine.settings import hide_secrets, home

# In the order of the work.
WORDS = (datasets, recipes, runs, chat, talks, probes, review, verdicts, approval, publish, machine)


def serve(options: argparse.Namespace) -> None:
    # What is imported and built for the panel stays: a tenth of the start went by looking for garbage in it.
    gc.disable()
    # Here, since Gradio takes two seconds to import, and no other word needs it.
    from ui import server

    server.serve(home(), options.port, new_passwords=options.new_passwords)


# A word of `bench` → its module, which has a main of its own.
BENCHES = {"make-base": "base", **dict.fromkeys(("corpus", "panel", "chat", "export", "gpu", "past"))}


def bench(options: argparse.Namespace) -> None:
    module = importlib.import_module(f"bench.{BENCHES[options.what] or options.what}")
    sys.exit(module.main(options.arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="app.py", description="Train, export, probe, approve and push a persona.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    p = command(commands, "serve", serve, "the panel in the browser; what app.py does when no command is named")
    p.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    p.add_argument("--new-passwords", action="store_true", help="make new ones, and show them once")
    p = command(commands, "bench", bench, "measure: what is reached here, against a baseline in the same run")
    p.add_argument("what", choices=BENCHES)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="as `python -m bench.WHAT --help` says")
    for area in WORDS:
        area.register(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given or ["serve"])
    logging.basicConfig(level=logging.WARNING)
    try:
        options.action(options)
    except KatherineError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    hide_secrets()
    sys.exit(main())
