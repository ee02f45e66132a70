"""The pipeline's stages on a GPU at the 9B's size, through the project's own jobs, and the ways to train beside each
other in the same run: `python app.py bench gpu [--base FOLDER] [--stages sft dpo export chat] [--ways ...]`.

A way is a few optimiser steps in a process of its own. The base is random and the talk is noise: none of what is timed
depends on what the weights are. Figures are kept as JSON in KATHERINE_HOME/bench, with the GPU, driver and versions.
`--base tiny` makes a small base, so that the whole can be tried without a GPU.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import resident
from bench.base import write_checkpoint
from bench.corpus import text
from jobs import pipeline, queue
from katherine import corpus, gpu, hardware, recipe, runs, settings, shapes
from katherine.progress import Quiet
from katherine.runs import ENDED, Run
from katherine.settings import PROJECT, Home
from katherine.template import ChatTemplate

# The recipe's corpus: examples, pairs, and words of a question and a reply, so that the token lengths come out alike
# (measured: p50 104, p90 172, p99 231, at most 262; the two rows of a pair 110 in all).
EXAMPLES, PAIRS = 1886, 180
# Steps before these are left out of the median: kernels are tuned and graphs captured in them.
SETTLED = 5
# Tokens of a reply in the export's checks: a random model never ends one by itself.
REPLY = 16
# Forward, and backward through frozen weights: 2 FLOPs a weight and token each.
FLOPS = 4
# The last is no run: the export's files, talked to.
CHAT = "chat"
STAGES = ("sft", "dpo", "export", CHAT)
# What each way changes in the recipe k0. The first is the baseline.
WAYS: dict[str, dict[str, Any]] = {
    "as written, unsloth, 4 bit": {"fit": False},
    "as written, unsloth, 16 bit": {"fit": False, "load_in_4bit": False},
    "32 × 1, unsloth, 4 bit": {"fit": False, "per_device_batch_size": 32, "gradient_accumulation_steps": 1},
    "as written, without unsloth, 4 bit": {"fit": False},
    "fitted, 4 bit": {},
    "fitted, 16 bit": {"load_in_4bit": False},
    "fitted to 16 GiB, 4 bit": {},
}


# --------------------------------------------------------------------------------------------------- what is fed


def write_lines(folder: Path, examples: int, pairs: int) -> None:
    """JSONL in the lengths of the recipe's corpus."""
    numbers = random.Random(3)

    def words(median: float) -> int:
        return max(3, min(int(numbers.lognormvariate(0, 0.5) * median), int(median * 2.6)))

    def turn(role: str, median: float) -> dict[str, str]:
        return {"role": role, "content": text(numbers, words(median))}

    with (folder / "talk.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(examples):
            out.write(json.dumps({"messages": [turn("user", 14), turn("assistant", 64)]}) + "\n")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(pairs):
            pair = {
                "prompt": [turn("user", 12)],
                "chosen": [turn("assistant", 30)],
                "rejected": [turn("assistant", 13)],
            }
            out.write(json.dumps(pair | {"_cat": "noise", "_type": "noise"}) + "\n")


def prepare(home: Home, base: Path, examples: int, pairs: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder), examples, pairs)
        template = ChatTemplate.load(base)
        return corpus.prepare([Path(folder)], home, template=template, name=f"noise-{examples}").id


# ------------------------------------------------------------------------------------------------------ the ways


def one_way(name: str, base: Path, dataset: Path, out: Path) -> dict[str, Any]:
    """In this process: SFT's first steps, and what they took."""
    from unittest import mock

    from katherine import model, sft

    class Told(Quiet):
        began = time.monotonic()
        trained = 0.0

        def phase(self, phase: str) -> None:
            super().phase(phase)
            if phase == "train":
                self.trained = time.monotonic() - self.began

    told = Told()
    wanted = recipe.preset("k0", recipe.SftRecipe, WAYS[name] | {"base": str(base), "num_train_epochs": 1})
    small = name.startswith("fitted to 16 GiB")
    card = gpu.mine()
    with mock.patch.object(gpu, "mine", lambda: replace(card, memory_total=16 << 30) if small and card else card):
        if "without unsloth" in name:
            ready = model.ready
            with (
                mock.patch.object(model, "ready", lambda home, progress, fitted: ready(home, progress, fitted=True)),
                mock.patch.object(
                    model, "_load_fast", lambda c, lora, four, *rest: model._load_plain(c, lora, four, 20)
                ),
            ):
                sft.train(dataset, wanted, out, told)
        else:
            sft.train(dataset, wanted, out, told)
    return {"load": told.trained, "lines": told.lines[-3:]} | steps_of([row for row in told.rows if "loss" in row])


