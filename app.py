"""The command line. Each command is a few lines over `katherine` and `jobs`; nothing is decided here."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import demo, pipeline, queue
from katherine import bases, corpus, doctor, recipe, runs, targets
from katherine.errors import DataError, KatherineError, RecipeError, SetupError
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


def counting_base(at: Home, base: str) -> str:
    """`base`, or the small one where its tokenizer cannot be had here; the report says which one counted."""
    try:
        bases.tokenizer(at, base)
    except SetupError as error:
        say(f"{error}\nTokens are counted with {bases.SMALL} instead.")
        return bases.SMALL
    return base


def prepare(options: argparse.Namespace) -> None:
    at = home()
    base = counting_base(at, options.base)
    dataset = corpus.prepare(
        options.paths,
        at,
        include_uncurated=options.uncurated,
        template=ChatTemplate.load(bases.tokenizer(at, base)),
        base=base,
        max_length=options.max_length,
        name=options.name,
    )
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


def explain(options: argparse.Namespace) -> None:
    """What a recipe's values are and why, which modules it reaches, and how many steps it makes."""
    at = home()
    model = recipe.KINDS[options.stage]
    made = recipe.preset(options.preset, model, settings_of(options, options.stage))
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
        print(made.steps_explained(_examples(corpus.load(at, options.dataset).report, made)))
    if isinstance(made, recipe.SftRecipe):
        for line in targets.matches(bases.configuration(at, made.base), made.target_modules).lines(made.lora_r):
            print(line)


def _examples(report: dict[str, Any], made: recipe.SftRecipe | recipe.DpoRecipe) -> int:
    """How many examples training will use, without those counted as too long, where they were counted by its limit."""
    counts = report["tokens"] or {"max_length": None}
    if isinstance(made, recipe.DpoRecipe):
        counts = counts | (counts.get("pairs") or {})
    too_long = counts["over_max_length"] if counts["max_length"] == made.max_length else 0
    return (report["sft"]["unique"] if isinstance(made, recipe.SftRecipe) else report["dpo"]["used"]) - too_long


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


def start(options: argparse.Namespace) -> None:
    at = home()
    if "sft" not in options.stages:
        raise RecipeError(["A pipeline begins with sft: name it among the stages."])
    if unused := [text for text in options.set or [] if text.partition(".")[0] not in options.stages]:
        raise RecipeError([f"--set {text} is for a stage that is not started." for text in unused])
    chosen: dict[str, Any] = dict.fromkeys(recipe.KINDS) | {
        stage: recipe.preset(options.preset, model, settings_of(options, stage)).model_dump(mode="json")
        for stage, model in recipe.KINDS.items()
        if stage in options.stages
    }
    for run in pipeline.start(at, corpus.load(at, options.dataset).id, who="command line", **chosen):
        print(run.id)


def list_runs(options: argparse.Namespace) -> None:
    at = home()
    queue.reconcile(at)
    rows = []
    for run in runs.everyone(at):
        try:
            status = run.status()
        except DataError as error:
            rows.append([run.id, "damaged", "", "", run.record.dataset or "", str(error)])
            continue
        steps = f"{status.step} of {status.of}" if status.of else ""
        rows.append([run.id, status.state, status.phase, steps, run.record.dataset or "", status.reason])
    show(rows, ["run", "state", "phase", "steps", "dataset", "reason"])


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


def examine(options: argparse.Namespace) -> None:
    checks = doctor.examine(home())
    show([[c.state, c.name, c.finding] for c in checks], ["", "what", "finding"])
    for check in checks:
        if check.remedy:
            print(f"{check.name}: {check.remedy}")
    if any(check.state == "problem" for check in checks):
        raise SystemExit(1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="app.py", description="Train, export and probe a persona.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(action=action)
        return added

    base = recipe.SftRecipe.model_fields["base"].default
    p = command("prepare", prepare, "read JSONL files into a dataset")
    p.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_DIR")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    p.add_argument("--uncurated", action="store_true", help="use pairs without _cat and _type too")
    p.add_argument("--base", default=base, help="whose tokenizer counts (default: %(default)s)")
    p.add_argument("--max-length", type=int, default=recipe.SftRecipe.model_fields["max_length"].default)
    p.add_argument("--name", help="a name for the dataset")

    p = command("recipe", explain, "show a recipe: each value, its reason, its steps and modules")
    p.add_argument("stage", nargs="?", default="sft", choices=recipe.KINDS)
    p.add_argument("--preset", default="k0", choices=recipe.PRESETS)
    p.add_argument("--dataset", help="predict the steps on this dataset")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")
    p.add_argument("--json", action="store_true")

    p = command("start", start, "queue the pipeline on a dataset: SFT, DPO, export, probes")
    p.add_argument("dataset")
    p.add_argument("--preset", default="k0", choices=recipe.PRESETS)
    p.add_argument("--stages", nargs="+", default=["sft", "dpo", "export", "probe"], choices=recipe.KINDS)
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    command("runs", list_runs, "list all runs")
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
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help()
        return 0
    logging.basicConfig(level=logging.WARNING)
    try:
        options.action(options)
    except KatherineError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
