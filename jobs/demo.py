"""The whole pipeline on the sample persona and the small base, as real runs in the run folders: the proof that this
machine can do it, and the shortest description of how the stages meet."""

import time
from collections.abc import Callable
from typing import Any

from jobs import pipeline, queue
from katherine import bases, corpus, probesets, recipe, runs
from katherine.errors import KatherineError
from katherine.runs import ENDED, Run, State
from katherine.settings import Home
from katherine.template import ChatTemplate

PRESET = "demo"


def run(home: Home, say: Callable[[str], None]) -> dict[str, Any]:
    """Prepare → SFT → DPO → export → probes. Returns what `python app.py demo --json` prints.

    Raises KatherineError naming the run that did not succeed, its reason and its remedy.
    """
    began = time.monotonic()
    sft = recipe.preset(PRESET, recipe.SftRecipe)
    template = ChatTemplate.load(bases.tokenizer(home, sft.base))
    dataset = corpus.prepare(
        [probesets.SAMPLE], home, template=template, base=sft.base, max_length=sft.max_length, name="sample"
    )
    seconds = {"prepare": round(time.monotonic() - began, 1)}
    counts = dataset.report
    say(f"dataset {dataset.id}: {counts['sft']['unique']} SFT examples, {counts['dpo']['used']} pairs")

    queued = pipeline.start(
        home,
        dataset.id,
        sft=sft.model_dump(mode="json"),
        dpo=recipe.preset(PRESET, recipe.DpoRecipe).model_dump(mode="json"),
        export=recipe.preset(PRESET, recipe.ExportRecipe).model_dump(mode="json"),
        probe=recipe.preset(PRESET, recipe.ProbeRecipe).model_dump(mode="json"),
        who="demo",
    )
    results: dict[str, dict[str, Any]] = {}
    for each in queued:
        follow(home, each, say)
        results[each.record.kind] = runs.result(each)
        seconds[each.record.kind] = round(runs.seconds(each), 1)
    seconds["total"] = round(time.monotonic() - began, 1)
    return {
        "dataset": dataset.id,
        "runs": {each.record.kind: each.id for each in queued},
        "sft": _only(results["sft"], "steps", "first_loss", "last_loss"),
        "dpo": _only(results["dpo"], "steps", "first_loss", "last_loss", "first_margin", "last_margin"),
        "export": [
            _only(file, "quant", "file", "bytes", "sha256", "bits_per_weight", "accepted", "perplexity", "kl", "top1")
            for file in results["export"]["files"]
        ],
        "probes": results["probe"]["models"],
        "answers": results["probe"]["answers"],
        "seconds": seconds,
    }


def follow(home: Home, run: Run, say: Callable[[str], None]) -> None:
    """Waits for a run to end, saying each new phase. Raises KatherineError where it did not succeed."""
    said = ""
    while (status := queue.wait(home, run.id, timeout=0.5)).state not in ENDED:
        if status.state is State.queued and queue.blocked(home, run):
            raise KatherineError(f"Run {run.id} waits for {run.record.parent}, which was interrupted: resume that one.")
        # A queued run has no phase, but may say who holds the GPU.
        now = status.phase or status.reason
        if now and now != said:
            said = now
            say(f"{run.record.kind} {run.id}: {said}")
    if status.state is not State.succeeded:
        raise KatherineError(f"Run {run.id} {status.state}: {status.reason} {status.remedy} Its log: {run.log}")
    say(f"{run.record.kind} {run.id}: {status.state} in {runs.seconds(run):.0f} s")


def _only(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}
