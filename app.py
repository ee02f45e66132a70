"""The command line. Each command is a few lines over `katherine` and `jobs`; nothing is decided here."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import autostop, demo, errands, pipeline, queue
from katherine import (
    bases,
    browse,
    comparison,
    corpus,
    doctor,
    drafts,
    estimate,
    hardware,
    lineage,
    prices,
    recipe,
    rendering,
    runs,
    shelf,
    targets,
    units,
    yardstick,
)
from katherine.errors import KatherineError, PriceError, RecipeError
from katherine.history import History
from katherine.settings import Home, home
from katherine.template import ChatTemplate

# As many as a person reads on a screen; the report has them all.
SHOWN_PROBLEMS = 40


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


def prepare(options: argparse.Namespace) -> None:
    at = home()
    base, remark = bases.counting(at, options.base)
    if remark:
        say(remark)
    choices: dict[str, Any] = {
        "include_uncurated": options.pairs or options.uncurated,
        "leave_out": options.leave_out or (),
        "template": ChatTemplate.load(bases.tokenizer(at, base)),
        "base": base,
        "max_length": options.max_length,
        "name": options.name,
    }
    if options.again:
        dataset = corpus.change(at, options.again, **choices)
    else:
        dataset = corpus.prepare(options.paths, at, **choices)
    report = dataset.report
    if options.json:
        json.dump(report, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    for problem in report["problems"][:SHOWN_PROBLEMS]:
        place = problem["file"] or "the whole dataset"
        line = "" if problem["line"] is None else f", line {problem['line']}"
        say(f"{problem['severity']}: {place}{line}: {problem['reason']}")
    if (more := len(report["problems"]) - SHOWN_PROBLEMS) > 0:
        say(f"and {more} more: all are in {dataset.path / 'report.json'}")
    show(
        [[name, *(part.get(k, "") for k in ("unique", "curated", "uncurated", "used", "duplicates", "rejected"))]
         for name, part in (("SFT", report["sft"]), ("DPO", report["dpo"]))],
        ["", "unique", "curated", "uncurated", "used", "duplicates", "rejected"],
    )  # fmt: skip
    tokens = report["tokens"]
    print(f"{report['files']} files, {report['lines']} lines")
    print(
        f"tokens of {tokens['base']}: p50 {tokens['p50']}, p90 {tokens['p90']}, p99 {tokens['p99']}, "
        f"max {tokens['max']}; {tokens['over_max_length']} over {tokens['max_length']}"
    )
    print(f"dataset {dataset.id} in {dataset.path}")


def list_datasets(options: argparse.Namespace) -> None:
    at = home()
    if options.delete:
        shelf.remove(at, options.delete)
        return
    if options.compare:
        found = shelf.compare(at, *options.compare)
        show(
            [["SFT", found.sft.only_first, found.sft.both, found.sft.only_second],
             ["DPO", found.dpo.only_first, found.dpo.both, found.dpo.only_second]],
            ["examples", f"only in {found.first.id}", "in both", f"only in {found.second.id}"],
        )  # fmt: skip
        for name, (first, second) in found.options.items():
            print(f"{name}: {first} against {second}")
        return
    rows = []
    for one in shelf.everyone(at):
        report = one.report
        problems = sum(group["count"] for group in report["problem_groups"])
        counts = [report["files"], report["sft"]["unique"], report["dpo"]["used"], problems]
        rows.append([one.id, one.created[:16], *counts])
    show(rows, ["dataset", "made", "files", "SFT", "pairs", "problems"])


def examples(options: argparse.Namespace) -> None:
    """Examples as training sees them: what is learned stands between ⟦ and ⟧."""
    at = home()
    dataset = shelf.summary(at, options.dataset)
    base, remark = bases.counting(at, dataset.base or recipe.SftRecipe.model_fields["base"].default)
    if remark:
        say(remark)
    template = ChatTemplate.load(bases.tokenizer(at, base))
    # A terminal can wait: one call looks through everything.
    page = browse.page(dataset.path, options.kind, search=options.search, count=options.count, budget=math.inf)
    for found in page.found:
        rendered = rendering.render(found.example, template)
        print(f"--- {options.kind} {found.number}: {rendered.tokens or 'too many'} tokens of {base}")
        for name, pieces in rendered.parts.items():
            texts = (f"⟦{piece.text}⟧" if piece.learned else piece.text for piece in pieces)
            print(("" if name == "conversation" else f"{name}: ") + "".join(texts))
    if not page.found:
        say("No example holds that." if options.search else f"This dataset has no {options.kind} examples.")


def fetch(options: argparse.Namespace) -> None:
    at = home()
    errand = errands.start(at, "fetch", {"path": options.path}, "command line")
    said = ""
    while (status := errands.wait(at, errand.id, timeout=1)).state not in runs.ENDED:
        steps = f", {status.step} of {status.of} MB" if status.of else ""
        if (now := status.phase + steps) != said:
            said = now
            say(now)
    if status.state is not runs.State.succeeded:
        raise KatherineError(f"{status.reason} {status.remedy}".strip())
    print(at.inbox / errand.result()["folder"])


def explain(options: argparse.Namespace) -> None:
    """What a recipe's values are and why, which modules it reaches, and how many steps it makes."""
    at = home()
    model = recipe.KINDS[options.stage]
    made = recipe.preset(options.preset, model, settings_of(options, options.stage), at)
    if options.json:
        print(made.model_dump_json(indent=2))
        return
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(made, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        limits = recipe.bounds(model, name)
        print(f"{name} = {shown} {extra['unit']}".rstrip() + (f"  ({limits})" if limits else ""))
        print(f"    {field.description} Source: {extra['source']}.")
    if options.dataset and isinstance(made, recipe.SftRecipe | recipe.DpoRecipe):
        print(made.steps_explained(yardstick.examples(estimate.counted(at, options.dataset), made)))
    if isinstance(made, recipe.SftRecipe):
        for line in targets.matches(bases.configuration(at, made.base), made.target_modules).lines(made.lora_r):
            print(line)


def settings_of(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """--set stage.name=value as values; a value is JSON where it parses as such, else text."""
    values = {}
    for text in options.set or []:
        name, found, value = text.partition("=")
        prefix, dot, field = name.partition(".")
        if not (found and dot) or prefix not in recipe.KINDS:
            raise RecipeError([f"--set {text} is not stage.field=value, such as sft.learning_rate=1e-4."])
        if prefix == stage:
            try:
                values[field] = json.loads(value)
            except ValueError:
                values[field] = value
    return values


def reckon(options: argparse.Namespace) -> None:
    """What a pipeline will take, here and on each kind of GPU with a price."""
    at = home()
    values = {
        stage: recipe.preset(options.preset, model, settings_of(options, stage), at).model_dump(mode="json")
        for stage, model in recipe.KINDS.items()
    }
    dataset = corpus.load(at, options.dataset).id
    plan = estimate.plan(at, drafts.Draft(dataset, options.preset, values, tuple(options.stages)))
    for sentence in (*plan.explained, *plan.remarks):
        print(sentence)
    show(
        [[each.machine.name,
          estimate.words(each.seconds, estimate.roughly, bool(each.missing)),
          estimate.words(each.memory, estimate.gib),
          estimate.words(each.dollars, units.dollars, bool(each.missing)),
          each.learned or ""] for each in plan.estimates],
        ["machine", "time", "GPU memory", "cost", "runs learned from"],
    )  # fmt: skip
    for each in plan.estimates:
        for warning in each.warnings:
            print(f"{each.machine.name}: {warning}")
    if plan.disk:
        print(f"disk: {units.size(plan.disk.needed)} at the fullest, {units.size(plan.disk.free)} free")


def price_list(options: argparse.Namespace) -> None:
    at = home()
    for text in options.set or []:
        kind, found, dollars = text.partition("=")
        if not found:
            raise PriceError(f'--set {text} is not kind=dollars, such as "H200 SXM=3.79".')
        prices.enter(at, kind.strip(), dollars, hardware.here().gpu)
    for kind in options.forget or []:
        prices.forget(at, kind)
    pod = prices.this_pod(at)
    listed = [*([pod] if pod else []), *prices.listed(at).values()]
    show([[p.kind, f"{p.dollars:.2f}", p.dated or "", p.source] for p in listed], ["kind", "$ an hour", "of", "source"])


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


def run_demo(options: argparse.Namespace) -> None:
    result = demo.run(home(), say)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    show(
        [[stage, result[stage]["steps"], f"{result[stage]['first_loss']:.4f}", f"{result[stage]['last_loss']:.4f}",
          result["seconds"][stage]] for stage in ("sft", "dpo")],
        ["stage", "steps", "first loss", "last loss", "seconds"],
    )  # fmt: skip
    print(f"DPO margin: {result['dpo']['first_margin']:.3f} → {result['dpo']['last_margin']:.3f}\n")
    show(
        [[f["quant"], f"{f['bytes'] / 1e6:.0f} MB", figure(f["bits_per_weight"], ".2f"),
          "yes" if f["accepted"] else "NO",
          figure(f["perplexity"], ".3f"), figure(f["kl"], ".4f"), figure(f["top1"], ".1%")] for f in result["export"]],
        ["quant", "size", "bits/weight", "accepted", "perplexity", "KL", "top-1"],
    )  # fmt: skip
    print()
    show([[m, f"{p['passed']} of {p['asked']}"] for m, p in result["probes"].items()], ["model", "probes passed"])
    for question, answers in result["answers"].items():
        print(f"\n{question}")
        for model, text in answers.items():
            print(f"  {model:>8}: {' '.join(text.split())}")
    print("\nseconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result["seconds"].items()))


def stop_pod_when_done(options: argparse.Namespace) -> None:
    at = home()
    if options.action_asked == "cancel":
        print(autostop.words(autostop.cancel(at, "the command line")))
        return
    if options.action_asked != "status":
        autostop.configure(at, options.action_asked == "on", options.minutes)
    print(autostop.words(autostop.view(at)))


def examine(options: argparse.Namespace) -> None:
    checks = doctor.examine(home())
    show([[c.state, c.name, c.finding] for c in checks], ["", "what", "finding"])
    for check in checks:
        if check.remedy:
            print(f"{check.name}: {check.remedy}")
    if any(check.state == "problem" for check in checks):
        raise SystemExit(1)


def serve(options: argparse.Namespace) -> None:
    # Here, since Gradio takes two seconds to import, and no other word needs it.
    from ui import server

    server.serve(home(), options.port, new_passwords=options.new_passwords)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="app.py", description="Train, export and probe a persona.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(action=action)
        return added

    p = command("serve", serve, "the panel in the browser; what app.py does when no command is named")
    p.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    p.add_argument("--new-passwords", action="store_true", help="make new ones, and show them once")

    base = recipe.SftRecipe.model_fields["base"].default
    p = command("prepare", prepare, "read JSONL files into a dataset")
    p.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_DIR")
    p.add_argument("--again", metavar="DATASET", help="with other choices from the files of this dataset")
    p.add_argument("--leave-out", nargs="+", metavar="FILE", help="files that do not go in, by name or path")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    p.add_argument("--uncurated", action="store_true", help="use pairs without _cat and _type too")
    p.add_argument("--pairs", nargs="+", metavar="HASH", help="of these pairs only those (hashes: uncurated.jsonl)")
    p.add_argument("--base", default=base, help="whose tokenizer counts (default: %(default)s)")
    p.add_argument("--max-length", type=int, default=recipe.SftRecipe.model_fields["max_length"].default)
    p.add_argument("--name", help="a name for the dataset")

    p = command("datasets", list_datasets, "list the datasets, compare two, or delete one that no run used")
    p.add_argument("--compare", nargs=2, metavar="DATASET")
    p.add_argument("--delete", metavar="DATASET")

    p = command("examples", examples, "show examples of a dataset as training sees them")
    p.add_argument("dataset")
    p.add_argument("--kind", choices=("sft", "dpo"), default="sft")
    p.add_argument("--search", default="", help="only those with this text in them, whatever its case")
    p.add_argument("--count", type=int, default=3, help="(default: %(default)s)")

    p = command("fetch", fetch, "download the JSONL files of a Hugging Face dataset or bucket into the inbox")
    p.add_argument("path", help="owner/name, buckets/owner/name, with a folder or file behind it if needed")

    p = command("recipe", explain, "show a recipe: each value, its reason, its steps and modules")
    p.add_argument("stage", nargs="?", default="sft", choices=recipe.KINDS)
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--dataset", help="predict the steps on this dataset")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")
    p.add_argument("--json", action="store_true")

    p = command("estimate", reckon, "what a pipeline on a dataset will take: steps, time, memory, disk, dollars")
    p.add_argument("dataset")
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--stages", nargs="+", default=list(recipe.KINDS), choices=recipe.KINDS)
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command("prices", price_list, "what an hour of each kind of GPU costs")
    p.add_argument("--set", action="append", metavar="KIND=DOLLARS", help='such as "H200 SXM=3.79"; "this pod" is one')
    p.add_argument("--forget", action="append", metavar="KIND", help="take an entered price back")

    p = command("start", start, "queue the pipeline on a dataset: SFT, DPO, export, probes")
    p.add_argument("dataset", nargs="?", help="with --on, by default the dataset of that run")
    p.add_argument("--on", metavar="RUN", help="go on from this run, e.g. --stages dpo --on an SFT run")
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--stages", nargs="+", choices=recipe.KINDS, help="(default: all that come after --on)")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command("rerun", rerun, "start a run again, with changes: same kind, parent and dataset")
    p.add_argument("run")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command("runs", list_runs, "list all runs, show one, or compare two")
    p.add_argument("run", nargs="?", help="show this one: its recipe, result and lineage")
    p.add_argument("--compare", nargs=2, metavar="RUN", help="what differs between two, and both results")
    p.add_argument("--json", action="store_true")
    for name, action, text in (
        ("follow", lambda o: demo.follow(home(), runs.load(home(), o.run), say), "wait for a run, saying where it is"),
        ("stop", lambda o: print(queue.stop(home(), o.run, kill=o.kill).state), "stop a run and keep what it has"),
        ("resume", lambda o: print(queue.resume(home(), o.run).status().state), "go on from its newest checkpoint"),
    ):
        p = command(name, action, text)
        p.add_argument("run")
        if name == "stop":
            p.add_argument("--kill", action="store_true", help="at once; work since the last checkpoint is lost")

    p = command("demo", run_demo, "the whole pipeline on the sample persona and a small real base")
    p.add_argument("--json", action="store_true")
    command("doctor", examine, "what this machine can do, and what is wrong")

    p = command("autostop", stop_pod_when_done, "stop this RunPod pod when the queue has run empty")
    p.add_argument("action_asked", nargs="?", default="status", choices=("on", "off", "cancel", "status"))
    p.add_argument("--minutes", type=float, help="the countdown, in which anyone can cancel (on)")
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
    sys.exit(main())
