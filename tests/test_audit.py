import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from katherine import audit
from katherine.errors import DataError, DiskError
from katherine.settings import PROJECT, Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def lines(home: Home) -> list[bytes]:
    return audit.path(home).read_bytes().split(b"\n")[:-1]


def write(home: Home, *content: bytes) -> None:
    audit.path(home).write_bytes(b"\n".join((*content, b"")))


def three(home: Home) -> None:
    for number in range(3):
        audit.append(home, "approved", who="Ann", role="operator", export=f"export-{number}")


def test_before_anything_was_done_the_log_is_empty_and_whole(home):
    assert audit.read(home) == [] and audit.broken(home) == "" and audit.head(home) == (0, "")


def test_each_line_names_the_sha256_of_the_one_before(home):
    three(home)
    written = lines(home)
    entries = audit.read(home)
    assert [entry.previous for entry in entries] == ["", *(hashlib.sha256(line).hexdigest() for line in written[:2])]
    assert [(entry.number, entry.facts) for entry in entries] == [(n + 1, {"export": f"export-{n}"}) for n in range(3)]
    assert entries[0].who == "Ann" and entries[0].role == "operator" and entries[0].event == "approved"
    assert audit.broken(home) == ""
    assert audit.head(home) == (3, hashlib.sha256(written[2]).hexdigest())
    assert audit.path(home).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("at", [0, 1])
def test_a_line_that_was_changed_is_found(home, at):
    three(home)
    written = lines(home)
    written[at] = written[at].replace(b"Ann", b"Bob")
    write(home, *written)
    assert f"Line {at + 2} of" in audit.broken(home) and f"does not follow from line {at + 1}" in audit.broken(home)
    assert audit.read(home)[at].who == "Bob"


def test_lines_taken_out_or_put_in_are_found(home):
    three(home)
    written = lines(home)
    write(home, written[0], written[2])
    assert "Line 2 of" in audit.broken(home)
    write(home, *written[1:])
    assert "does not begin the log" in audit.broken(home)
    write(home, written[0], written[0], *written[1:])
    assert "Line 2 of" in audit.broken(home)
    write(home, written[0], b"scribble", *written[1:])
    assert "Line 2 of" in audit.broken(home) and "no entry" in audit.broken(home)
    assert [entry.event for entry in audit.read(home)] == ["approved", "unreadable", "approved", "approved"]


def test_lines_that_are_gone_from_the_end_show_against_a_head_put_down_elsewhere(home):
    three(home)
    number, sha256 = audit.head(home)
    write(home, *lines(home)[:2])
    assert audit.broken(home) == ""
    assert audit.head(home) != (number, sha256) and audit.head(home)[0] < number


def test_a_line_that_the_machine_did_not_finish_is_shown_and_carried_by_the_next(home):
    three(home)
    whole = audit.path(home).read_bytes()
    audit.path(home).write_bytes(whole[:-20])
    torn = audit.read(home)[-1]
    assert torn.torn and torn.event == audit.TORN and torn.text == whole[:-20].split(b"\n")[-1].decode()
    assert audit.broken(home) == ""
    audit.append(home, "withdrawn", who="Ann", role="operator", export="export-2")
    entries = audit.read(home)
    assert [entry.event for entry in entries] == ["approved", "approved", audit.TORN, "withdrawn"]
    assert [entry.torn for entry in entries] == [False, False, True, False]
    assert entries[3].previous == entries[2].sha256 == hashlib.sha256(torn.text.encode()).hexdigest()
    assert audit.broken(home) == ""


def test_what_is_left_of_a_torn_line_cannot_be_changed_unseen(home):
    three(home)
    audit.path(home).write_bytes(audit.path(home).read_bytes()[:-5])
    audit.append(home, "withdrawn", who="Ann", role="operator")
    written = lines(home)
    written[2] = written[2].replace(b"approved", b"refused!")
    write(home, *written)
    assert "Line 4 of" in audit.broken(home)


def test_a_line_that_lost_only_its_end_is_torn_and_still_read(home):
    three(home)
    audit.path(home).write_bytes(audit.path(home).read_bytes()[:-1])
    audit.append(home, "withdrawn", who="Ann", role="operator")
    entry = audit.read(home)[2]
    assert entry.torn and entry.event == "approved" and entry.facts == {"export": "export-2"}
    assert audit.broken(home) == ""


