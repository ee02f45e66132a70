"""Exports read back: the files of one, typed; which quants a trained run was exported to already; what an export would
weigh. Writing a manifest is export's, what may be offered from one is export.offered's."""

import functools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from katherine import disk, export, gguf, shapes
from katherine.errors import DataError, KatherineError, NotFound
from katherine.history import Seen
from katherine.recipe import ExportRecipe
from katherine.runs import Run, State
from katherine.settings import Home

# What every export is asked for unless its recipe says otherwise.
DEFAULT: tuple[str, ...] = ExportRecipe.model_fields["quants"].default
# Manifests are kept by their file's time and size; an export page looks at a few.
_KEPT = 64


class Check(msgspec.Struct, frozen=True):
    name: str
    passed: bool
    finding: str


class Entry(msgspec.Struct, frozen=True):
    """A file as the manifest names it; perplexity, kl (nats a token) and top1 (share) are None where not measured."""

    quant: str
    file: str
    bytes: int
    sha256: str
    accepted: bool
    checks: tuple[Check, ...]
    bits_per_weight: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    seconds: dict[str, float] = {}


class Manifest(msgspec.Struct, frozen=True):
    """unquantised: the 16-bit file that the others were compared with; it is in `files` as well where it was kept."""

    base: str
    files: tuple[Entry, ...]
    unquantised: Entry
    drift: dict[str, Any]
    seconds: dict[str, float]
    adapter_sha256: str = ""
    template_sha256: str = ""


def read(run: Run) -> Manifest:
    """Raises NotFound where the run has no manifest (yet), DataError where it is damaged or names a file outside its
    folder."""
    path = run.out / "gguf" / export.MANIFEST
    try:
        found = path.stat()
        return _read(path, found.st_mtime_ns, found.st_size)
    except OSError:
        raise NotFound(f"Run {run.id} has no manifest: its export has not finished.") from None


@functools.lru_cache(maxsize=_KEPT)
def _read(path: Path, changed: int, size: int) -> Manifest:
    return parse(path, path.read_bytes())


def parse(path: Path, content: bytes) -> Manifest:
    """What a manifest's file holds. Raises DataError where it is damaged or names a file outside its folder."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): export again.") from error
    for entry in manifest.files:
        if Path(entry.file).name != entry.file or entry.file in ("", ".", ".."):
            raise DataError(f"{path} names {entry.file!r}, which is no plain file name: export again.")
    return manifest


def is_there(run: Run, entry: Entry) -> bool:
    """Whether the file is still there, at the length that was checked. (export.offered hashes as well.)"""
    try:
        return (run.out / "gguf" / entry.file).stat().st_size == entry.bytes
    except OSError:
        return False


def trained(among: Sequence[Seen]) -> list[Seen]:
    """The runs that can be exported, in the order given: SFT and DPO that succeeded."""
    return [seen for seen in among if seen.kind in ("sft", "dpo") and seen.status.state is State.succeeded]


def made_before(among: Sequence[Seen], parent: str, recipe: Mapping[str, Any]) -> dict[str, Seen]:
    """Quants of the recipe that were already exported from the run with otherwise the same settings, and whose files
    are still there: quant → the first such export of `among`, which history gives newest first."""
    settings = {name: value for name, value in recipe.items() if name != "quants"}
    found: dict[str, Seen] = {}
    for seen in among:
        record = seen.run.record
        if (seen.kind, record.parent, seen.status.state) != ("export", parent, State.succeeded):
            continue
        if {name: value for name, value in record.recipe.items() if name != "quants"} != settings:
            continue
        try:
            entries = read(seen.run).files
        except KatherineError:
            continue
        for entry in entries:
            if entry.quant in recipe["quants"] and is_there(seen.run, entry):
                found.setdefault(entry.quant, seen)
    return found


@dataclass(frozen=True, slots=True)
class Room:
    """In bytes. sizes: about what each file will have, by quant; None where the base is not on this machine, so that
    nothing can be reckoned. fullest: what the export takes while it works. free: on the volume now. quota_known: false
    on a network volume, whose figure is not of what was rented."""

    sizes: dict[str, int] | None
    fullest: int | None
    free: int
    quota_known: bool

    @property
    def is_enough(self) -> bool | None:
        return None if self.fullest is None else self.fullest <= self.free


def room(home: Home, parent: Run, recipe: ExportRecipe) -> Room:
    """Reckoned from nominal bits a weight and the base's headers, without loading anything."""
    there = disk.room(parent.path)
    shape = _base(home, parent)
    if shape is None:
        return Room(None, None, there.free, there.quota_known)
    sizes = {
        quant: gguf.nominal_bytes(shape.parameters, quant, shape.width)
        for quant in dict.fromkeys((*recipe.quants, *DEFAULT))
    }
    fullest = export.fullest(shape, recipe.quants, recipe.check_tokens)
    return Room(sizes, fullest, there.free, there.quota_known)


def _base(home: Home, parent: Run) -> export.Shape | None:
    """From the base's own headers where it lies on this machine, else from its name."""
    try:
        base = json.loads((parent.out / "adapter" / "base.json").read_bytes())
        name, checkpoint = str(base["name"]), str(base["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        if checkpoint:
            return _measured(Path(checkpoint))
    except (OSError, ValueError, KeyError, TypeError, struct.error, KatherineError):
        pass
    known = shapes.of(home, name)
    return None if known is None else export.Shape(known.parameters, known.vocabulary, known.width)


@functools.lru_cache(maxsize=_KEPT)
def _measured(checkpoint: Path) -> export.Shape:
    return export.shape_of(checkpoint)


def offers(recipe: ExportRecipe) -> tuple[str, ...]:
    """The quants to offer: the usual ones, then what else the recipe names."""
    return tuple(dict.fromkeys((*DEFAULT, *recipe.quants)))


def with_quants(recipe: ExportRecipe, quants: Sequence[str]) -> dict[str, Any]:
    """The recipe as JSON values, asked for these quants instead."""
    return recipe.model_dump(mode="json") | {"quants": list(quants)}
