"""Downloads: what of a run, a dataset or a talk may be taken away, and the routes that give it. A name from an address
is only ever compared with what is listed here; who may ask is the door's."""

import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import anyio
import msgspec
from fastapi import FastAPI, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from katherine import adapters, approval, audit, corpus, logs, manifests, publish, runs, scorecard, shelf, talks
from katherine.errors import DataError, NotFound
from katherine.runs import Run
from katherine.settings import Home

PREFIX = "/operator/files"
AUDIT = f"{PREFIX}/{audit.FILE}"
# Each piece is a hop to a thread and back on the loop that serves pages: at Starlette's 64 kB, 110,000 in 7 GB.
PIECE_BYTES = 1_000_000
# private: no cache on the way keeps a persona's weights. no-transform: nor compresses, which would lose the length.
HEADERS = {"Cache-Control": "private, no-cache, no-transform", "X-Content-Type-Options": "nosniff"}
LOG = "log.txt"
# Of a probe run: made of its answers when it is asked for.
RESULTS = "results.csv"
# Of a dataset, beside its problems as CSV. None of them ever changes.
DATASET_FILES = ("problems.jsonl", "rejects.jsonl", "report.json", "sft.jsonl", "dpo.jsonl")


@dataclass(frozen=True, slots=True)
class File:
    """name: as in the address below the run's, and in `files`. path: where it lies. saved_as: what the browser calls
    it. grows: it may be written to meanwhile."""

    name: str
    path: Path
    saved_as: str
    grows: bool = False

    @property
    def bytes(self) -> int | None:
        try:
            return self.path.stat().st_size
        except OSError:
            return None


def files(run: Run) -> list[File]:
    """Everything of the run that may be taken away and is there, as plain files inside its folder: what was asked,
    measured, logged and made. Of GGUFs those that its manifest names, accepted or not."""
    top = {
        "run.json": False,
        "result.json": False,
        "metrics.jsonl": True,
        "out/answers.jsonl": True,
        "out/probes.toml": False,
        "out/gguf/manifest.json": False,
    }
    found = [
        File(Path(name).name, run.path / name, f"{run.id}-{Path(name).name}", grows) for name, grows in top.items()
    ]
    found += [File(f"adapter/{name}", run.out / "adapter" / name, name) for name in adapters.FILES]
    try:
        named = [entry.file for entry in manifests.read(run).files]
    except (NotFound, DataError):
        named = []
    found += [File(f"gguf/{name}", run.out / "gguf" / name, name) for name in named]
    return [file for file in found if _is_ours(run, file.path)]


def address(run_id: str, name: str) -> str:
    """The path on this panel under which the file is downloaded."""
    return f"{PREFIX}/runs/{quote(run_id, safe='')}/{quote(name)}"


def dataset_address(dataset_id: str, name: str) -> str:
    """The same for a file of a dataset: "problems.csv" or one of DATASET_FILES."""
    return f"{PREFIX}/datasets/{quote(dataset_id, safe='')}/{quote(name)}"


def export_address(export_id: str, name: str) -> str:
    """The same for what was said and sent of an export: "approval.json", or "pushes/<receipt>.json"."""
    return f"{PREFIX}/exports/{quote(export_id, safe='')}/{quote(name)}"


def talk_address(talk_id: str, ending: str) -> str:
    """The same for a talk's transcript; ending: "json" or "md"."""
    return f"{PREFIX}/talks/{quote(talk_id, safe='')}.{ending}"


def log_parts(run: Run) -> list[Path]:
    """The parts of the log, oldest first: one download."""
    return [path for path in logs.parts(run) if _is_ours(run, path)]


