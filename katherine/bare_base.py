"""The bare base of an export as a GGUF to talk to: its own checkpoint, converted once, with the same baked template and
end-of-turn as the export, in a type that loses next to nothing. What columns there are is columns'."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from katherine import adapters, columns, export, gguf, manifests, merge, runs
from katherine.columns import BaseFile, Column
from katherine.engines import Engine
from katherine.errors import DataError, ExportError, KatherineError, NotFound
from katherine.examples import Message
from katherine.progress import Progress, Stopped
from katherine.settings import Home
from katherine.template import ChatTemplate

# A third of 16 bits; at 9B it differs from them by less than any quant that is compared with it (KL 0.001 and less).
QUANT = "q6_k"
# What the converter reads beside tokenizer and configuration, which are baked.
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?")
# Enough to see that it says something, and seconds even at 9B on few cores.
_ANSWER = 16


def make(home: Home, export_run_id: str, progress: Progress) -> Column:
    """The column of the export's bare base; makes its file first where there is none, or not a sound one.

    Raises NotFound where there is no such export, its adapter or its base are gone; DiskError, SetupError, or
    ExportError where the file cannot be made or does not answer. Then nothing is left behind.
    """
    run = runs.load(home, export_run_id)
    manifest = manifests.read(run)
    name = columns.base_name(manifest.base)
    folder = columns.base_folder(home, name)
    if there := columns.base_of(home, export_run_id):
        progress.phase("check")
        try:
            columns.verify(there)
            return there
        except DataError as error:
            progress.say(f"{error} It is made anew.")
    shutil.rmtree(folder, ignore_errors=True)
    trained_on = _base(home, run)
    checkpoint = Path(trained_on.checkpoint)
    template = ChatTemplate.load(checkpoint)
    gguf.converter(home)
    shape = export.shape_of(checkpoint)
    needed = int((shape.parameters * 2 + gguf.nominal_bytes(shape.parameters, QUANT, shape.width)) * export.MARGIN)
    export.require_room(folder.parent, needed, f"Making the file of the base {manifest.base}")
    with _draft(folder) as draft:
        full, file = draft / f"{gguf.UNQUANTISED}.gguf", f"{export.slug(manifest.base)}-base-{QUANT}.gguf"
        _phase(progress, "convert")
        with _baked(checkpoint, template) as source:
            without_mtp = export.has_mtp(trained_on.model_class)
            gguf.convert(home, source, full, progress, name=export.slug(manifest.base), without_mtp=without_mtp)
        _phase(progress, f"quantise {QUANT}")
        gguf.quantise(full, draft / file, QUANT, progress)
        full.unlink()
        _phase(progress, "check")
        progress.say(f"Asked who it is, it says: {_answer(draft / file, template)!r}")
        made = BaseFile(
            base=manifest.base,
            quant=QUANT,
            file=file,
            bytes=(draft / file).stat().st_size,
            sha256=export.sha256(draft / file),
            template_sha256=hashlib.sha256(template.baked.encode()).hexdigest(),
        )
        runs.write_json(draft / export.MANIFEST, msgspec.to_builtins(made))
    column = columns.base_of(home, export_run_id)
    if column is None:
        raise ExportError(f"{folder} was removed while it was made: make it again.")
    return column


def _phase(progress: Progress, name: str) -> None:
    if progress.stop_requested():
        raise Stopped
    progress.phase(name)


def _base(home: Home, run: runs.Run) -> adapters.Base:
    """What the export's adapter was trained on."""
    if run.record.parent is None:
        raise NotFound(f"Export {run.id} does not say which training it is of: its base is not known.")
    return adapters.base_of(home, runs.load(home, run.record.parent).out / "adapter")


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A folder beside its place that takes it when all is well, and is gone otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            # Somebody else was faster: theirs is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _baked(checkpoint: Path, template: ChatTemplate) -> Iterator[Path]:
    """The checkpoint as an export would leave it: the same weights, by links, beside the baked tokenizer files."""
    with tempfile.TemporaryDirectory(prefix="katherine-base-") as place:
        # The converter writes parts of the folder's name into the file.
        folder = Path(place) / "base"
        folder.mkdir()
        for path in checkpoint.iterdir():
            if _WEIGHTS.fullmatch(path.name):
                os.symlink(path.resolve(), folder / path.name)
        shutil.copyfile(checkpoint / "config.json", folder / "config.json")
        merge.bake(checkpoint, template, folder)
        yield folder


def _answer(path: Path, template: ChatTemplate) -> str:
    """What it says, on the processor alone: the GPU may be somebody's. Raises ExportError where it says nothing."""
    try:
        with Engine(path, gpu_layers=0) as engine:
            meta = engine.meta()
            if meta["template"] != template.baked or meta["end_of_turn"] != template.end_of_turn_id:
                raise ExportError("The base's file does not carry the baked template and its end-of-turn.")
            said = engine.complete(template.prompt([Message("user", "Who are you?")]), max_new_tokens=_ANSWER)
    except KatherineError as error:
        raise ExportError(f"The base's file was made, but cannot be talked to: {error}") from error
    if not said.finish.tokens or not said.text.strip():
        raise ExportError("The base's file was made, but says nothing: is this a chat (instruct) model?")
    return said.text
