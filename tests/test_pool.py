"""The pool with real engines, a real queue, real kills: what is loaded, what has to wait, who gives way."""

import json
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from persona import TALKS
from talking import (
    QUANTS,
    entry,
    export,
    file,
    home,
    is_alive,
    learned,
    make_pool,
    pid_of,
    pool,
    until,
    write_manifest,
)
from test_autostop import KEY, countdowns, enable
from test_pod import runpod

from jobs import autostop, queue, slot
from jobs.pool import SURE, TICK, Pool, Taken, needs
from katherine import columns, engines, gpu, runs
from katherine.columns import Column
from katherine.engines import Engine
from katherine.errors import DataError, EngineError, KatherineError
from katherine.progress import Stopped
from katherine.runs import Run, State
from katherine.settings import PROJECT, Home

# ruff: noqa: F401, F811  (fixtures)

SECRET = "hf_not_for_engines"


class Heard:
    """What a borrower was told while it waited, and how it stops."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.stop = threading.Event()

    def __call__(self, state: str, note: str) -> None:
        self.said.append((state, note))

    def notes(self) -> set[str]:
        return {note for _, note in self.said if note}


def use(pool: Pool, column: Column, work: Callable[[Engine], object] = lambda engine: engine.pid) -> object:
    heard = Heard()
    with pool.lend(column, heard, heard.stop) as engine:
        return work(engine)


@pytest.fixture
def chosen(home: Home, export: Run) -> list[Column]:
    return columns.of_export(home, export)


def submit(home: Home) -> Run:
    """A run that its supervisor would begin at once."""
    return queue.submit(home, "sft", recipe={"of": 1}, who="test")


def waits(run: Run) -> None:
    """Until the supervisor has found the GPU held."""
    until(lambda: run.status().reason)


def test_an_engine_is_loaded_when_it_is_asked_for_and_used_again(home, pool, chosen, learned, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SOMEBODYS_API_KEY", SECRET)
    assert pool.view().loaded == () and not slot.is_held(home, "gpu-0")
    said = use(pool, chosen[0], lambda engine: engine.complete(learned.prompt("Who are you?"), max_new_tokens=60).text)
    assert said == TALKS[0][0][1]
    pid = pid_of(pool, chosen[0].id)
    assert use(pool, chosen[0]) == pid
    other = use(pool, chosen[1])
    view = pool.view()
    assert [(each.column, each.state) for each in view.loaded] == [(c.id, "ready") for c in chosen[:2]]
    assert view.used == sum(each.bytes for each in view.loaded) > 2 * chosen[0].bytes and view.free > 0
    held = slot.holder(home)
    assert held is not None and (held.what, held.run) == ("chat", None)
    for each in (pid, other):
        assert SECRET.encode() not in Path(f"/proc/{each}/environ").read_bytes()
        assert not [h for h in Path(f"/proc/{each}/fd").iterdir() if os.readlink(h).startswith("socket:")]
    pool.unload(chosen[0].id)
    until(lambda: not is_alive(pid))
    assert slot.is_held(home, "gpu-0")
    pool.close()
    until(lambda: not is_alive(other))
    assert not slot.is_held(home, "gpu-0")
    with pytest.raises(EngineError, match="ending"):
        use(pool, chosen[0])


def test_what_nobody_asks_is_unloaded_and_the_gpu_let_go(home, make_pool, chosen):
    pool = make_pool(idle=0.2)
    pid = use(pool, chosen[0])
    until(lambda: pool.view().loaded == ())
    assert not is_alive(pid)
    until(lambda: not slot.is_held(home, "gpu-0"))
    assert use(pool, chosen[0]) != pid


def test_a_column_is_lent_to_one_at_a_time(pool, chosen):
    first, second, third = Heard(), Heard(), Heard()

    def wait() -> int:
        with pool.lend(chosen[0], second, second.stop) as mine:
            return mine.pid

    with ThreadPoolExecutor() as others:
        with pool.lend(chosen[0], first, first.stop) as engine:
            got = others.submit(wait)
            until(lambda: ("waiting", "It is answering somebody else first.") in second.said)
            third.stop.set()
            with pytest.raises(Stopped), pool.lend(chosen[0], third, third.stop):
                pass
            assert not got.done()
        assert got.result(10) == engine.pid


def test_a_run_that_has_the_gpu_is_named_and_waited_for(home, pool, chosen):
    run = runs.create(home, "sft", recipe={}, who="test")
    run.set_status(state=State.succeeded, step=40, of=90)
    heard = Heard()
    with ThreadPoolExecutor() as others:
        with slot.take(home, "sft", run=run.id):

            def wait() -> int:
                with pool.lend(chosen[0], heard, heard.stop) as engine:
                    return engine.pid

            got = others.submit(wait)
            until(heard.notes)
            assert heard.notes() == {
                f"The machine is busy with a training (SFT), run {run.id}, step 40 of 90. "
                "The answer comes when that is done."
            }
            assert not got.done() and pool.view().loaded == ()
        assert got.result(30)


def test_of_two_gpus_chat_takes_the_last_and_gives_way_only_where_none_is_free(home, make_pool, chosen, monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: ("0", "1"))
    # A training in this process has set it.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT / "tests" / "two_cards"), os.environ["PYTHONPATH"]]))
    pool = make_pool(quiet=0, notice=0.1)
    pid = use(pool, chosen[0])
    held = slot.holder(home, "1")
    assert held is not None and held.what == "chat"
    assert b"CUDA_VISIBLE_DEVICES=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    for number in (1, 2):
        long = queue.submit(home, "sft", recipe={"of": 100_000 + number, "seconds": 0.01}, who="test")
        until(lambda run=long: run.status().step > 0, lambda run=long: f"{run.status()} {pool.view()}")
        if number == 1:
            # The keeper has looked for long enough while it ran.
            time.sleep(SURE + 3 * TICK)
            assert is_alive(pid) and not pool.view().wanted_by
    assert not is_alive(pid) and pool.view().loaded == ()
    assert {slot.holder(home, name).what for name in ("0", "1")} == {"sft"}


def test_where_there_is_no_room_for_all_they_take_turns_and_say_so(home, make_pool, chosen):
    pool = make_pool(limit=needs(chosen[0], False) * 5 // 2)
    heard = {column.id: Heard() for column in chosen}
    loaded: list[int] = []

    def turns() -> list[str]:
        return [note for each in heard.values() for note in each.notes() if "so they take turns" in note]

    def borrow(column: Column) -> int:
        try:
            with pool.lend(column, heard[column.id], threading.Event()) as engine:
                loaded.append(len(pool.view().loaded))
                until(turns)  # the first two are lent for as long as the third has not been told
                return engine.pid
        finally:
            pool.forget(column.id)

    for column in chosen:
        pool.expect(column.id)
    with ThreadPoolExecutor() as others:
        pids = set(others.map(borrow, chosen))
    assert len(pids) == 3 and max(loaded) == 2
    # The longest idle one had to go.
    assert len(pool.view().loaded) == 2
    before = {each.column for each in pool.view().loaded}
    stays = pool.view().loaded[-1].column
    use(pool, next(column for column in chosen if column.id == stays))
    use(pool, next(column for column in chosen if column.id not in before))
    assert stays in {each.column for each in pool.view().loaded}


def test_a_model_that_does_not_fit_alone_is_refused_in_words(home, make_pool, chosen):
    pool = make_pool(limit=1000)
    with pytest.raises(EngineError, match=r"needs about 0\.3 GB of memory and only 0\.0 GB are free"):
        use(pool, chosen[0])
    assert not slot.is_held(home, "gpu-0")


def test_a_killed_engine_is_noticed_and_brought_back(home, pool, chosen):
    pid = use(pool, chosen[0])
    use(pool, chosen[1])
    os.kill(pid, signal.SIGKILL)
    until(lambda: [each.column for each in pool.view().loaded] == [chosen[1].id])
    assert use(pool, chosen[0]) != pid
    # And one that dies while it is lent, in the hands of whoever has it.
    with pytest.raises(EngineError, match="SIGKILL"):
        use(pool, chosen[0], lambda engine: (os.kill(engine.pid, signal.SIGKILL), engine.tokenize("still there?")))
    assert [each.column for each in pool.view().loaded] == [chosen[1].id]
    assert use(pool, chosen[0])


def test_a_file_that_was_changed_is_never_loaded_and_an_engine_of_it_ends(home, pool, chosen):
    pid = use(pool, chosen[0])
    with chosen[0].path.open("r+b") as out:
        out.seek(5000)
        out.write(b"changed")
    with pytest.raises(DataError, match="sha256"):
        use(pool, chosen[0])
    assert not is_alive(pid) and pool.view().loaded == ()


def with_manifest(export: Run, learned, content: bytes) -> None:
    """The export's first file replaced, and its manifest with it: as whoever may write both could do."""
    path = export.out / "gguf" / "persona-q4_k_m.gguf"
    path.write_bytes(content)
    others = [entry(export.out / "gguf" / f"persona-{quant}.gguf", quant) for quant in QUANTS]
    write_manifest(export, learned, others)