def add_routes(app: FastAPI, home: Home) -> None:
    """Adds the downloads under PREFIX. Call it before /operator is mounted, or the page answers first."""

    @app.api_route(PREFIX + "/runs/{run_id}/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    def run_file(request: Request, run_id: str, name: str) -> Response:
        try:
            run = runs.load(home, run_id)
        except NotFound:
            return _nothing("There is no such run.")
        except DataError as error:
            return PlainTextResponse(str(error), 409, HEADERS)
        if name == LOG:
            return _snapshot(log_parts(run), f"{run.id}-{LOG}", request) if log_parts(run) else _nothing("No log yet.")
        if name == RESULTS and run.record.kind == "probe":
            try:
                text = "".join(scorecard.as_csv(scorecard.read(run)))
            except DataError as error:
                return PlainTextResponse(str(error), 409, HEADERS)
            headers = HEADERS | {"Content-Disposition": f'attachment; filename="{run.id}-{RESULTS}"'}
            return Response(text.encode(errors="replace"), headers=headers, media_type="text/csv; charset=utf-8")
        for file in files(run):
            if file.name == name:
                return _snapshot([file.path], file.saved_as, request) if file.grows else Whole.of(file)
        return _nothing("There is no such file in this run.")

    @app.api_route(PREFIX + "/datasets/{dataset_id}/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def dataset_file(request: Request, dataset_id: str, name: str) -> Response:
        try:
            folder = corpus.folder(home, dataset_id)
        except NotFound:
            return _nothing("There is no such dataset.")
        if name == "problems.csv":
            headers = HEADERS | {"Content-Disposition": f'attachment; filename="{dataset_id}-{name}"'}
            rows = iter(()) if request.method == "HEAD" else shelf.problems_csv(home, dataset_id)
            return StreamingResponse(rows, headers=headers, media_type="text/csv; charset=utf-8")
        if name in DATASET_FILES:
            return Whole.of(File(name, folder / name, f"{dataset_id}-{name}"))
        return _nothing("There is no such file of this dataset.")

    @app.api_route(PREFIX + "/talks/{talk_id}.{ending}", methods=["GET", "HEAD"], include_in_schema=False)
    def transcript(talk_id: str, ending: str) -> Response:
        try:
            talk = talks.load(home, talk_id)
        except NotFound:
            return _nothing("There is no such talk.")
        except DataError as error:
            return PlainTextResponse(str(error), 409, HEADERS)
        titles = talks.titles(home, talk)
        if ending == "json":
            text = json.dumps(talks.transcript(talk, titles), indent=2, ensure_ascii=False)
        elif ending == "md":
            text = talks.markdown(talk, titles)
        else:
            return _nothing("A talk is given as .json or .md.")
        headers = HEADERS | {"Content-Disposition": f'attachment; filename="talk-{talk.id}.{ending}"'}
        kind = "application/json" if ending == "json" else "text/markdown; charset=utf-8"
        return Response(text.encode(errors="backslashreplace"), headers=headers, media_type=kind)

    @app.api_route(AUDIT, methods=["GET", "HEAD"], include_in_schema=False)
    def audit_log(request: Request) -> Response:
        path = audit.path(home)
        return _snapshot([path], path.name, request) if path.is_file() else _nothing("Nothing has been logged yet.")

    @app.api_route(PREFIX + "/exports/{export_id}/approval.json", methods=["GET", "HEAD"], include_in_schema=False)
    def approval_file(export_id: str) -> Response:
        try:
            path = approval.stored(home, runs.load(home, export_id).id)
        except (NotFound, DataError):
            return _nothing("There is no such export.")
        return Whole.of(File("approval.json", path, f"{export_id}-approval.json"))

    @app.api_route(
        PREFIX + "/exports/{export_id}/pushes/{receipt_id}.json", methods=["GET", "HEAD"], include_in_schema=False
    )
    def receipt_file(export_id: str, receipt_id: str) -> Response:
        try:
            found = publish.receipts(home, export_id)
        except (NotFound, DataError):
            return _nothing("There is no such export.")
        for receipt in found:
            if receipt.id == receipt_id:
                content = msgspec.json.format(msgspec.json.encode(receipt), indent=2)
                headers = HEADERS | {"Content-Disposition": f'attachment; filename="push-{receipt.id}.json"'}
                return Response(content, headers=headers, media_type="application/json")
        return _nothing("There is no such receipt.")

    @app.api_route(PREFIX + "/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
    def nothing(rest: str) -> Response:
        return _nothing("There is no such file.")


class Whole(FileResponse):
    """A file that no longer changes: with its length, an ETag, and ranges, so that a broken download goes on."""

    chunk_size = PIECE_BYTES

    @classmethod
    def of(cls, file: File) -> "Response":
        try:
            found = file.path.stat()
        except OSError:
            return _nothing("The file has just gone.")
        return cls(file.path, headers=HEADERS, media_type=_type(file.name), filename=file.saved_as, stat_result=found)


def _snapshot(paths: list[Path], saved_as: str, request: Request) -> Response:
    """Files that may be growing, one after another, each as long as it is now. All are opened before a byte is sent:
    a log that is rotated meanwhile is still whole."""
    stack = ExitStack()
    opened: list[tuple[BinaryIO, int]] = []
    for path in paths:
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            continue  # rotated away since it was listed
        opened.append((file, os.fstat(file.fileno()).st_size))
    headers = HEADERS | {
        "Content-Length": str(sum(size for _, size in opened)),
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(saved_as, safe='')}",
    }
    if request.method == "HEAD":
        stack.close()
        return Response(headers=headers, media_type=_type(saved_as))

    async def pieces() -> AsyncIterator[bytes]:
        with stack:
            for file, size in opened:
                while size:
                    piece = await anyio.to_thread.run_sync(file.read, min(size, PIECE_BYTES))
                    if not piece:
                        raise RuntimeError(f"{saved_as} was cut short while it was downloaded")
                    size -= len(piece)
                    yield piece

    return StreamingResponse(pieces(), headers=headers, media_type=_type(saved_as))


def _nothing(why: str) -> Response:
    return PlainTextResponse(f"{why}\n", 404, HEADERS)


def _type(name: str) -> str:
    suffix = Path(name).suffix
    if suffix == ".json":
        return "application/json"
    return "text/plain; charset=utf-8" if suffix in (".txt", ".jsonl") else "application/octet-stream"


def _is_ours(run: Run, path: Path) -> bool:
    """A plain file at the end of plain folders below the run's: no link leads elsewhere, at any level."""
    place = run.path
    for part in path.relative_to(run.path).parts:
        place = place / part
        try:
            mode = place.lstat().st_mode
        except OSError:
            return False
        if not (stat.S_ISREG(mode) if place == path else stat.S_ISDIR(mode)):
            return False
    return True


def listing(run: Run) -> list[dict[str, Any]]:
    """name, bytes and address of every file of the run, the log first: what a page links to."""
    parts = log_parts(run)
    whole = sum(size for path in parts if (size := File(LOG, path, LOG).bytes))
    log = [{"name": LOG, "bytes": whole, "address": address(run.id, LOG)}] if parts else []
    return log + [
        {"name": file.name, "bytes": file.bytes, "address": address(run.id, file.name)} for file in files(run)
    ]
