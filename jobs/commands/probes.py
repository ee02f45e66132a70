"""Words on probes: probe asks a set of an export's files, probes lists sets and shows what came of a run."""

import argparse
import sys
from pathlib import Path

from jobs import demo, pipeline
from jobs.commands.terminal import Commands, command, say, show
from katherine import drafts, probes, probesets, recipe, runs, scorecard
from katherine.errors import KatherineError, NotFound
from katherine.scorecard import Difference, Scorecard
from katherine.settings import Home, home


def probe(options: argparse.Namespace) -> None:
    at = home()
    export = runs.load(at, options.export)
    preset = recipe.preset(options.preset, recipe.ProbeRecipe, home=at) if options.preset else None
    values = (preset or drafts.load(at).recipe("probe")).model_dump(mode="json")
    values |= {"own": True, "quants": [], "columns": [], "stages": options.stages}
    if options.set:
        values["probes"] = options.set
    if options.columns:
        values |= probes.asked_of(at, export, options.columns)
    (run,) = pipeline.start_on(at, export.id, {"probe": values}, "command line")
    print(run.id)
    if options.follow:
        demo.follow(at, run, say)
        results(at, run.id, None)


def list_probes(options: argparse.Namespace) -> None:
    at = home()
    if options.check:
        found = probesets.read(_text(at, options.check), options.check)
        open_ones = sum(not each.has_rule for each in found.probe)
        print(f"{options.check}: {len(found.probe)} probes can be asked, {open_ones} of them for the reviewer")
    elif options.save:
        name, path = options.save
        found = probesets.save(at, name, _text(at, path))
        print(f"{name}: {len(found.probe)} probes, in {probesets.folder(at)}")
    elif options.delete:
        probesets.remove(at, options.delete)
    elif options.text:
        sys.stdout.write(probesets.text(at, options.text))
    elif options.run is None:
        show([_listed(at, name) for name in probesets.names(at)], ["set", "probes", "of them for the reviewer", ""])
    elif options.csv:
        for line in scorecard.as_csv(_card(at, options.run)):
            sys.stdout.write(line)
    elif options.answers:
        answers(_card(at, options.run), options.answers)
    else:
        results(at, options.run, options.against)


def _text(at: Home, path: str) -> str:
    """Of a file by its path, or of a set by its name."""
    return probesets.text(at, path if path in probesets.names(at) else str(Path(path).absolute()))


def _listed(at: Home, name: str) -> list[str | int]:
    try:
        found = probesets.load(at, name)
    except KatherineError as error:
        return [name, "", "", f"damaged: {str(error).splitlines()[0]}"]
    return [name, len(found.probe), sum(not each.has_rule for each in found.probe), found.description]


def _card(at: Home, run_id: str) -> Scorecard:
    run = runs.load(at, run_id)
    if run.record.kind != "probe":
        raise NotFound(f"Run {run_id} is of kind {run.record.kind}: name a probe run.")
    return scorecard.read(run)


def results(at: Home, run_id: str, against: str | None) -> None:
    """Rates by category, every probe, and what differs."""
    card = _card(at, run_id)
    if not card.rows:
        say(f"Run {run_id} has no answer yet.")
        return
    heads = [scorecard.named(model) for model in card.models]
    rows = [["all", *(card.rate(model).words() for model in card.models)]]
    rows += [[name, *(card.rate(model, name).words() for model in card.models)] for name in card.categories]
    show(rows, ["passed, 95% range", *heads])
    print()
    verdicts = [
        [row.id, row.category, *(scorecard.verdict(row.answers.get(model)) for model in card.models)]
        for row in card.worst_first()
    ]
    show(verdicts, ["probe", "category", *heads])
    if found := card.differences():
        print()
        show([_difference(each) for each in found], ["columns", "in common", "only the first", "only the second", ""])
    if against:
        print()
        past = _card(at, against)
        for words in card.asked_otherwise(past):
            print(f"then asked otherwise: {words}")
        show(
            [[scorecard.named(each.second), each.both, each.passed_first, each.passed_second, _those(each.only_first),
              _those(each.only_second), each.words()] for each in card.against(past)],
            ["column", "in common", f"passed in {against}", "now", "failed since", "passed since", ""],
        )  # fmt: skip


def answers(card: Scorecard, probe_id: str) -> None:
    row = card.row(probe_id)
    if row is None:
        raise NotFound(f"Run {card.run.id} has no answer to {probe_id!r}.")
    for rule in scorecard.rules_of(row):
        print(f"asked of each answer: {rule}")
    for model in card.models:
        if (answer := row.answers.get(model)) is None:
            continue
        print(f"\n--- {scorecard.named(model)}: {scorecard.verdict(answer)}")
        for message in answer.talk:
            print(f"{message.role}: {message.content}")
        for reason in answer.score.reasons:
            print(f"  {reason}")


def _difference(each: Difference) -> list[str | int]:
    columns = f"{scorecard.named(each.first)} and {scorecard.named(each.second)}"
    return [columns, each.both, _those(each.only_first), _those(each.only_second), each.words()]


def _those(ids: tuple[str, ...]) -> str:
    return f"{len(ids)}: {', '.join(ids)}" if ids else "none"


def register(commands: Commands) -> None:
    p = command(commands, "probe", probe, "ask a probe set of an export's files, and of others beside them")
    p.add_argument("export", metavar="EXPORT", help="the run whose files are asked")
    p.add_argument("--set", metavar="NAME_OR_PATH", help="(default: the set of the Recipe tab)")
    p.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="only these: a quant of the export, RUN:quant of another, base:NAME (default: all of the export's own)",
    )
    p.add_argument("--stages", action="store_true", help="the base and the adapters too, on the probes marked compare")
    p.add_argument("--preset", help="settings of this preset instead of the Recipe tab's")
    p.add_argument("--follow", action="store_true", help="wait for it, then show what came of it")

    p = command(commands, "probes", list_probes, "list the probe sets, or show what came of a probe run")
    p.add_argument("run", nargs="?", help="a probe run: pass rates with their range, and every probe")
    p.add_argument("--against", metavar="RUN", help="what changed since this probe run")
    p.add_argument("--answers", metavar="PROBE", help="every answer to this probe, with what decided")
    p.add_argument("--csv", action="store_true", help="every answer of the run as CSV")
    p.add_argument("--check", metavar="NAME_OR_PATH", help="say whether a set can be asked, or what is wrong with it")
    p.add_argument("--text", metavar="NAME", help="print a set as text")
    p.add_argument("--save", nargs=2, metavar=("NAME", "PATH"), help="keep the text of a file, or of a set, as a set")
    p.add_argument("--delete", metavar="NAME", help="delete a set; runs keep their own copy")
