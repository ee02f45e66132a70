"""What goes out beside the files: the model card, and the recipes, acceptance and probe tables as JSON. Owns their
words; everything in them was read from the runs' folders, and what was not measured is not mentioned."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import msgspec

from katherine import comparison, manifests, outcomes, reviews, runs, shelf, statistics, units
from katherine.approval import Approval
from katherine.errors import KatherineError
from katherine.history import History
from katherine.manifests import Entry, Manifest
from katherine.outcomes import Outcome
from katherine.runs import Run, State
from katherine.settings import Home

README = "README.md"
# A hub's id of a model. Anything else that a base is called is a word or a folder of this machine.
_HUB_ID = re.compile(r"[0-9A-Za-z][\w.-]*/[0-9A-Za-z][\w.-]*")
# What Markdown, HTML or a table would take for its own.
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~>])")


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of the line. differs: field, its value and the nearest preset's, for each that is not the preset's.
    recipe: complete, without folders of this machine."""

    run: Run
    outcome: Outcome
    preset: str
    differs: tuple[tuple[str, Any, Any], ...]
    recipe: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Probed:
    """A finished probe run of the export. models: name → (asked, passed)."""

    run: Run
    probes: str
    models: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What people said. preferred, up, down: by quant. good: recommendations that it may go out, of `recommended`."""

    reviewers: int
    verdicts: int
    preferred: dict[str, int]
    same: int
    none_good: int
    up: dict[str, int]
    down: dict[str, int]
    good: int
    recommended: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that is known of an export. dataset: its report, None where the dataset is gone."""

    export: Run
    manifest: Manifest
    files: tuple[Entry, ...]
    stages: tuple[Stage, ...]
    dataset: dict[str, Any] | None
    probed: tuple[Probed, ...]
    judged: Judged

    @property
    def base(self) -> str:
        return public_name(self.manifest.base)


def public_name(base: str) -> str:
    """A base's name as others may read it: the hub's id or a word, never a folder of this machine."""
    return base if _HUB_ID.fullmatch(base) else PurePath(base).name or "a local base"


def gather(home: Home, export: Run, files: Sequence[Entry]) -> Facts:
    """Reads small files alone. Raises NotFound or DataError where the export's manifest cannot be used; what else is
    gone or damaged is left out."""
    stages = tuple(_stage(home, run) for run in line(home, export))
    return Facts(
        export,
        manifests.read(export),
        tuple(files),
        stages,
        _dataset(home, export),
        tuple(_probed(home, export)),
        _judged(home, export.id),
    )


def line(home: Home, export: Run) -> list[Run]:
    """The trainings that the export was made from, the first one first."""
    found: list[Run] = []
    parent = export.record.parent
    while parent is not None and parent not in [run.id for run in found]:
        try:
            run = runs.load(home, parent)
        except KatherineError:
            break
        if run.record.kind in ("sft", "dpo"):
            found.insert(0, run)
        parent = run.record.parent
    return found


def _stage(home: Home, run: Run) -> Stage:
    preset, values = comparison.nearest_preset(home, run.record)
    recipe = run.record.recipe
    recipe = recipe | {"base": public_name(str(recipe["base"]))} if "base" in recipe else recipe
    differs = tuple(
        (name, value, values[name]) for name, value in recipe.items() if name in values and values[name] != value
    )
    return Stage(run, outcomes.read(run, run.status()), preset, differs, recipe)


def _dataset(home: Home, export: Run) -> dict[str, Any] | None:
    try:
        found = shelf.summary(home, str(export.record.dataset))
    except KatherineError:
        return None
    asked = export.record.inputs.get("dataset")
    # Another dataset under the same name is not what was learned from.
    return found.report if asked is None or asked == found.fingerprint else None