def steps_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the first step, the median of the settled ones with their range, tokens a second, peak GiB."""
    ends = [0.0, *(row["seconds"] for row in rows)]
    each = [b - a for a, b in pairwise(ends)]
    settled = each[SETTLED:] or each
    return {
        "steps": len(rows),
        "first": each[0],
        "median": statistics.median(settled),
        "range": [min(settled), max(settled)],
        "tokens_per_second": statistics.median([row["tokens_per_second"] for row in rows[-len(settled) :]]),
        "memory_gib": max(row["memory_gib"] for row in rows),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
    }


def run_way(name: str, base: Path, dataset: Path) -> dict[str, Any]:
    """In a process of its own, so that its memory and its libraries are its own."""
    with tempfile.TemporaryDirectory() as folder:
        told_in = Path(folder) / "told.json"
        command = [sys.executable, "-m", "bench.gpu", "--one", name, str(base), str(dataset), folder, str(told_in)]
        child = subprocess.run(
            command, cwd=PROJECT, env=os.environ | {"PYTHONPATH": path()}, capture_output=True, text=True
        )
        if child.returncode:
            return {"failed": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
        return json.loads(told_in.read_text())


def path() -> str:
    return os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---------------------------------------------------------------------------------------------------- the stages


def run_stages(
    home: Home, base: Path, dataset: str, stages: Sequence[str], changes: dict[str, dict[str, Any]]
) -> Iterator[Run]:
    """A pipeline through the queue: each of its runs once it has ended, none after one that did not succeed."""
    made: dict[str, Any] = dict.fromkeys(recipe.KINDS)
    for stage in stages:
        more = {"base": str(base)} if stage == "sft" else {}
        values = recipe.preset("k0", recipe.KINDS[stage], more | changes.get(stage, {}))
        made[stage] = values.model_dump(mode="json")
    queued = pipeline.start(home, dataset, who="bench", **made)
    for run in queued:
        while (status := run.status()).state not in ENDED:
            print(
                f"\r{run.record.kind}: {status.phase} {status.step} of {status.of}  ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(1)
        print(file=sys.stderr)
        yield run
        if status.state != "succeeded":
            print(f"{run.record.kind} {status.state}: {status.reason} {status.remedy}", file=sys.stderr)
            queue.stop(home, queued[-1].id)
            return


def stage_figures(run: Run) -> dict[str, Any]:
    """A run's own account: seconds from its start to its end, and what its rows or its manifest say."""
    status = run.status()
    found: dict[str, Any] = {"state": str(status.state), "seconds": round(status.seconds, 1)}
    if machine := hardware.of_run(run):
        found["gpus"] = machine.used
    if rows := [row for row in run.metrics() if "loss" in row]:
        found |= steps_of(rows)
    if (manifest := run.out / "gguf" / "manifest.json").is_file():
        found["parts"] = json.loads(manifest.read_text())["seconds"]
    return found


# ------------------------------------------------------------------------------------------------------ the table


