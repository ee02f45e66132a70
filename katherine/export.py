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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from katherine import acceptance, adapters, corpus, engines, gguf, runs, scratch
from katherine.disk import room
from katherine.errors import DataError, DiskError, ExportError, NotFound, RecipeError
from katherine.parts import Parts
from katherine.progress import Progress, Stopped
from katherine.recipe import ExportRecipe
from katherine.settings import home
from katherine.template import ChatTemplate

MANIFEST = "manifest.json"
# Beside the parts in the manifest's seconds, several of which pass at once.
TOTAL = "total"
# Bytes between two looks at whether to stop, a few milliseconds of hashing.
_BLOCK = 16 * 2**20
# Headers, vocabularies and the file system's own rounding; measured they are under 1%.
MARGIN = 1.03
# transformers' classes whose multi-token prediction is dropped on saving, so that the converter must not expect it.
_WITH_MTP = re.compile(r"Qwen3_5|Qwen3Next")


def export(adapter: Path, dataset: Path, recipe: ExportRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Writes out/gguf/*.gguf and its manifest, and returns the manifest.

    `adapter` is a training run's adapter folder (with base.json), `dataset` the dataset folder it was trained on.
    Starts over where an earlier attempt was interrupted. A file that fails a check is kept and marked.

    Raises RecipeError (unknown type), NotFound, DataError, SetupError, DiskError, ExportError; Stopped.
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

    folder, disk = out / "gguf", out / "scratch"
    # "merged" is what the export of an earlier version left where it was interrupted.
    for earlier in (folder, disk, out / "merged"):
        shutil.rmtree(earlier, ignore_errors=True)
    rows = sum(len(e.positions) for e in examples)
    shape = shape_of(checkpoint)
    name = slug(base.name)
    parts = Parts(progress)
    begun = time.monotonic()
    try:
        with scratch.in_memory(out.parent.name) as memory:
            # Both are read again at once and then thrown away, which a disk is too slow for: 36 GB at 9B.
            sixteen, logprobs = int(shape.parameters * 2 * MARGIN), rows * shape.vocabulary * 4
            merged_in = memory if memory and scratch.is_ample(memory, sixteen) else disk
            both = not recipe.keep_unquantised and memory and scratch.is_ample(memory, 2 * sixteen + logprobs)
            work = memory if memory and both else disk
            require_room(out, fullest(shape, recipe.quants, rows, merged_in is disk, work is disk), "The export")
            for each in (folder, merged_in, work):
                each.mkdir(parents=True, exist_ok=True)
            merged, reference = merged_in / "merged", work / "reference.f32"
            unquantised = (folder if recipe.keep_unquantised else work) / f"{name}-{gguf.UNQUANTISED}.gguf"
            with parts.part("merge") as part:
                samples = [e.rendered for e in examples]
                drift = merge.merge(adapter, base, template, samples, merged, part, max_kl=recipe.max_kl)
                part.say(f"Drift from base and adapter: {drift.kl:.5f} nats a token, top-1 {drift.top1:.1%}.")
            with parts.part("convert") as part:
                without_mtp = has_mtp(base.model_class)
                tensors = gguf.convert(place, merged, unquantised, part, name=name, without_mtp=without_mtp)
                shutil.rmtree(merged)
            with parts.part("measure") as part:
                with ThreadPoolExecutor(len(recipe.quants)) as pool:
                    found = list(pool.map(lambda quant: gguf.reckon(unquantised, quant, part), recipe.quants))
                reckoned = dict(zip(recipe.quants, found, strict=True))
                left = logprobs if work is disk else 0
                require_room(out, int(sum(each.size for each in reckoned.values()) * MARGIN) + left, "Quantising")
            reference.touch()
            judge = functools.partial(
                acceptance.examine,
                template=template,
                examples=examples,
                recipe=recipe,
                reference=reference,
                tensors=tensors,
            )
            drifted = acceptance.Check(
                "drift",
                drift.passed,
                f"merged, {drift.kl:.5f} nats a token from base and adapter (at most {drift.tolerance}: "
                f"{drift.reason})",
            )
            full, files = _quantise_and_check(unquantised, folder, name, reckoned, drifted, judge, parts)
    except Stopped:
        # It starts over, whatever was made.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        # 18 GB at 9B, and perhaps half a file.
        (folder / f"{name}-{gguf.UNQUANTISED}.gguf").unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    manifest = {
        "base": base.name,
        "adapter_sha256": sha256(adapter / adapters.WEIGHTS),
        "template_sha256": hashlib.sha256(template.baked.encode()).hexdigest(),
        "drift": asdict(drift) | {"kl": drift.kl if math.isfinite(drift.kl) else None, "passed": drift.passed},
        "versions": runs.versions(),
        "files": [full] * recipe.keep_unquantised + files,
        "unquantised": full | {"kept": recipe.keep_unquantised},
        "seconds": parts.seconds | {TOTAL: round(time.monotonic() - begun, 3)},
    }
    runs.write_json(folder / MANIFEST, manifest)
    return manifest


def _quantise_and_check(
    unquantised: Path,
    folder: Path,
    name: str,
    quants: Mapping[str, gguf.Reckoned],
    drifted: acceptance.Check,
    judge: Callable[..., acceptance.Examined],
    parts: Parts,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of the unquantised file, and those of the quants, in their order.

    The quants are made at once: llama.cpp looks through what it reads, and writes, in one thread, and the cores of one
    that does are free for another; so is a GPU that reckons for one while another is written. On a GPU each file is
    checked as soon as it is there, one at a time; on the processor, whose cores a check needs as much, after all were
    made. Raises ExportError, once the others are done with, where one of them cannot be made; Stopped.
    """
    on_gpu = engines.offloads()

    def make(quant: str) -> tuple[Path, str]:
        path = folder / f"{name}-{quant}.gguf"
        with parts.part(f"quantise {quant}") as part:
            quantise(unquantised, path, quant, quants[quant], part)
        # While others are at work; alone it would be seconds a file.
        return path, sha256(path, part.stop_requested)

    def check(path: Path, quant: str, architecture: str | None = None) -> acceptance.Examined:
        with parts.part(f"check {quant}") as part:
            found = judge(path, quant, progress=part, on_gpu=on_gpu, architecture=architecture)
            if quant == gguf.UNQUANTISED and not found.meta:
                raise ExportError(f"The converted file cannot be loaded: {found.checks[-1].finding}")
        found.checks.append(drifted)
        return found

    entries: dict[str, dict[str, Any]] = {}
    failed: dict[str, ExportError] = {}
    # One more than quants, for the unquantised file's sum.
    with ThreadPoolExecutor(1 + gguf.at_once(len(quants))) as pool:
        whole = pool.submit(sha256, unquantised, parts.stop_requested)
        made = {pool.submit(make, quant): quant for quant in quants}
        try:
            if not on_gpu:
                wait(made)
            first = check(unquantised, gguf.UNQUANTISED)
            for future in as_completed(made):
                quant = made[future]
                try:
                    path, sha = future.result()
                except ExportError as error:
                    failed[quant] = error
                    continue
                found = check(path, quant, first.meta["architecture"])
                entries[quant] = _entry(path, quant, found, sha, parts.seconds)
                _tell(parts, entries[quant])
            full = _entry(unquantised, gguf.UNQUANTISED, first, whole.result(), parts.seconds)
        except BaseException:
            parts.give_up()
            raise
    if failed:
        said = "\n".join(f"{quant}: {error}" for quant, error in failed.items())
        others = f" The others were: {', '.join(entries)}." if entries else ""
        raise ExportError(f"{len(failed)} of {len(quants)} files could not be made.{others}\n{said}")
    return full, [entries[quant] for quant in quants]


def quantise(unquantised: Path, path: Path, quant: str, reckoned: gguf.Reckoned, progress: Progress) -> None:
    """Writes `path`: by torch on a GPU, by llama.cpp's own quantiser where there is none, where another program has its
    memory, or where torch does not know a type. Raises ExportError or Stopped; `path` is then absent."""
    import torch

    from katherine import model, requantise

    if model.on_cuda() and requantise.is_able(reckoned):
        try:
            requantise.write(unquantised, path, quant, reckoned.kinds, progress)
            return
        except torch.OutOfMemoryError:
            progress.say(f"{quant} finds no room on the GPU: it is quantised on the processor.")
    gguf.quantise(unquantised, path, quant, progress)


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


def _entry(
    path: Path, quant: str, found: acceptance.Examined, sha: str, seconds: Mapping[str, float]
) -> dict[str, Any]:
    works = {work: seconds.get(f"{work} {quant}") for work in ("quantise", "check")}
    return {
        "quant": quant,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha,
        "bits_per_weight": found.bits_per_weight,
        "architecture": found.meta.get("architecture"),
        "tensors": found.meta.get("tensors"),
        "parameters": found.meta.get("parameters"),
        "accepted": found.accepted,
        "checks": [asdict(check) for check in found.checks],
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "seconds": {work: spent for work, spent in works.items() if spent is not None},
    }


def _tell(parts: Parts, entry: dict[str, Any]) -> None:
    if entry["accepted"]:
        parts.say(f"{entry['file']} is accepted: {entry['bits_per_weight']:.2f} bits a weight, KL {entry['kl']:.4f}.")
    for check in entry["checks"]:
        if not check["passed"]:
            parts.say(f"{entry['file']} is not accepted. {check['name']}: {check['finding']}.")


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


def fullest(
    shape: Shape, quants: Sequence[str], rows: int, merged_on_disk: bool = True, work_on_disk: bool = True
) -> int:
    """Bytes of disk at the export's fullest: either while converting (merged checkpoint and 16-bit GGUF), or while
    checking (16-bit GGUF, all quants, and `rows` of the reference's log-probabilities). What is kept in memory for want
    of nothing there needs no disk: the merged checkpoint, and the work files (16-bit GGUF and reference)."""
    sixteen = shape.parameters * 2
    small = sum(gguf.nominal_bytes(shape.parameters, name, shape.width) for name in quants)
    converting = sixteen * (merged_on_disk + work_on_disk)
    checking = small + (sixteen + rows * shape.vocabulary * 4) * work_on_disk
    return int(max(converting, checking) * MARGIN)


def require_room(out: Path, needed: int, what: str) -> None:
    """Raises DiskError where `out` has fewer bytes free than `what` needs."""
    free = room(out).free
    if free < needed:
        raise DiskError(
            f"{what} needs {needed / 1e9:.2f} GB at its fullest and there are {free / 1e9:.2f} GB free for {out}. "
            "Remove old runs, name fewer quants, or use a larger volume."
        )


# ---------------------------------------------------------------------- sameness


def sha256(path: Path, stop_requested: Callable[[], bool] = lambda: False) -> str:
    """A file's, which can be stopped: 18 GB take half a minute. Raises Stopped."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            if stop_requested():
                raise Stopped
    return found.hexdigest()


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