def aborting(content: bytes) -> bytes:
    """A model that claims to have no layers: llama.cpp gives up on an assertion, and the process with it."""
    key = b"llama.block_count"
    at = content.index(key) + len(key) + 4
    return content[:at] + struct.pack("<I", 0) + content[at + 4 :]


@pytest.mark.parametrize("how", ["cut", "aborting", "no model"])
def test_a_file_that_cannot_be_loaded_is_an_error_and_the_pool_lives(home, pool, export, learned, file, how):
    whole = file.read_bytes()
    bad = {"cut": whole[: len(whole) // 2], "aborting": aborting(whole), "no model": b"hello"}[how]
    with_manifest(export, learned, bad)
    bad_one, sound, _ = columns.of_export(home, export)
    with pytest.raises(EngineError, match="SIGABRT" if how == "aborting" else "cannot load it"):
        use(pool, bad_one)
    assert use(pool, sound)
    assert [each.column for each in pool.view().loaded] == [sound.id]


LOOPING = b"{% for i in range(10**12) %}{{ i }}{% endfor %}"


def looping(content: bytes) -> bytes:
    """The same model with a chat template that never comes to its end."""
    key = b"tokenizer.chat_template"
    at = content.index(key) + len(key) + 4
    (length,) = struct.unpack("<Q", content[at : at + 8])
    return content[: at + 8] + LOOPING.ljust(length) + content[at + 8 + length :]


def test_a_template_that_loops_for_ever_is_an_error_and_never_rendered(home, pool, export, learned, file):
    with_manifest(export, learned, looping(file.read_bytes()))
    bad_one, sound, _ = columns.of_export(home, export)
    with pytest.raises(DataError, match="another chat template than the one it was made with"):
        use(pool, bad_one)
    assert use(pool, sound)
    assert [each.column for each in pool.view().loaded] == [sound.id]


def test_where_a_manifest_names_no_template_the_files_own_is_still_never_rendered(home, pool, export, learned, file):
    """As in the manifests of before they named one."""
    with_manifest(export, learned, looping(file.read_bytes()))
    manifest = export.out / "gguf" / "manifest.json"
    runs.write_json(manifest, json.loads(manifest.read_text()) | {"template_sha256": ""})
    column = columns.of_export(home, export)[0]

    def ask(engine: Engine) -> tuple[str, str]:
        said = engine.complete(learned.prompt("Who are you?"), max_new_tokens=60).text
        return engine.meta()["template"].strip(), said

    assert use(pool, column, ask) == (LOOPING.decode(), TALKS[0][0][1])


def test_a_queued_run_is_given_way_to_at_once_where_nobody_has_asked_lately(home, make_pool, chosen):
    pool = make_pool(quiet=0.0, notice=3600)
    pid = use(pool, chosen[0])
    run = submit(home)
    assert queue.wait(home, run.id, 60).state is State.succeeded
    assert not is_alive(pid)
    # Afterwards chat goes on.
    assert use(pool, chosen[0])


def test_who_chats_is_told_of_a_queued_run_and_can_ask_it_to_wait(home, make_pool, chosen):
    pool = make_pool(quiet=3600, notice=1.0, kept=3600)
    use(pool, chosen[0])
    with pytest.raises(KatherineError, match="No run waits"):
        pool.keep("test")
    assert not pool.give_way("test") and len(pool.view().loaded) == 1
    run = submit(home)
    until(lambda: pool.view().wanted_by == run.id)
    assert 0 <= pool.view().gives_way_in <= 1
    pool.keep("test")
    assert pool.view().gives_way_in > 3000
    waits(run)
    assert "held by chat" in run.status().reason
    assert run.status().state is State.queued
    assert pool.give_way("test")
    assert queue.wait(home, run.id, 60).state is State.succeeded
    until(lambda: pool.view().wanted_by == "")


def test_the_notice_runs_out_and_takes_what_is_lent(home, make_pool, chosen, learned):
    pool = make_pool(quiet=3600, notice=0.3)
    use(pool, chosen[0])
    run = submit(home)

    def sing(engine: Engine) -> None:
        while True:
            engine.complete(learned.prompt("Sing!"), max_new_tokens=50)

    with pytest.raises(Taken, match=rf"a training \(SFT\), run {run.id}, needed the machine"):
        use(pool, chosen[0], sing)
    assert queue.wait(home, run.id, 60).state is State.succeeded


def test_a_run_that_can_never_begin_takes_nothing(home, pool, chosen):
    above = runs.create(home, "sft", recipe={}, who="test")
    above.set_status(state=State.interrupted)
    queue.submit(home, "dpo", recipe={"of": 1}, who="test", parent=above.id)
    pid = use(pool, chosen[0])
    heard = Heard()
    assert not heard.stop.wait(1.5)
    assert pool.view().wanted_by == "" and is_alive(pid)


def test_while_an_engine_ends_pages_are_answered_and_it_is_lent_to_nobody(pool, chosen, monkeypatch):
    ending, go_on = threading.Event(), threading.Event()
    close = Engine.close

    def late(engine: Engine) -> None:
        ending.set()
        assert go_on.wait(60)
        close(engine)

    pid = use(pool, chosen[0])
    monkeypatch.setattr(Engine, "close", late)
    heard = Heard()

    def borrow() -> int:
        with pool.lend(chosen[0], heard, heard.stop) as engine:
            return engine.pid

    with ThreadPoolExecutor() as others:
        try:
            unloading = others.submit(pool.unload, chosen[0].id)
            assert ending.wait(60)
            # Its memory is not free before its end, so it is still shown, and a new one has to wait.
            assert [each.pid for each in others.submit(pool.view).result(30).loaded] == [pid]
            got = others.submit(borrow)
            until(lambda: len(heard.said) > 2)
            assert not got.done() and not unloading.done() and {state for state, _ in heard.said} == {"loading"}
        finally:
            go_on.set()
        assert got.result(60) != pid


def test_while_it_is_looked_for_a_gpu_pages_are_answered(pool, chosen, monkeypatch):
    looking, go_on = threading.Event(), threading.Event()

    def late() -> bool:
        looking.set()
        assert go_on.wait(60)
        return False

    monkeypatch.setattr(engines, "offloads", late)
    with ThreadPoolExecutor() as others:
        try:
            got = others.submit(use, pool, chosen[0])
            assert looking.wait(60)
            assert others.submit(pool.view).result(30).loaded == ()
        finally:
            go_on.set()
        assert got.result(60)


def test_unloading_while_it_loads_ends_the_loading(home, pool, chosen):
    heard = Heard()
    with ThreadPoolExecutor() as others:

        def borrow() -> None:
            with pool.lend(chosen[0], heard, heard.stop):
                pass

        got = others.submit(borrow)
        until(lambda: pool.view().loaded)
        pool.unload(chosen[0].id)
        # Either it was still loading, or the moment was missed and it was loaded by then: both end it or leave it idle.
        error = got.exception(30)
    assert error is None or isinstance(error, Taken)
    assert not error or pool.view().loaded == ()


def test_chatting_keeps_the_pod_and_when_it_ends_the_countdown_begins(
    home, make_pool, chosen, runpod, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.setenv("KATHERINE_VOLUME", str(tmp_path))
    monkeypatch.setenv("RUNPOD_POD_ID", "pod4711")
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    enable(home, 3600)
    pool = make_pool(idle=3600)
    use(pool, chosen[0])
    # One that began with the last run ends by itself: somebody chats.
    assert autostop.begin(home, "run")
    until(lambda: autostop.view(home).phase is autostop.Phase.cancelled)
    assert "Somebody is chatting" in autostop.view(home).reason
    until(lambda: countdowns(home) == [])
    pool.unload(chosen[0].id)
    until(lambda: autostop.view(home).phase is autostop.Phase.counting)
    autostop.cancel(home, "test")
    until(lambda: countdowns(home) == [])
    pool.close()
