"""An adapter into GGUF files that may be offered: room on the disk, merge, convert, quantise, accept, manifest.
The parts are merge's, gguf's and acceptance's work; this module owns their order, the files and the manifest."""

import functools
import hashlib
import json
import math
import re
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from katherine import acceptance, adapters, corpus, gguf, runs
from katherine.errors import DataError, DiskError, ExportError, NotFound, RecipeError
from katherine.progress import Progress, Stopped
from katherine.recipe import ExportRecipe
from katherine.settings import home
from katherine.template import ChatTemplate

MANIFEST = "manifest.json"
# Headers, vocabularies and the file system's own rounding; measured they are under 1%.
MARGIN = 1.03
# transformers' classes whose multi-token prediction is dropped on saving, so that the converter must not expect it.
_WITH_MTP = re.compile(r"Qwen3_5|Qwen3Next")


def export(adapter: Path, dataset: Path, recipe: ExportRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Writes out/gguf/*.gguf and its manifest, and returns the manifest.

    `adapter` is a training run's adapter folder (with base.json), `dataset` the dataset folder it was trained on.
    Starts over where an earlier attempt was interrupted. A file that fails a check is kept and marked.

    Raises RecipeError (unknown type), NotFound, DataError, SetupError, DiskError, ExportError; Stopped between parts.
    """
    from katherine import merge, model

    place = home()
    model.settle(place, progress)
    if wrong := gguf.wrong_types(recipe.quants):
        raise RecipeError(wrong)
    gguf.converter(place)
    base = adapters.base_of(place, adapter)
    checkpoint = Path(base.checkpoint)
    template = ChatTemplate.load(checkpoint)
    examples = acceptance.choose(template, corpus.conversations(dataset), recipe)
    if not examples:
        raise DataError(f"{dataset / 'sft.jsonl'} has no conversation that fits a context: nothing to check with.")

    folder, merged, reference = out / "gguf", out / "merged", out / "reference.f32"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(merged, ignore_errors=True)
    rows = sum(len(e.positions) for e in examples)
    shape = shape_of(checkpoint)
    check_room(out, shape, recipe.quants, rows)
    folder.mkdir(parents=True)
    seconds: dict[str, float] = {}
    part = functools.partial(_part, seconds, progress)
    name = slug(base.name)
    unquantised = folder / f"{name}-{gguf.UNQUANTISED}.gguf"
    try:
        with part("merge"):
            samples = [e.rendered for e in examples]
            drift = merge.merge(adapter, base, template, samples, merged, progress, max_kl=recipe.max_kl)
            progress.say(f"Drift from base and adapter: {drift.kl:.5f} nats a token, top-1 {drift.top1:.1%}.")
        with part("convert"):
            without_mtp = has_mtp(base.model_class)
            tensors = gguf.convert(place, merged, unquantised, progress, name=name, without_mtp=without_mtp)
            shutil.rmtree(merged)
        with part("measure"):
            sizes = gguf.sizes(unquantised, recipe.quants, progress)
            require_room(out, int(sum(sizes.values()) * MARGIN) + rows * shape.vocabulary * 4, "Quantising")
        reference.touch()
        judge = functools.partial(
            acceptance.examine,
            template=template,
            examples=examples,
            recipe=recipe,
            progress=progress,
            reference=reference,
            tensors=tensors,
        )
        drifted = acceptance.Check(
            "drift",
            drift.passed,
            f"merged, {drift.kl:.5f} nats a token from base and adapter (at most {drift.tolerance}: {drift.reason})",
        )
        with part(f"check {gguf.UNQUANTISED}"):
            first = judge(unquantised, gguf.UNQUANTISED)
            if not first.meta:
                raise ExportError(f"The converted file cannot be loaded: {first.checks[-1].finding}")
            first.checks.append(drifted)
        full = _entry(unquantised, gguf.UNQUANTISED, first, {"check": seconds[f"check {gguf.UNQUANTISED}"]})
        files = [full] if recipe.keep_unquantised else []
        for quant in recipe.quants:
            path = folder / f"{name}-{quant}.gguf"
            with part(f"quantise {quant}"):
                gguf.quantise(unquantised, path, quant, progress)
            with part(f"check {quant}"):
                found = judge(path, quant, architecture=first.meta["architecture"])
                found.checks.append(drifted)
            spent = {"quantise": seconds[f"quantise {quant}"], "check": seconds[f"check {quant}"]}
            files.append(_entry(path, quant, found, spent))
            _tell(progress, files[-1])
    except BaseException:
        # 18 GB at 9B, and perhaps half a file.
        unquantised.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(merged, ignore_errors=True)
        reference.unlink(missing_ok=True)
    if not recipe.keep_unquantised:
        unquantised.unlink()
    manifest = {
        "base": base.name,
        "adapter_sha256": sha256(adapter / adapters.WEIGHTS),
        "template_sha256": hashlib.sha256(template.baked.encode()).hexdigest(),
        "drift": asdict(drift) | {"kl": drift.kl if math.isfinite(drift.kl) else None, "passed": drift.passed},
        "versions": runs.versions(),
        "files": files,
        "unquantised": full | {"kept": recipe.keep_unquantised},
        "seconds": seconds,
    }
    runs.write_json(folder / MANIFEST, manifest)
    return manifest


def offered(manifest: Path) -> list[dict[str, Any]]:
    """The entries of a manifest that may be chatted with or pushed, each with its `path`: accepted, and the file is
    still the one that was accepted (size and sha256; a file is hashed again only when it changed).

    Raises NotFound where there is no manifest, DataError where it is damaged.
    """
    if not manifest.is_file():
        raise NotFound(f"There is no {manifest}: the export has not finished. Run it again.")
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        found = []
        for entry in entries:
            path = manifest.parent / Path(entry["file"]).name
            if entry["accepted"] is True and is_unchanged(path, entry["bytes"], entry["sha256"]):
                found.append(entry | {"path": str(path)})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged ({type(error).__name__}: {error}): export again.") from error
    return found


# ---------------------------------------------------------------------- parts


@contextmanager
def _part(seconds: dict[str, float], progress: Progress, name: str) -> Iterator[None]:
    if progress.stop_requested():
        raise Stopped
    progress.phase(name)
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 3)


def _entry(path: Path, quant: str, found: acceptance.Examined, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "quant": quant,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "bits_per_weight": found.bits_per_weight,
        "architecture": found.meta.get("architecture"),
        "tensors": found.meta.get("tensors"),
        "parameters": found.meta.get("parameters"),
        "accepted": found.accepted,
        "checks": [asdict(check) for check in found.checks],
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "seconds": seconds,
    }


def _tell(progress: Progress, entry: dict[str, Any]) -> None:
    if entry["accepted"]:
        progress.say(
            f"{entry['file']} is accepted: {entry['bits_per_weight']:.2f} bits a weight, KL {entry['kl']:.4f}."
        )
    for check in entry["checks"]:
        if not check["passed"]:
            progress.say(f"{entry['file']} is not accepted. {check['name']}: {check['finding']}.")


def has_mtp(model_class: str) -> bool:
    """Whether checkpoints of that class of transformers may hold multi-token prediction."""
    return bool(_WITH_MTP.match(model_class))


def slug(base: str) -> str:
    """The base's own name, fit for a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", Path(base).name.lower()).strip("-.") or "model"


# ---------------------------------------------------------------------- room


class Shape(msgspec.Struct, frozen=True):
    """What a checkpoint's files say about its size: weights in all (vision and prediction heads included)."""

    parameters: int
    vocabulary: int
    width: int


def shape_of(checkpoint: Path) -> Shape:
    """Read from the headers of its files. Raises NotFound where there are no safetensors."""
    parameters = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in _header(path).items():
            if name != "__metadata__":
                parameters += functools.reduce(int.__mul__, tensor["shape"], 1)
    if not parameters:
        raise NotFound(f"{checkpoint} holds no safetensors weights: give the base as safetensors.")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    return Shape(parameters, text["vocab_size"], text["hidden_size"])


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file begins with its header's length (8 bytes, little-endian) and that header as JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def fullest(shape: Shape, quants: Sequence[str], rows: int) -> int:
    """Bytes of disk at the export's fullest: either while converting (merged checkpoint and 16-bit GGUF), or while
    checking (16-bit GGUF, all quants, and `rows` of the reference's log-probabilities)."""
    sixteen = shape.parameters * 2
    small = sum(gguf.nominal_bytes(shape.parameters, name, shape.width) for name in quants)
    return int(max(2 * sixteen, sixteen + small + rows * shape.vocabulary * 4) * MARGIN)


def check_room(out: Path, shape: Shape, quants: Sequence[str], rows: int) -> None:
    """Raises DiskError where the export cannot fit at its fullest."""
    require_room(out, fullest(shape, quants, rows), "The export")


def require_room(out: Path, needed: int, what: str) -> None:
    """Raises DiskError where `out` has fewer bytes free than `what` needs."""
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskError(
            f"{what} needs {needed / 1e9:.2f} GB at its fullest and {place} has {free / 1e9:.2f} GB free. "
            "Remove old runs, name fewer quants, or use a larger volume."
        )


# ---------------------------------------------------------------------- sameness


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, written: int, changed: int, inode: int) -> str:
    """A GGUF's hash takes seconds: it is kept for as long as the file's size, times and inode are what they were. Of
    the times, anybody can set back the first, and nobody the second."""
    return sha256(path)


def is_unchanged(path: Path, size: int, expected: str) -> bool:
    """Whether the file has that size and sha256. Hashes it, unless it is known not to have changed since."""
    try:
        now = path.stat()
        known = now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino
        return now.st_size == size and _sha256_of(path, *known) == expected
    except OSError:
        return False