@pytest.mark.parametrize("content", [b"\0" * 9000, b"[" * 9000, b"9" * 9000, b"null", b"\xff\xfe"])
def test_whatever_a_broken_volume_left_is_an_entry(home, content):
    three(home)
    with audit.path(home).open("ab") as file:
        file.write(content)
    assert audit.read(home)[3].event == audit.TORN
    audit.append(home, "withdrawn", who="Ann", role="operator")
    assert audit.read(home)[4].event == "withdrawn" and audit.broken(home) == ""


def test_a_long_line_is_followed_as_well(home):
    audit.append(home, "approved", who="Ann", role="operator", note="x" * 200_000)
    audit.append(home, "approved", who="Ann", role="operator")
    assert audit.broken(home) == "" and len(audit.read(home)) == 2


APPENDER = """
import sys
from pathlib import Path
from katherine import audit
from katherine.settings import Home
for number in range(40):
    audit.append(Home(Path(sys.argv[1])), "approved", who=sys.argv[2], role="operator", number=number, pad="x" * 5000)
"""


def test_processes_and_threads_that_append_at_once_make_one_chain(home):
    children = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(home.root), who], cwd=PROJECT) for who in ("Ann", "Bob")
    ]

    def append() -> None:
        for number in range(20):
            audit.append(home, "approved", who=threading.current_thread().name, role="operator", number=number)

    threads = [threading.Thread(target=append, name=f"thread {number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait() for child in children] == [0, 0]
    assert audit.broken(home) == ""
    entries = audit.read(home)
    for who, count in (("Ann", 40), ("Bob", 40), ("thread 0", 20), ("thread 1", 20)):
        assert [entry.facts["number"] for entry in entries if entry.who == who] == list(range(count))


def test_one_that_is_killed_while_it_appends_leaves_no_lock_and_no_break(home):
    child = subprocess.Popen([sys.executable, "-c", APPENDER.replace("40", "4000"), str(home.root), "Ann"], cwd=PROJECT)
    while len(audit.read(home)) < 5:
        assert child.poll() is None
    child.kill()
    child.wait()
    audit.append(home, "withdrawn", who="Bob", role="operator")
    assert audit.broken(home) == "" and audit.read(home)[-1].who == "Bob"


def test_texts_stay_on_their_line_whatever_is_in_them(home):
    texts = ["a\nb", "\u2028", "\udcff", "</script>", '"}', "{}\n{}"]
    for text in texts:
        audit.append(home, "approved", who=text, role="operator", note=[text])
    assert [entry.who for entry in audit.read(home)] == texts
    assert [entry.facts["note"] for entry in audit.read(home)] == [[text] for text in texts]
    assert audit.broken(home) == "" and len(lines(home)) == len(texts)


def test_no_secret_gets_into_the_log(home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-this-test")
    monkeypatch.setenv("KATHERINE_OPERATOR_PASSWORD", "a pass phrase")
    shaped = "hf_" + "Ab3" * 10
    audit.append(
        home, "approved", who="canary-of-this-test", role="operator",
        note=f"use {shaped} please", deep=[{"a pass phrase": "rpa_" + "X9" * 12}],
    )  # fmt: skip
    written = audit.path(home).read_text()
    assert not [text for text in ("canary", shaped, "a pass phrase", "rpa_") if text in written]
    assert audit.read(home)[0].facts["note"] == "use [secret] please"


def test_a_log_that_cannot_be_written_or_read_is_said(home):
    home.root.mkdir()
    audit.path(home).mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        audit.append(home, "approved", who="Ann", role="operator")
    with pytest.raises(DataError, match="cannot be read"):
        audit.read(home)


def test_a_full_disk_leaves_the_chain_whole(home, monkeypatch):
    three(home)
    real = os.write

    def half(opened: int, content: bytes) -> int:
        """As a disk does that is full after some bytes: takes a part, then refuses."""
        if content.endswith(b"\n") and len(content) > 40:
            return real(opened, content[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DiskError, match="No space left"):
        audit.append(home, "approved", who="Ann", role="operator")
    monkeypatch.undo()
    audit.append(home, "withdrawn", who="Ann", role="operator")
    assert [entry.event for entry in audit.read(home)][3:] == [audit.TORN, "withdrawn"]
    assert audit.broken(home) == ""
    assert json.loads(lines(home)[4])["after_torn"] is True
