import json
import subprocess
import sys
from pathlib import Path

import pytest

from katherine import runs
from katherine.errors import DataError, NotFound
from katherine.runs import State
from katherine.settings import PROJECT, Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def made(home: Home, **recipe: object) -> runs.Run:
    return runs.create(home, "sft", recipe=recipe, who="test", dataset="talk", inputs={"dataset": "abc"})


def test_a_new_run_is_queued_and_reads_back_as_it_was_asked(home):
    run = made(home, learning_rate=1e-4)
    again = runs.load(home, run.id)
    assert again.record == run.record
    assert (again.record.kind, again.record.recipe, again.record.inputs) == (
        "sft",
        {"learning_rate": 1e-4},
        {"dataset": "abc"},
    )
    assert again.record.versions["gguf"]
    assert again.status() == runs.Status(State.queued)
    assert again.out.is_dir()


def test_runs_are_listed_oldest_first_and_the_unreadable_left_out(home):
    first, second = made(home), made(home)
    damaged = made(home)
    (damaged.path / "run.json").write_text('{"id": ')
    (home.runs / ".draft").mkdir()
    (home.runs / "notes.txt").write_text("mine")
    assert [run.id for run in runs.everyone(home)] == [first.id, second.id]


def test_a_home_without_runs_has_none(home):
    assert runs.everyone(home) == []


@pytest.mark.parametrize("name", ["absent", "", ".", "..", "../runs", "/etc", "a/b", "a\nb", "a b", "é"])
def test_a_name_that_is_no_runs_is_not_found(home, name):
    made(home)
    with pytest.raises(NotFound, match="There is no run"):
        runs.load(home, name)


@pytest.mark.parametrize("content", ["", "[]", '"text"', '{"id": "x"}', "\udcff"])
def test_a_damaged_run_says_where_and_what_to_do(home, content):
    run = made(home)
    for name, read in (("run.json", lambda: runs.load(home, run.id)), ("status.json", run.status)):
        (run.path / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=rf"{name} is damaged .*remove"):
            read()


def test_a_run_written_by_a_later_version_is_still_read(home):
    run = made(home)
    for name in ("run.json", "status.json"):
        known = json.loads((run.path / name).read_text())
        (run.path / name).write_text(json.dumps(known | {"unheard_of": 1}))
    assert runs.load(home, run.id).status().state is State.queued


def test_a_reader_never_sees_half_a_status(home):
    run = made(home)
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from katherine import runs; from katherine.settings import Home; from pathlib import Path; import sys\n"
            "run = runs.load(Home(Path(sys.argv[1])), sys.argv[2])\n"
            "for step in range(200): run.set_status(step=step, reason=str(step) * 2000)",
            str(home.root),
            run.id,
        ],
        cwd=PROJECT,
    )
    seen = set()
    while writer.poll() is None:
        status = run.status()
        assert status.reason in ("", str(status.step) * 2000)
        seen.add(status.step)
    assert writer.returncode == 0 and len(seen) > 5
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_a_status_that_cannot_be_written_leaves_the_old_one_and_no_litter(home):
    run = made(home)
    with pytest.raises(TypeError):
        run.set_status(reason=object())
    assert run.status() == runs.Status(State.queued)
    assert sorted(path.name for path in run.path.iterdir()) == ["out", "run.json", "status.json"]


def test_a_reason_with_a_file_name_that_is_not_utf_8_is_kept(home):
    run = made(home)
    run.set_status(reason="no room for b\udce9b\u00e9 \U0001f600")
    assert run.status().reason == "no room for b\udce9b\u00e9 \U0001f600"


def test_metrics_keep_zeros_and_line_separators_and_skip_what_is_torn(home):
    run = made(home)
    rows = [{"step": 0, "loss": 0.0, "margin": None}, {"step": 1, "note": "a\u2028b\u0085c"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (run.path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"[1]", b"\xff", b'{"step": 2, "lo']))
    assert list(run.metrics()) == rows


def test_a_run_that_measured_nothing_has_no_metrics(home):
    assert list(made(home).metrics()) == []


def test_a_result_is_there_only_after_success(home):
    run = made(home)
    with pytest.raises(NotFound, match="has no result: it is queued"):
        runs.result(run)
    runs.write_json(run.path / "result.json", {"steps": 177})
    assert runs.result(run) == {"steps": 177}


def test_seconds_are_those_of_the_last_attempt(home):
    run = made(home)
    assert runs.seconds(run) == 0
    run.set_status(started="2026-01-01T00:00:00.000+00:00", ended="2026-01-01T00:01:30.500+00:00")
    assert runs.seconds(run) == 90.5
