"""Words on what a run will be and take: recipe, presets, estimate, prices."""

import argparse
import json
from typing import Any

from jobs.commands.terminal import Commands, command, show
from katherine import (
    bases,
    corpus,
    drafts,
    estimate,
    hardware,
    presets,
    prices,
    recipe,
    targets,
    units,
    yardstick,
)
from katherine.errors import PriceError, RecipeError
from katherine.settings import home


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


def preset_list(options: argparse.Namespace) -> None:
    at = home()
    if options.delete:
        presets.delete(at, options.delete)
    if options.save:
        values = {
            stage: recipe.preset(options.preset, model, settings_of(options, stage), at).model_dump(mode="json")
            for stage, model in recipe.KINDS.items()
        }
        presets.save(at, options.save, values)
    elif options.set:
        raise RecipeError(["--set changes what is kept: say under which name, with --save NAME."])
    rows = [[name, "built-in" if name in recipe.PRESETS else "saved"] for name in recipe.preset_names(at)]
    show(rows, ["preset", ""])


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


def register(commands: Commands) -> None:
    p = command(commands, "recipe", explain, "show a recipe: each value, its reason, its steps and modules")
    p.add_argument("stage", nargs="?", default="sft", choices=recipe.KINDS)
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--dataset", help="predict the steps on this dataset")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")
    p.add_argument("--json", action="store_true")

    p = command(commands, "presets", preset_list, "list the presets, keep one under a name, or delete a saved one")
    p.add_argument("--save", metavar="NAME", help="keep --preset with the changes of --set under this name")
    p.add_argument("--preset", default="k0", help="what is kept, but for the changes (default: %(default)s)")
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")
    p.add_argument("--delete", metavar="NAME")

    p = command(
        commands, "estimate", reckon, "what a pipeline on a dataset will take: steps, time, memory, disk, dollars"
    )
    p.add_argument("dataset")
    p.add_argument("--preset", default="k0", help="a built-in preset or a saved one (default: %(default)s)")
    p.add_argument("--stages", nargs="+", default=list(recipe.KINDS), choices=recipe.KINDS)
    p.add_argument("--set", action="append", metavar="STAGE.FIELD=VALUE")

    p = command(commands, "prices", price_list, "what an hour of each kind of GPU costs")
    p.add_argument("--set", action="append", metavar="KIND=DOLLARS", help='such as "H200 SXM=3.79"; "this pod" is one')
    p.add_argument("--forget", action="append", metavar="KIND", help="take an entered price back")