def _probed(home: Home, export: Run) -> list[Probed]:
    """The newest finished run of each probe set, in the order of their names."""
    history, found = History(home), {}
    for seen in reversed(history.runs()):
        if (seen.kind, seen.run.record.parent, seen.status.state) == ("probe", export.id, State.succeeded):
            # A name with a colon is a column of another export, which was asked beside these.
            counts = history.outcome(seen).probes
            models = {model: (asked, passed) for model, asked, passed in counts if ":" not in model}
            probes = PurePath(str(seen.run.record.recipe.get("probes", ""))).stem
            if models:
                found[probes] = Probed(seen.run, probes, models)
    return [found[name] for name in sorted(found)]


def _judged(home: Home, export_id: str) -> Judged:
    given = reviews.verdicts(home, export_id)
    recommended = reviews.recommendations(home, export_id)
    preferred: dict[str, int] = {}
    up: dict[str, int] = {}
    down: dict[str, int] = {}
    for verdict in given:
        for answer in verdict.answers:
            if answer.column == verdict.preferred:
                preferred[answer.quant] = preferred.get(answer.quant, 0) + 1
            if answer.thumb:
                thumbs = up if answer.thumb > 0 else down
                thumbs[answer.quant] = thumbs.get(answer.quant, 0) + 1
    return Judged(
        len({reviews.person(verdict) for verdict in given}),
        len(given),
        preferred,
        sum(verdict.tie for verdict in given),
        sum(verdict.none_good for verdict in given),
        up,
        down,
        sum(each.good for each in recommended),
        len(recommended),
    )


# ------------------------------------------------------------------------------------------------------------ as JSON


def documents(facts: Facts, approved: Approval | None) -> dict[str, bytes]:
    """File name → content, the card among them. The same facts give the same bytes, so that a second push of the same
    has nothing to send. Without an approval there is none in it, nor in the card."""
    found = {
        README: card(facts, approved).encode(),
        "recipe.json": _json(_recipes(facts)),
        "acceptance.json": _json(_acceptance(facts)),
        "probes.json": _json(_probes(facts)),
    }
    return found if approved is None else found | {"approval.json": _json(msgspec.to_builtins(approved))}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _recipes(facts: Facts) -> dict[str, Any]:
    record = facts.export.record
    stages = [(stage.run.record, stage.recipe, stage.outcome) for stage in facts.stages]
    return {
        "base": facts.base,
        "dataset": {"id": record.dataset, "fingerprint": record.inputs.get("dataset")} | _counts(facts.dataset),
        "stages": [
            {
                "kind": one.kind,
                "run": one.id,
                "created": one.created,
                "recipe": recipe,
                "steps": came.steps,
                "first_loss": came.first_loss,
                "last_loss": came.last_loss,
                "margin": came.margin,
                "versions": one.versions,
                "revision": one.revision,
            }
            for one, recipe, came in stages
        ],
        "export": {
            "run": record.id,
            "created": record.created,
            "recipe": record.recipe,
            "versions": record.versions,
            "revision": record.revision,
            "adapter_sha256": facts.manifest.adapter_sha256,
            "template_sha256": facts.manifest.template_sha256,
        },
    }


def _counts(report: dict[str, Any] | None) -> dict[str, Any]:
    if report is None:
        return {}
    return {"files": report["files"], "lines": report["lines"], "sft": report["sft"]["unique"],
            "dpo": report["dpo"]["used"]}  # fmt: skip


def _acceptance(facts: Facts) -> dict[str, Any]:
    drift = {name: facts.manifest.drift.get(name) for name in ("kl", "top1", "tokens", "tolerance", "passed")}
    return {"drift": drift, "files": [msgspec.to_builtins(entry) for entry in facts.files]}


def _probes(facts: Facts) -> list[dict[str, Any]]:
    return [
        {
            "set": one.probes,
            "run": one.run.id,
            "recipe": one.run.record.recipe | {"probes": one.probes},
            "models": [{"model": model} | _rate(asked, passed) for model, (asked, passed) in one.models.items()],
        }
        for one in facts.probed
    ]


def _rate(asked: int, passed: int) -> dict[str, Any]:
    if not asked:
        return {"asked": 0, "passed": 0}
    low, high = statistics.wilson(passed, asked)
    return {"asked": asked, "passed": passed, "interval": [round(low, 4), round(high, 4)]}


