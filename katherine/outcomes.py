"""What came of a run, in the few figures by which runs are told apart in a list. Everything else a run left is read
where it is needed: runs.result, manifests, Run.metrics."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from katherine import hardware
from katherine.recipe import KINDS
from katherine.runs import Run, State, Status
from katherine.units import size

# What is compared of each exported file.
_OF_FILE = ("accepted", "bytes", "bits_per_weight", "perplexity", "kl", "top1")


@dataclass(frozen=True, slots=True)
class File:
    """One GGUF of an export, as its manifest names it."""

    quant: str
    bytes: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """None, or nothing in it, stands for what this kind of run does not have, or does not have yet.

    steps: optimiser steps made. losses and margin as training logs them. files: an export's. probes: model → (asked,
    passed), without those that no rule decided. hourly: dollars an hour of the machine, as priced when the run began.
    damage: why the result could not be read.
    """

    steps: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    margin: float | None = None
    files: tuple[File, ...] = ()
    probes: tuple[tuple[str, int, int], ...] = ()
    hourly: float | None = None
    damage: str = ""

    @property
    def asked(self) -> int:
        """Probes put to the exported files; the base and the adapters are asked fewer, and only to compare."""
        return sum(asked for _, asked, _ in self._counted)

    @property
    def passed(self) -> int:
        return sum(passed for *_, passed in self._counted)

    @property
    def _counted(self) -> Sequence[tuple[str, int, int]]:
        """The export's own files; where none of them was asked, all that were."""
        return [each for each in self.probes if is_file(each[0])] or self.probes

    @property
    def accepted(self) -> int:
        return sum(file.accepted for file in self.files)

    def words(self) -> str:
        """ "loss 3.80 → 0.42", "3 of 3 files accepted, 19.5 GB", "69 of 78 probes passed"; empty where nothing is."""
        if self.damage:
            return self.damage
        if self.files:
            total = size(sum(file.bytes for file in self.files))
            return f"{self.accepted} of {len(self.files)} {_plural('file', len(self.files))} accepted, {total}"
        if self.probes:
            return f"{self.passed} of {self.asked} probes passed"
        if self.last_loss is None:
            return ""
        before = "" if self.first_loss is None else f"{self.first_loss:.3g} → "
        margin = "" if self.margin is None else f", margin {self.margin:.3g}"
        return f"loss {before}{self.last_loss:.3g}{margin}"


def is_file(model: str) -> bool:
    """Whether a probe run's model is a file of the export that was probed, not the base, a stage's adapter, or a column
    that was asked beside them (whose name is its id, with a colon)."""
    return model != "base" and model not in KINDS and ":" not in model


def read(run: Run, status: Status) -> Outcome:
    """The run's outcome as of `status`. Never raises: a result that cannot be read is named in `damage`. Reads one
    small file or two; of a training run that has not succeeded, the end of its metrics."""
    machine = hardware.of_run(run) if status.attempt else None
    return replace(_outcome(run, status), hourly=machine.hourly if machine else None)


def _outcome(run: Run, status: Status) -> Outcome:
    if status.state is State.succeeded:
        try:
            return _of_result(json.loads((run.path / "result.json").read_bytes()))
        except FileNotFoundError:
            return Outcome(damage="its result.json is gone")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return Outcome(damage=f"its result.json is damaged ({error})")
    if status.attempt and run.record.kind in ("sft", "dpo"):
        return _of_metrics(run)
    return Outcome()


def _of_result(result: dict[str, Any]) -> Outcome:
    return Outcome(
        steps=result.get("steps"),
        first_loss=number(result.get("first_loss")),
        last_loss=number(result.get("last_loss")),
        margin=number(result.get("last_margin")),
        files=tuple(
            File(str(file["quant"]), int(file["bytes"]), file["accepted"] is True) for file in result.get("files", ())
        ),
        probes=tuple(
            (str(model), int(counts["asked"]) - int(counts.get("undecided", 0)), int(counts["passed"]))
            for model, counts in result.get("models", {}).items()
        ),
    )


def _of_metrics(run: Run) -> Outcome:
    for row in run.newest_metrics():
        if "loss" in row:
            step = row.get("step")
            return Outcome(
                steps=step if isinstance(step, int) else None,
                last_loss=number(row["loss"]),
                margin=number(row.get("margin")),
            )
    return Outcome()


def figures(run: Run, status: Status) -> dict[str, Any]:
    """Everything a run's result says in single values, by name: what two runs are laid side by side with. Of a run
    that has not succeeded, what its metrics say. Never raises for a result that cannot be read."""
    try:
        result = json.loads((run.path / "result.json").read_bytes()) if status.state is State.succeeded else {}
        found: dict[str, Any] = {}
        for name, value in result.items():
            if name == "files":
                for file in value:
                    found |= {f"{file['quant']}: {each}": file.get(each) for each in _OF_FILE}
            elif name == "models":
                found |= {
                    f"{model}: probes passed": f"{counts['passed']} of {counts['asked'] - counts.get('undecided', 0)}"
                    for model, counts in value.items()
                }
            elif name == "drift":
                found["drift: kl"] = value.get("kl")
            elif isinstance(value, str | int | float | list):
                found[name] = value
        if result:
            return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    partly = read(run, status)
    values = {"steps": partly.steps, "last_loss": partly.last_loss, "last_margin": partly.margin}
    return {name: value for name, value in values.items() if value is not None}


def number(value: Any) -> float | None:
    """A logged number; one that is not finite was written as "nan" or "inf", since JSON lacks them."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
