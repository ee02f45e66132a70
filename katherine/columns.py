"""What can be talked to: the quants of every export, its unquantised file where it was kept, and the bare base. Only
files that this project made and whose sha256 is the one in their manifest. Loading them is jobs.pool's, making a
base's file bare_base's."""

import functools
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from katherine import export, gguf, manifests, runs
from katherine.errors import DataError, KatherineError, NotFound
from katherine.history import Seen
from katherine.manifests import Entry, Manifest
from katherine.runs import Run, State
from katherine.settings import Home

_BASE = "base"
# A home has a base or two.
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Column:
    """One GGUF. id: "<export's run id>:<quant>", or "base:<name>". export: the run that made it, None for a base.
    base: whose template its prompts are made with, as bases.tokenizer takes it. bytes, sha256: as its manifest says.
    template_sha256: of the baked template that it was made with, "" where its manifest does not say."""

    id: str
    export: str | None
    quant: str
    base: str
    path: Path
    bytes: int
    sha256: str
    template_sha256: str = ""


class BaseFile(msgspec.Struct, frozen=True):
    """The manifest beside a bare base's file. base: as the exports that share it name it. file: a plain name."""

    base: str
    quant: str
    file: str
    bytes: int
    sha256: str
    template_sha256: str


def of_export(home: Home, run: Run) -> list[Column]:
    """The export's files that were accepted and are there at their full length, the unquantised last; none where there
    is no sound manifest. Cheap: nothing is hashed."""
    try:
        manifest = manifests.read(run)
    except KatherineError:
        return []
    entries = [entry for entry in _offered(manifest) if manifests.is_there(run, entry)]
    return [of_entry(run, manifest, entry) for entry in entries]


def everyone(home: Home, among: Sequence[Seen]) -> list[Column]:
    """Those of all exports of `among` that succeeded, in its order; then the bases that were made."""
    found = []
    for seen in among:
        if seen.kind == "export" and seen.status.state is State.succeeded:
            found += of_export(home, seen.run)
    for path in sorted(_bases(home).glob(f"[!.]*/{export.MANIFEST}")):
        with suppress(KatherineError):
            found.append(_base(home, path.parent.name))
    return found


def get(home: Home, column_id: str) -> Column:
    """Raises NotFound for an id that names nothing that may be talked to, DataError where its file or manifest is
    damaged. Cheap: nothing is hashed."""
    owner, found, name = column_id.partition(":")
    if not found:
        raise NotFound(f"{column_id!r} is no column: give an export's run and its quant, as in RUN:q4_k_m.")
    if owner == _BASE:
        return _base(home, name)
    run = runs.load(home, owner)
    state = run.status().state
    if run.record.kind != "export" or state is not State.succeeded:
        raise NotFound(f"Run {run.id} is no finished export ({run.record.kind}, {state}).")
    manifest = manifests.read(run)
    entry = next((entry for entry in _offered(manifest) if entry.quant == name), None)
    if entry is None:
        raise NotFound(f"Export {run.id} has no accepted file {name!r}.")
    column = of_entry(run, manifest, entry)
    if not manifests.is_there(run, entry):
        raise DataError(f"{column.path} is not there any more, or not at its full length: export again.")
    return column


def verify(column: Column) -> None:
    """Hashes the file, unless it is known not to have changed since. Raises DataError where it is not the one that its
    manifest names. Takes seconds a GB: never in a handler."""
    if not export.is_unchanged(column.path, column.bytes, column.sha256):
        raise DataError(f"{column.path} is not the file of its manifest any more (length or sha256): export again.")


def check_template(column: Column, carried: str | None) -> None:
    """carried: the chat template that the loaded file says it has. It is never rendered here, where prompts are the
    template module's; but other programs will render it, so a file with another one than was baked is not what was
    exported, whatever its sha256. Raises DataError."""
    found = hashlib.sha256((carried or "").encode()).hexdigest()
    if column.template_sha256 and found != column.template_sha256:
        raise DataError(f"{column.path} carries another chat template than the one it was made with: export again.")


def title(column: Column) -> str:
    if column.export is None:
        return f"base, {column.quant}"
    return f"{column.quant} (unquantised)" if column.quant == gguf.UNQUANTISED else column.quant


def base_of(home: Home, export_run_id: str) -> Column | None:
    """The bare base of that export, once its file was made. Raises NotFound or DataError where there is no such
    export."""
    name = base_name(manifests.read(runs.load(home, export_run_id)).base)
    try:
        return _base(home, name)
    except KatherineError:
        return None


def base_name(base: str) -> str:
    """What a base's column is called: readable, and another for two bases whose folders go by the same name."""
    return f"{export.slug(base)}-{hashlib.sha256(base.encode(errors='surrogateescape')).hexdigest()[:8]}"


def base_folder(home: Home, name: str) -> Path:
    return _bases(home) / name


def _bases(home: Home) -> Path:
    return home.cache / "base-gguf"


def _offered(manifest: Manifest) -> list[Entry]:
    accepted = [entry for entry in manifest.files if entry.accepted]
    return sorted(accepted, key=lambda entry: entry.quant == gguf.UNQUANTISED)


def of_entry(run: Run, manifest: Manifest, entry: Entry) -> Column:
    """The column that a file of that manifest is, accepted or not: who lets people talk to it asks that."""
    return Column(
        id=f"{run.id}:{entry.quant}",
        export=run.id,
        quant=entry.quant,
        base=manifest.base,
        path=run.out / "gguf" / entry.file,
        bytes=entry.bytes,
        sha256=entry.sha256,
        template_sha256=manifest.template_sha256,
    )


def _base(home: Home, name: str) -> Column:
    # The name may come from a page: it is compared with those that there are, and no path is made of it.
    folder = next((path for path in _bases(home).glob("[!.]*") if path.name == name), None)
    if folder is None:
        raise NotFound(f"There is no file of a bare base {name!r}. `python app.py base EXPORT` makes one.")
    path = folder / export.MANIFEST
    try:
        at = path.stat()
        made = _read(path, at.st_mtime_ns, at.st_size)
        whole = (folder / made.file).stat().st_size == made.bytes
    except OSError:
        whole = False
    if not whole:
        raise DataError(f"{folder} is not complete any more: remove it, and make the base's file again.")
    return Column(
        id=f"{_BASE}:{name}",
        export=None,
        quant=made.quant,
        base=made.base,
        path=folder / made.file,
        bytes=made.bytes,
        sha256=made.sha256,
        template_sha256=made.template_sha256,
    )


@functools.lru_cache(maxsize=_KEPT)
def _read(path: Path, changed: int, size: int) -> BaseFile:
    try:
        made = msgspec.json.decode(path.read_bytes(), type=BaseFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove its folder, and make the base's file again.") from error
    if Path(made.file).name != made.file or made.file in ("", ".", ".."):
        raise DataError(f"{path} names {made.file!r}, which is no plain file name: remove its folder.")
    return made
