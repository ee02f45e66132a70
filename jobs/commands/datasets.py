"""Words on data: prepare, datasets, examples, fetch."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from jobs.commands.terminal import Commands, command, done, say, show
from katherine import (
    bases,
    browse,
    corpus,
    recipe,
    rendering,
    shelf,
)
from katherine.settings import home
from katherine.template import ChatTemplate

# As many as a person reads on a screen; the report has them all.
SHOWN_PROBLEMS = 40


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
    print(at.inbox / done(at, "fetch", {"path": options.path})["folder"])


def register(commands: Commands) -> None:
    base = recipe.SftRecipe.model_fields["base"].default
    p = command(commands, "prepare", prepare, "read JSONL files into a dataset")
    p.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_DIR")
    p.add_argument("--again", metavar="DATASET", help="with other choices from the files of this dataset")
    p.add_argument("--leave-out", nargs="+", metavar="FILE", help="files that do not go in, by name or path")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    p.add_argument("--uncurated", action="store_true", help="use pairs without _cat and _type too")
    p.add_argument("--pairs", nargs="+", metavar="HASH", help="of these pairs only those (hashes: uncurated.jsonl)")
    p.add_argument("--base", default=base, help="whose tokenizer counts (default: %(default)s)")
    p.add_argument("--max-length", type=int, default=recipe.SftRecipe.model_fields["max_length"].default)
    p.add_argument("--name", help="a name for the dataset")

    p = command(commands, "datasets", list_datasets, "list the datasets, compare two, or delete one that no run used")
    p.add_argument("--compare", nargs=2, metavar="DATASET")
    p.add_argument("--delete", metavar="DATASET")

    p = command(commands, "examples", examples, "show examples of a dataset as training sees them")
    p.add_argument("dataset")
    p.add_argument("--kind", choices=("sft", "dpo"), default="sft")
    p.add_argument("--search", default="", help="only those with this text in them, whatever its case")
    p.add_argument("--count", type=int, default=3, help="(default: %(default)s)")

    p = command(commands, "fetch", fetch, "download the JSONL files of a Hugging Face dataset or bucket into the inbox")
    p.add_argument("path", help="owner/name, buckets/owner/name, with a folder or file behind it if needed")
