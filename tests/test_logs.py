"""A run's log as a page takes it: its end, a search, and nothing in it that is more than text."""

import pytest

from katherine import logs
from katherine.runs import Run, RunRecord


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path, RunRecord("a-run", "sft", "", "test", None, None, {}, {}, {}, None))


def older(run: Run, text: str) -> None:
    run.log.with_name("log.1.txt").write_text(text)


def test_the_tail_is_the_last_lines_across_both_files(run):
    older(run, "".join(f"old {n}\n" for n in range(10)))
    run.log.write_text("new 0\nnew 1\n")
    assert logs.tail(run, 4) == ["old 8", "old 9", "new 0", "new 1"]
    assert logs.tail(run, 1) == ["new 1"]
    assert len(logs.tail(run, 100)) == 12
    assert [path.name for path in logs.parts(run)] == ["log.1.txt", "log.txt"]
    assert logs.size(run) == 10 * 6 + 2 * 6


def test_without_a_log_there_is_nothing(run):
    assert logs.tail(run) == [] and logs.parts(run) == [] and logs.size(run) == 0 and logs.mark(run) == ""
    assert logs.search(run, "x") == logs.Found([], None)


def test_a_line_without_an_end_is_shown(run):
    run.log.write_text("one\n\ntwo")
    assert logs.tail(run) == ["one", "", "two"]


def test_the_tail_of_a_large_log_reads_its_end_only_and_begins_with_a_whole_line(run):
    run.log.write_text("".join(f"line {n:06d} {'x' * 1000}\n" for n in range(2000)))
    found = logs.tail(run, 500)
    assert found[-1].startswith("line 001999")
    assert all(line.startswith("line ") for line in found)
    assert 100 <= len(found) < 130
    assert all(len(line) <= logs.SHOWN_CHARACTERS + 2 for line in found)


def test_a_mark_changes_with_the_log(run):
    run.log.write_text("a\n")
    before = logs.mark(run)
    assert logs.mark(run) == before
    with run.log.open("a") as log:
        log.write("b\n")
    assert logs.mark(run) != before


def test_escape_sequences_and_control_characters_are_gone(run):
    said = "\x1b[31;1mred\x1b[0m \x1b]0;title\x07 a\x00b\x08\tc "
    said += "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \u202eevil\u202c\x9b"
    run.log.write_bytes(said.encode() + b" \xff\xfe\n")
    assert logs.tail(run) == ["red  ab\tc link evil �� "[:-1]]
    assert logs.search(run, "RED  AB").lines[0].number == 1


def test_markup_stays_text_for_the_page_to_escape(run):
    run.log.write_text("<script>alert(1)</script>\n")
    assert logs.tail(run) == ["<script>alert(1)</script>"]


def test_a_search_gives_line_numbers_in_whatever_case_across_both_files(run):
    older(run, "Alpha\nbeta\nSTRASSE\n")
    run.log.write_text("gamma\nalphabet\n")
    assert [(line.number, line.text) for line in logs.search(run, "ALPHA").lines] == [(1, "Alpha"), (5, "alphabet")]
    assert [line.number for line in logs.search(run, "straße").lines] == [3]
    assert logs.search(run, "delta") == logs.Found([], None)
    assert logs.search(run, "  ") == logs.Found([], None)


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_search_goes_on_from_where_it_stopped_until_it_has_met_every_line(run, end):
    run.log.write_text("\n".join(f"hit {n}" if n % 3 == 0 else "miss" for n in range(1, 1000)) + end)
    found, start, rounds = [], 1, 0
    while start is not None:
        part = logs.search(run, "hit", start=start, limit=10)
        assert len(part.lines) <= 10
        found += [line.number for line in part.lines]
        start = part.next
        rounds += 1
    assert found == list(range(3, 1000, 3))
    assert rounds == 34


def test_a_search_that_takes_too_long_says_where_to_go_on(run, monkeypatch):
    monkeypatch.setattr(logs, "PIECE_BYTES", 100)
    run.log.write_text("".join(f"line {n}\n" for n in range(1, 301)) + "needle\n")
    found, start, rounds = [], 1, 0
    while start is not None:
        # No time at all: each call looks at what one piece holds, or the search would never end.
        part = logs.search(run, "needle", start=start, seconds=0.0)
        found += part.lines
        assert part.next is None or part.next > start
        start = part.next
        rounds += 1
    assert [line.number for line in found] == [301]
    assert rounds > 10
