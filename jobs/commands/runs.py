"""Words on runs: start, rerun, runs, log, follow, stop, resume."""

import argparse
import json
from typing import Any

from jobs import demo, pipeline, queue
from jobs.commands.recipes import settings_of
from jobs.commands.terminal import Commands, command, say, show
from katherine import (
    comparison,
    corpus,
    lineage,
    logs,
    recipe,
    runs,
)
from katherine.errors import RecipeError
from katherine.history import History
from katherine.settings import Home, home


def start(options: argparse.Namespace) -> None:
    at = home()
    above = runs.load(at, options.on) if options.on else None
    after = pipeline.ORDER.index(above.record.kind) + 1 if above else 0
    stages = options.stages or pipeline.ORDER[after:]
    if above is None and options.dataset is None:
        raise RecipeError(["Say on which dataset, or with --on RUN on which run, to start."])
    if above is None and "sft" not in stages:
        raise RecipeError(["A pipeline begins with sft: name it among the stages, or the run to go on from: --on RUN."])
    if unused := [text for text in options.set or [] if text.partition(".")[0] not in stages]:
        raise RecipeError([f"--set {text} is for a stage that is not started." for text in unused])
    chosen: dict[str, Any] = {
        stage: recipe.preset(options.preset, model, settings_of(options, stage), at).model_dump(mode="json")
        for stage, model in recipe.KINDS.items()
        if stage in stages
    }
    dataset = corpus.load(at, options.dataset).id if options.dataset else None
    if above:
        queued = pipeline.start_on(at, above.id, chosen, "command line", dataset)
    else:
        assert dataset is not None
        everything: dict[str, Any] = dict.fromkeys(recipe.KINDS) | chosen
        queued = pipeline.start(at, dataset, who="command line", **everything)
    for run in queued:
        print(run.id)


def rerun(options: argparse.Namespace) -> None:
    kind = runs.load(home(), options.run).record.kind
    if unused := [text for text in options.set or [] if text.partition(".")[0] != kind]:
        raise RecipeError([f"--set {text} is not for {kind}, which run {options.run} is." for text in unused])
    print(pipeline.again(home(), options.run, settings_of(options, kind), who="command line").id)


def list_runs(options: argparse.Namespace) -> None:
    at = home()
    queue.reconcile(at)
    known = History(at)
    if options.compare:
        compare_runs(comparison.compare(known, *options.compare), options.json)
        return
    if options.run:
        show_run(at, known, options.run, options.json)
        return
    if options.json:
        print(json.dumps([comparison.facts(known, seen) for seen in reversed(known.runs())], ensure_ascii=False))
        return
    rows = []
    for seen in reversed(known.runs()):
        record, status = seen.run.record, seen.status
        if seen.damage:
            rows.append([seen.id, "damaged", "", "", "", record.dataset or "", seen.damage])
            continue
        steps = f"{status.step} of {status.of}" if status.of else ""
        came = known.outcome(seen).words()
        rows.append([seen.id, status.state, status.phase, steps, came, record.dataset or "", status.reason])
    show(rows, ["run", "state", "phase", "steps", "result", "dataset", "reason"])


def show_run(at: Home, known: History, run_id: str, as_json: bool) -> None:
    """One run: what was asked and how that differs from a preset, what came, and its lineage."""
    seen = known.get(run_id)
    facts = comparison.facts(known, seen)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    told = ("id", "kind", "state", "result", "reason", "remedy", "dataset", "parent", "who", "created", "revision")
    for name in told:
        if facts[name]:
            print(f"{name}: {facts[name]}")
    preset, values = comparison.nearest_preset(at, seen.run.record)
    rows = [
        [name, comparison.text(value), "" if value == values.get(name) else comparison.text(values.get(name))]
        for name, value in seen.run.record.recipe.items()
    ]
    print()
    show(rows, ["recipe", "value", f"where {preset} differs"])
    print()
    show([[name, comparison.text(value)] for name, value in facts["figures"].items()], ["result", "value"])
    print()
    for line in lineage.trace(at, known, run_id).lines():
        print(line)


def compare_runs(found: comparison.Comparison, as_json: bool) -> None:
    if as_json:
        parts = {"asked": found.asked, "versions": found.versions, "results": found.results}
        said = {name: {pair.name: [pair.a, pair.b] for pair in pairs} for name, pairs in parts.items()}
        print(json.dumps({"a": found.a.id, "b": found.b.id, "equal": found.equal} | said, indent=2, ensure_ascii=False))
        return
    for title, pairs in (("what differs", (*found.asked, *found.versions)), ("result", found.results)):
        show([[pair.name, comparison.text(pair.a), comparison.text(pair.b)] for pair in pairs],
             [title, found.a.id, found.b.id])  # fmt: skip
        print()
    print(f"{found.equal} of the recipes' values are the same.")


def log(options: argparse.Namespace) -> None:
    """The end of a run's log, or every line that holds a text, with its number."""
    run = runs.load(home(), options.run)
    if options.search is None:
        for line in logs.tail(run, options.lines):
            print(line)
        return
    start: int | None = 1
    while start is not None:
        found = logs.search(run, options.search, start=start)
        for each in found.lines:
            print(f"{each.number}: {each.text}")
        start = found.next


def register(commands: Commands) -> None:
    p = command(commands, "start", start, "queue the pipeline on a dataset: SFT, DPO, export, probes")
    p.add_argument("dataset", nargs="?", help="with --on, by default the dataset of that run")
    p.add_argument("--on", metavar="RUN", help="go on from this run, e.g. --stages dpo --on an SFT run")
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--stages", nargs="+", choices=recipe.KINDS, help="(default: all that come after --on)")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command(commands, "rerun", rerun, "start a run again, with changes: same kind, parent and dataset")
    p.add_argument("run")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command(commands, "runs", list_runs, "list all runs, show one, or compare two")
    p.add_argument("run", nargs="?", help="show this one: its recipe, result and lineage")
    p.add_argument("--compare", nargs=2, metavar="RUN", help="what differs between two, and both results")
    p.add_argument("--json", action="store_true")
    p = command(commands, "log", log, "the last lines of a run's log, or a search in all of it")
    p.add_argument("run")
    p.add_argument("--lines", type=int, default=40, help="(default: %(default)s)")
    p.add_argument("--search", metavar="TEXT", help="every line with this text in it, whatever its case")

    for name, action, text in (
        ("follow", lambda o: demo.follow(home(), runs.load(home(), o.run), say), "wait for a run, saying where it is"),
        ("stop", lambda o: print(queue.stop(home(), o.run, kill=o.kill).state), "stop a run and keep what it has"),
        ("resume", lambda o: print(queue.resume(home(), o.run).status().state), "go on from its newest checkpoint"),
    ):
        p = command(commands, name, action, text)
        p.add_argument("run")
        if name == "stop":
            p.add_argument("--kill", action="store_true", help="at once; work since the last checkpoint is lost")
