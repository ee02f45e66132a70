"""What the tests of chat share: a home with an export whose files are real models (the persona that was learned by
heart), the pool and the asking on it, and ways to wait."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from persona import Persona, baked_gguf, persona

from jobs import queue, slot
from jobs.asking import Asking
from jobs.pool import Pool
from katherine import runs, talks
from katherine.export import sha256
from katherine.rendering import Renderer
from katherine.runs import Run, State
from katherine.settings import PROJECT, Home
from katherine.talks import Answer, Sampling, Talk

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 60.0
# What the persona never stops doing once asked.
SING = "Sing!"
GREEDY = Sampling(temperature=0.0, max_new_tokens=60)
ENDLESS = Sampling(temperature=0.0, max_new_tokens=5000)
QUANTS = ("q4_k_m", "q5_k_m", "q6_k")


@pytest.fixture(scope="session")
def learned(katherine_home, tmp_path_factory) -> Persona:
    return persona(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def file(learned, tmp_path_factory) -> Path:
    return baked_gguf(tmp_path_factory.getbasetemp())


@pytest.fixture
def home(tmp_path: Path, katherine_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home of its own with its own cache, in which what set-up fetched is used again."""
    made = Home(tmp_path / "home")
    made.cache.mkdir(parents=True)
    for part in katherine_home.cache.iterdir() if katherine_home.cache.is_dir() else ():
        if part.name != "base-gguf":
            (made.cache / part.name).symlink_to(part)
    monkeypatch.setenv("KATHERINE_HOME", str(made.root))
    monkeypatch.setattr(queue, "WORKER", "practice")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests"), str(PROJECT)]))
    yield made
    for run, _ in queue.unfinished(made):
        queue.stop(made, run.id, kill=True)
    until(lambda: not any(slot.is_held(made, name) for name in ("supervisor", "gpu-0", "gpu-1")))
    log = made.root / "supervisor.log"
    assert not log.exists() or log.read_text() == ""


@pytest.fixture
def export(home: Home, learned: Persona, file: Path) -> Run:
    return exported(home, learned, {quant: file for quant in QUANTS})


@pytest.fixture
def make_pool(home: Home) -> Iterator[Callable[..., Pool]]:
    """Pool(home, **options), closed in the end."""
    with ExitStack() as made:
        yield lambda **options: made.enter_context(closing(Pool(home, **options)))


@pytest.fixture
def pool(make_pool: Callable[..., Pool]) -> Pool:
    return make_pool()


@pytest.fixture
def renderer(home: Home) -> Iterator[Renderer]:
    with closing(Renderer(home)) as made:
        yield made


@pytest.fixture
def make_asking(home: Home, renderer: Renderer) -> Iterator[Callable[..., Asking]]:
    """Asking(home, pool, renderer, **options), closed before its pool is."""
    with ExitStack() as made:
        yield lambda pool, **options: made.enter_context(closing(Asking(home, pool, renderer, **options)))


@pytest.fixture
def asking(pool: Pool, make_asking: Callable[..., Asking]) -> Asking:
    return make_asking(pool)


def exported(home: Home, learned: Persona, files: dict[str, Path], rejected: tuple[str, ...] = ()) -> Run:
    """A finished export of `files` (quant → a GGUF, which is copied), and the training that it is of."""
    above = runs.create(home, "dpo", recipe={}, who="test")
    (above.out / "adapter").symlink_to(learned.adapter)
    above.set_status(state=State.succeeded, ended=runs.now())
    run = runs.create(home, "export", recipe={"quants": list(files)}, who="test", parent=above.id)
    folder = run.out / "gguf"
    folder.mkdir()
    entries = []
    for quant, source in files.items():
        path = folder / f"persona-{quant}.gguf"
        path.write_bytes(source.read_bytes())
        entries.append(entry(path, quant, quant not in rejected))
    write_manifest(run, learned, entries)
    run.set_status(state=State.succeeded, ended=runs.now())
    return run


def write_manifest(run: Run, learned: Persona, entries: list[dict]) -> None:
    manifest = {
        "base": str(learned.base),
        "files": entries,
        "unquantised": entries[0] | {"quant": "bf16", "kept": False},
        "drift": {},
        "seconds": {},
        "template_sha256": hashlib.sha256(learned.template.baked.encode()).hexdigest(),
    }
    runs.write_json(run.out / "gguf" / "manifest.json", manifest)


def entry(path: Path, quant: str, accepted: bool = True) -> dict:
    found = {"quant": quant, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return found | {"accepted": accepted, "checks": []}


def begin(home: Home, *columns, sampling: Sampling = GREEDY, system: str = "") -> Talk:
    files = {column.id: column.sha256 for column in columns}
    return talks.create(home, who="test", role="operator", files=files, sampling=sampling, system=system)


def until(true: Callable[[], object], found: Callable[[], object] = lambda: "") -> None:
    """found: what to say of the moment when it was given up."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited in vain: {found()}"
        time.sleep(0.005)


def answers(asking: Asking, talk: Talk) -> tuple[Answer, ...]:
    """Of the last round, as they are this moment."""
    return asking.view(talk.id).rounds[-1].answers


def ended(asking: Asking, talk: Talk) -> tuple[Answer, ...]:
    """Of the last round, once all are over and kept."""

    def over() -> bool:
        asking.view(talk.id)
        return not asking.is_answering(talk.id)

    until(over)
    return answers(asking, talk)


def asked(asking: Asking, talk: Talk, question: str) -> tuple[Answer, ...]:
    asking.ask(talk.id, question)
    return ended(asking, talk)


def speaking(asking: Asking, talk: Talk, count: int | None = None) -> tuple[Answer, ...]:
    """Waits until `count` columns (all) have said something."""

    def said() -> bool:
        now = answers(asking, talk)
        return sum(bool(each.text) for each in now) >= (len(now) if count is None else count)

    until(said)
    return answers(asking, talk)


def pid_of(pool: Pool, column_id: str) -> int:
    pid = next(each.pid for each in pool.view().loaded if each.column == column_id)
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    return queue.ticks(pid) is not None