# ------------------------------------------------------------------------------------------------------------ the card


def card(facts: Facts, approved: Approval | None) -> str:
    """The model card: YAML front matter, then Markdown."""
    parts = [
        _front_matter(facts),
        f"# {_text(str(facts.export.record.dataset or 'A persona'))} on {_text(facts.base)}",
        f"A persona trained into {_text(facts.base)} with LoRA adapters, merged, and exported as GGUF. Everything "
        "below was measured by the program that made these files; what was not measured is not mentioned.",
        _files(facts, approved),
        _running(facts),
        _data(facts),
        *(_training(stage) for stage in facts.stages),
        _checks(facts),
        *(_probing(one) for one in facts.probed),
        _people(facts.judged),
        _approval(approved),
        _made_with(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Facts) -> str:
    """JSON's strings and lists are YAML as well, whatever stands in them."""
    lines = ["pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(facts.base):
        lines.append(f"base_model: {json.dumps(facts.base)}")
    tags = ["gguf", "lora", "conversational", *(stage.run.record.kind for stage in facts.stages)]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))]
    return "\n".join(["---", *lines, "---"])


def _files(facts: Facts, approved: Approval | None) -> str:
    heads = ("file", "quant", "size", "bits a weight", "sha256")
    rows = [
        (
            f"gguf/{entry.file}",
            entry.quant,
            units.size(entry.bytes),
            _number(entry.bits_per_weight, ".2f"),
            entry.sha256,
        )
        for entry in facts.files
    ]
    said = ["`manifest.json` names every file with its size and sha256."]
    if approved and approved.adapters:
        said.append(f"`adapters/` holds the LoRA adapter of each training, for {_text(facts.base)}.")
    return f"## Files\n\n{_table(heads, rows)}\n\n{' '.join(said)}"


def _running(facts: Facts) -> str:
    if not facts.files:
        return ""
    file = min(facts.files, key=lambda entry: entry.bytes).file
    said = ["It was trained without a system prompt and needs none."]
    if all(_passed(entry, "template") for entry in facts.files):
        said.append("The chat template is inside each file.")
    if all(_passed(entry, "no_thought") for entry in facts.files):
        said.append("It has thinking off: in the checks no reply opened a thought.")
    ollama = "Ollama may put a template of its own in place of the file's; the checks below were made with llama.cpp."
    return "\n\n".join(
        (
            "## Running it",
            " ".join(said),
            f"llama.cpp:\n\n```sh\nllama-cli -m {file}\nllama-server -m {file}\n```",
            f"Ollama, with a `Modelfile` that says `FROM ./{file}`:\n\n"
            "```sh\nollama create persona -f Modelfile\nollama run persona\n```\n\n" + ollama,
            f"LM Studio: `lms import {file}`, or put the file into its models folder; leave the system prompt empty.",
        )
    )


def _passed(entry: Entry, name: str) -> bool:
    return any(check.name == name and check.passed for check in entry.checks)


def _data(facts: Facts) -> str:
    report = facts.dataset
    if report is None:
        return ""
    tokens = report["tokens"] or {}
    said = [
        f"{report['sft']['unique']:,} conversations and {report['dpo']['used']:,} preference pairs, from "
        f"{report['lines']:,} lines in {report['files']:,} {'file' if report['files'] == 1 else 'files'}."
    ]
    if tokens:
        said.append(f"Conversations have {tokens['p50']:,} tokens in the median and at most {tokens['max']:,}.")
    fingerprint = facts.export.record.inputs.get("dataset")
    if fingerprint:
        said.append(f"Fingerprint: `{_code(fingerprint)}`.")
    return "## Data\n\n" + " ".join(said)


