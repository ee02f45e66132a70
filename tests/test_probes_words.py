"""The words of the command line on probes: what a page can do, a terminal can."""

import argparse
import csv
import io

import pytest
from exported import exported
from test_probes_tab import BAD, GOOD, MINE, asked, dated

from jobs import queue, slot
from jobs.commands import probes as words
from katherine import probesets, runs
from katherine.errors import DataError, NotFound, RecipeError
from katherine.settings import Home


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = Home(tmp_path / "home")
    home.root.mkdir()
    monkeypatch.setenv("KATHERINE_HOME", str(home.root))
    with slot.take(home, "test"):
        yield home
        for run, _ in queue.unfinished(home):
            queue.stop(home, run.id, kill=True)


def say(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    words.register(parser.add_subparsers())
    options = parser.parse_args(arguments)
    options.action(options)


def test_sets_are_listed_checked_kept_printed_and_deleted(home, tmp_path, capsys):
    path = tmp_path / "file.toml"
    path.write_text(MINE)
    say("probes", "--check", str(path))
    assert "3 probes can be asked, 1 of them for the reviewer" in capsys.readouterr().out
    say("probes", "--save", "mine", str(path))
    capsys.readouterr()
    say("probes")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["set", "katherine", "mine"]
    say("probes", "--text", "mine")
    assert capsys.readouterr().out == MINE
    say("probes", "--delete", "mine")
    assert probesets.names(home) == ["katherine"]
    path.write_text(MINE.replace("'yes'", "'('"))
    with pytest.raises(DataError, match="line 15, probe 'warm', must_not"):
        say("probes", "--check", str(path))


def test_a_run_is_shown_with_ranges_and_compared_and_every_answer_read(home, capsys):
    export = exported(home)
    before = asked(home, export, {"q4_k_m": BAD})
    run = asked(home, export, {"q4_k_m": GOOD, "q6_k": BAD})
    say("probes", run.id, "--against", before.id)
    out = capsys.readouterr().out
    rows = [line.split("  ") for line in out.splitlines()]
    assert [cell.strip() for cell in rows[1] if cell] == ["all", "2 of 2, 34 to 100%", "0 of 2, 0 to 66%"]
    assert "2: who, warm" in out and "may be chance (p 0.5)" in out and "failed since" in out
    say("probes", run.id, "--answers", "warm")
    out = capsys.readouterr().out
    assert "--- q6_k: failed" in out and "user: Where do you live?" in out and "says 'yes', against 'yes'" in out
    say("probes", run.id, "--csv")
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 6
    for wrong in ((run.id, "--answers", "nobody"), (export.id,), ("nobody",)):
        with pytest.raises(NotFound):
            say("probes", *wrong)


def test_a_set_is_asked_of_chosen_columns(home, capsys):
    export = dated(exported(home))
    other = dated(exported(home, quants=("q6_k",)))
    probesets.save(home, "mine", MINE)
    say("probe", export.id, "--set", "mine", "--columns", "q4_k_m", f"{other.id}:q6_k")
    run = runs.load(home, capsys.readouterr().out.strip())
    assert (run.record.parent, run.record.recipe["probes"]) == (export.id, "mine")
    assert (run.record.recipe["quants"], run.record.recipe["columns"]) == (["q4_k_m"], [f"{other.id}:q6_k"])
    with pytest.raises(NotFound, match="no accepted file 'q8_0'"):
        say("probe", export.id, "--columns", "q8_0")
    with pytest.raises(RecipeError, match="no probe set 'nobody'"):
        say("probe", export.id, "--set", "nobody")
