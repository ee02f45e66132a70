"""What would make a stage fail after the stages before it have cost their hours, told beforehand: as far as the
dataset, the recipe and this machine show it without loading a model. One function a kind of run."""

from typing import Any

from katherine import columns, gguf, gpu, probesets, shelf
from katherine.errors import KatherineError, SetupError
from katherine.settings import Home


def sft(home: Home, dataset: str, recipe: dict[str, Any]) -> list[str]:
    found = []
    if not shelf.summary(home, dataset).report["sft"]["unique"]:
        found.append(f"dataset {dataset} has no conversations: prepare one with SFT lines.")
    if recipe["load_in_4bit"]:
        try:
            if not gpu.read():
                found.append(
                    "load_in_4bit needs an NVIDIA GPU, and there is none: turn it off, as the preset demo does."
                )
        except SetupError as error:
            found.append(str(error))
    return found


def dpo(home: Home, dataset: str, recipe: dict[str, Any]) -> list[str]:
    if shelf.summary(home, dataset).report["dpo"]["used"]:
        return []
    return [f"dataset {dataset} has no pairs that are used: leave DPO out, or prepare one with pairs."]


def export(home: Home, dataset: str, recipe: dict[str, Any]) -> list[str]:
    return gguf.wrong_types(recipe["quants"])


def probe(home: Home, dataset: str, recipe: dict[str, Any]) -> list[str]:
    found = []
    try:
        probesets.load(home, recipe["probes"])
    except KatherineError as error:
        found.append(str(error))
    for column in recipe["columns"]:
        try:
            columns.get(home, column)
        except KatherineError as error:
            found.append(str(error))
    return found
