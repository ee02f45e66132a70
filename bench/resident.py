"""An export's files in the pool that chat has, all at once: how long until each is loaded and says its first word, how
many tokens a second they make together and alone, and what they take of the card. Part of `app.py bench gpu`, whose
base is random: a file that its checks refused is timed as well."""

import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from jobs.pool import Pool
from katherine import columns, gpu, manifests
from katherine.columns import Column
from katherine.examples import Message
from katherine.rendering import Renderer
from katherine.runs import Run
from katherine.settings import Home

QUESTION = "Tell me a long story about a lighthouse, a cat and a storm."
TOKENS = 128


@dataclass(frozen=True, slots=True)
class Said:
    """first: seconds from the question to the first word, loading included. rate: tokens a second after it, None where
    the model ended at once."""

    first: float
    tokens: int
    rate: float | None


def measure(home: Home, export: Run) -> dict[str, Any]:
    """One question to all files of the export: cold, again when all are loaded, and to each alone. GiB are the card's,
    beyond what it held before."""
    manifest = manifests.read(export)
    chosen = [columns.of_entry(export, manifest, entry) for entry in manifest.files]
    with closing(Renderer(home)) as renderer:
        ids = {each.id: renderer.prompt(each.base, [Message("user", QUESTION)]) for each in chosen}
    before = _used()
    with closing(Pool(home)) as pool:
        cold = _together(pool, chosen, ids)
        loaded = _together(pool, chosen, ids)
        alone = [_ask(pool, each, ids[each.id], time.monotonic()) for each in chosen]
        view, used = pool.view(), _used()
    return {
        "on_gpu": view.on_gpu,
        "resident": len(view.loaded),
        "gib": None if used is None or before is None else (used - before) / 2**30,
        "reckoned_gib": view.used / 2**30,
        "files": [each.quant for each in chosen],
        "cold": [asdict(each) for each in cold],
        "loaded": [asdict(each) for each in loaded],
        "alone": [asdict(each) for each in alone],
    }


def words(figures: dict[str, Any]) -> str:
    """The same in one line."""

    def rate(rows: list[dict[str, Any]]) -> str:
        known = [row["rate"] for row in rows if row["rate"]]
        return f"{statistics.median(known):.0f}" if known else "no"

    first = {name: max(row["first"] for row in figures[name]) for name in ("cold", "loaded")}
    memory = "" if figures["gib"] is None else f", {figures['gib']:.1f} GiB"
    return (
        f"{figures['resident']} files resident on {'the GPU' if figures['on_gpu'] else 'the processor'}{memory}; "
        f"first words of all {first['cold']:.1f} s cold, {first['loaded']:.2f} s loaded; "
        f"each {rate(figures['loaded'])} tokens/s together, {rate(figures['alone'])} alone"
    )


def _together(pool: Pool, chosen: Sequence[Column], ids: dict[str, list[int]]) -> list[Said]:
    for each in chosen:
        pool.expect(each.id)
    began = time.monotonic()
    with ThreadPoolExecutor(len(chosen)) as threads:
        said = list(threads.map(lambda each: _ask(pool, each, ids[each.id], began), chosen))
    for each in chosen:
        pool.forget(each.id)
    return said


def _ask(pool: Pool, column: Column, ids: list[int], began: float) -> Said:
    first = 0.0
    with pool.lend(column, lambda state, why: None, threading.Event()) as engine:
        reply = engine.generate(ids, max_new_tokens=TOKENS, threads=pool.threads())
        for _ in reply:
            first = first or time.monotonic() - began
    finish = reply.finish
    assert finish is not None
    if finish.first_token_seconds is None or finish.tokens < 2:
        return Said(first, finish.tokens, None)
    return Said(first, finish.tokens, (finish.tokens - 1) / (finish.seconds - finish.first_token_seconds))


def _used() -> int | None:
    card = gpu.mine()
    return card.memory_used if card else None