def rate() -> float:
    """FLOP/s that a large bfloat16 product reaches here: the arithmetic limit that steps are held against."""
    code = """
import time, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for _ in range(3): a @ b
torch.cuda.synchronize(); began = time.monotonic()
for _ in range(20): a @ b
torch.cuda.synchronize(); print(20 * 2 * 8192**3 / (time.monotonic() - began))
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def share(figures: dict[str, Any], parameters: int, reached: float) -> float:
    """Of the time that the settled steps took, that which the arithmetic alone would take on as many GPUs."""
    return FLOPS * parameters * figures["tokens_per_second"] / (reached * figures.get("gpus", 1))


def table(report: dict[str, Any]) -> str:
    head = "| | load | first step | median step | tokens/s | peak GiB | of the limit | whole stage |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    ways = report["ways"]
    usual = next((w["median"] for w in ways.values() if "median" in w), None)
    for name, each in ways.items():
        if "failed" in each:
            lines.append(f"| {name} | failed: {each['failed'][:80]} |")
            continue
        ratio = f" ({usual / each['median']:.2f} × as fast)" if usual and each["median"] != usual else ""
        whole = each["load"] + each["first"] + each["median"] * (report["steps_of_the_recipe"] - 1)
        lines.append(_line(name, each, f"{each['load']:.0f} s", ratio, f"{whole:.0f} s projected"))
    for name, each in report["stages"].items():
        if "median" in each:
            cards = f" on {each['gpus']} GPUs" if each.get("gpus", 1) > 1 else ""
            lines.append(_line(f"job: {name}, {each['steps']} steps{cards}", each, "", "", f"{each['seconds']:.0f} s"))
        elif "parts" in each:
            parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in each["parts"].items())
            lines.append(f"| job: {name} | | | | | | | {each['seconds']:.0f} s ({parts}) |")
        else:
            lines.append(f"| job: {name} | {each['state']} |")
    if report["chat"]:
        lines.append(f"\nChat: {resident.words(report['chat'])}.")
    return "\n".join(lines)


def _line(name: str, each: dict[str, Any], load: str, ratio: str, whole: str) -> str:
    limit = f"{each['share']:.0%}" if each.get("share") else ""
    times = f"{each['first']:.1f} s | {each['median']:.3f} s{ratio}"
    rate = f"{each['tokens_per_second']:,.0f} | {each['memory_gib']:.1f}"
    return f"| {name} | {load} | {times} | {rate} | {limit} | {whole} |"


def measure(home: Home, base: Path, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """The report, and where it is kept: from the first way on, so that a run that is cut off loses one at the most."""
    cards = gpu.read()
    reached = rate() if cards else None
    shape = shapes.of(home, str(base))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": [card.name for card in cards],
        "driver": cards[0].driver if cards else None,
        "cores": hardware.here().cores,
        "versions": runs.versions(),
        "reached_flops": reached,
        "parameters": shape.parameters if shape else None,
        "steps_of_the_recipe": recipe.SftRecipe().steps(options.examples),
        "ways": {},
        "stages": {},
        "chat": None,
    }
    kept = home.root / "bench" / f"gpu-{report['date'].replace(':', '')[:17]}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)

    def keep(part: str, name: str, figures: dict[str, Any]) -> None:
        if reached and shape and "tokens_per_second" in figures:
            figures["share"] = share(figures, shape.parameters, reached)
        report[part][name] = figures
        runs.write_json(kept, report)

    whole = prepare(home, base, options.examples, options.pairs)
    few = prepare(home, base, min(options.examples, 32 * options.steps), options.pairs)
    for name in options.ways:
        print(f"way: {name}", file=sys.stderr, flush=True)
        keep("ways", name, run_way(name, base, corpus.folder(home, few)))
        print(json.dumps(report["ways"][name]), file=sys.stderr, flush=True)
    changes: dict[str, Any] = {"export": {"check_examples": options.check_examples, "max_new_tokens": REPLY}}
    if not reached:
        # Without a GPU nothing is quantised, and the small base's widths want few examples.
        changes["sft"] = {"load_in_4bit": False}
    jobs = [stage for stage in options.stages if stage != CHAT]
    for run in run_stages(home, base, whole, jobs, changes) if jobs else []:
        keep("stages", run.record.kind, figures := stage_figures(run))
        print(f"{run.record.kind}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        if run.record.kind == "export" and figures["state"] == "succeeded" and CHAT in options.stages:
            report["chat"] = resident.measure(home, run)
    runs.write_json(kept, report)
    return report, kept


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--one"]:
        name, *places, told_in = given[1:]
        Path(told_in).write_text(json.dumps(one_way(name, *map(Path, places))))
        return 0
    parser = argparse.ArgumentParser(prog="app.py bench gpu", description=__doc__)
    parser.add_argument("--base", help="a checkpoint's folder, or tiny (default: the 9B's shape, made once)")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--ways", nargs="*", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=14, help="optimiser steps of each way (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="(default: %(default)s, the recipe's)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="(default: %(default)s, the recipe's)")
    parser.add_argument("--check-examples", type=int, default=24, help="of the export's checks (default: %(default)s)")
    options = parser.parse_args(given)
    home = settings.home()
    if options.base in (None, "tiny"):
        base = home.root / "bench" / f"base-{options.base or '9b'}"
        if not (base / "model.safetensors.index.json").is_file():
            print(f"making {base}", file=sys.stderr, flush=True)
            write_checkpoint(base, "tiny" if options.base else "9b")
    else:
        base = Path(options.base).absolute()
    report, kept = measure(home, base, options)
    print(table(report))
    print(f"kept in {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