def _training(stage: Stage) -> str:
    name = {"sft": "Supervised fine-tuning", "dpo": "Preference training (DPO)"}[stage.run.record.kind]
    came = stage.outcome
    said = []
    if came.steps is not None:
        said.append(f"{_count(came.steps, 'step')}.")
    if came.first_loss is not None and came.last_loss is not None:
        said.append(f"Loss from {came.first_loss:.4g} in the first step to {came.last_loss:.4g} in the last.")
    if came.margin is not None:
        said.append(f"Last reward margin {came.margin:.4g}.")
    parts = [f"## {name}", " ".join(said)]
    if stage.differs:
        rows = [(field, comparison.text(value), comparison.text(other)) for field, value, other in stage.differs]
        parts.append(f"Where the recipe is not the preset {_text(stage.preset)}:")
        parts.append(_table(("field", "value", "preset"), rows))
    elif stage.preset:
        parts.append(f"The recipe is the preset {_text(stage.preset)}. All values are in `recipe.json`.")
    return "\n\n".join(part for part in parts if part)


def _checks(facts: Facts) -> str:
    heads = ("quant", "checks passed", "perplexity", "KL, nats a token", "same first choice")
    rows = [
        (
            entry.quant,
            f"{sum(check.passed for check in entry.checks)} of {len(entry.checks)}",
            _number(entry.perplexity, ".3f"),
            _number(entry.kl, ".4f"),
            _number(entry.top1, ".1%"),
        )
        for entry in facts.files
    ]
    about = (
        "Perplexity is of the persona's own words from the training data; KL and first choice are against the "
        "unquantised file. Every check is in `acceptance.json`."
    )
    return f"## Acceptance\n\n{_table(heads, rows)}\n\n{about}" if rows else ""


def _probing(one: Probed) -> str:
    rows = []
    for model, (asked, passed) in one.models.items():
        rate = _rate(asked, passed)
        low, high = rate.get("interval", (None, None))
        share = "" if low is None else f"{passed / asked:.0%} ({low:.0%} to {high:.0%})"
        rows.append((model, f"{passed} of {asked}", share))
    about = "A probe passes where every rule that it declares holds. In brackets: the 95% confidence interval."
    title = f"## Probes: {_text(one.probes)}"
    return f"{title}\n\n{_table(('model', 'passed', 'share'), rows)}\n\n{about}"


def _people(judged: Judged) -> str:
    if not judged.verdicts and not judged.recommended:
        return ""
    said = []
    if judged.verdicts:
        said.append(
            f"{_count(judged.reviewers, 'reviewer')} gave {_count(judged.verdicts, 'verdict')}, without knowing which "
            f"file had answered: {judged.same} found the answers equally good, {judged.none_good} found none good."
        )
    if judged.recommended:
        said.append(f"{judged.good} of {_count(judged.recommended, 'final word')} said that it may go out.")
    quants = dict.fromkeys((*judged.preferred, *judged.up, *judged.down))
    rows = [(quant, *(str(each.get(quant, 0)) for each in (judged.preferred, judged.up, judged.down)))
            for quant in sorted(quants)]  # fmt: skip
    table = _table(("quant", "preferred", "thumbs up", "thumbs down"), rows) if rows else ""
    return "\n\n".join(part for part in ("## What people said", " ".join(said), table) if part)


def _approval(approved: Approval | None) -> str:
    if approved is None:
        return ""
    note = f" They noted: {_text(approved.note)}" if approved.note else ""
    who = f"{_text(approved.who)} ({_text(approved.role)})"
    return (
        f"## Approval\n\nApproved by {who} on {_text(units.moment(approved.time))}, for exactly the files above."
        f"{note}\n\nThe approval is in `approval.json`."
    )


def _made_with(facts: Facts) -> str:
    record = facts.export.record
    rows = [(name, version) for name, version in record.versions.items()]
    revision = f" Revision of the program: `{_code(record.revision)}`." if record.revision else ""
    return f"## Made with\n\nExport `{_code(record.id)}`.{revision}\n\n{_table(('package', 'version'), rows)}"


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[_text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(heads), ["---"] * len(heads), *cells])


def _text(text: str) -> str:
    """As itself on one line, whatever Markdown or HTML would make of it."""
    seen = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return _SPECIAL.sub(r"\\\1", seen.replace("&", "&amp;").replace("<", "&lt;"))


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
