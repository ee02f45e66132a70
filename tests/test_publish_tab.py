import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import msgspec
import pytest
from exported import exported, probed
from fastapi import FastAPI
from starlette.testclient import TestClient
from visitor import Visitor

from jobs import errands
from katherine import approval, audit, publish, reviews, runs
from katherine.publish import Receipt, Sent
from katherine.reviews import Recommendation
from katherine.runs import ENDED, Run, State
from katherine.settings import Home
from ui import files
from ui import publish as tab
from ui.panel import Panel
from ui.passwords import Role

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    home = Home(tmp_path / "home")
    yield home
    for errand in errands.under_way(home):
        errands.stop(home, errand.id)
        errands.stop(home, errand.id)
        errands.wait(home, errand.id, 30)


@pytest.fixture
def export(home: Home) -> Run:
    return exported(home)


def visit(home: Home, role: Role = Role.operator) -> Visitor:
    visitor = Visitor(tab, Panel.of(home), role)
    visitor.refresh()
    return visitor


def type_name(visitor: Visitor, name: str = "Ann") -> None:
    visitor.shows[visitor.find(label="Your name")._id]["value"] = name


def press(visitor: Visitor, label: str) -> None:
    visitor.fire(visitor.button(label), "click")


def is_dead(visitor: Visitor, label: str) -> bool:
    return not visitor.shows[visitor.button(label)._id].get("interactive", visitor.button(label).interactive)


def wait_for_errands(home: Home) -> None:
    for errand in errands.everyone(home):
        assert errands.wait(home, errand.id, 60).state in ENDED


def until(found: Callable[[], object]) -> None:
    """Waits for what another process does."""
    for _ in range(1200):
        if found():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def approved(home: Home, export: Run, **more: object) -> None:
    approval.approve(home, export.id, who="Ann", role="operator", **more)  # type: ignore[arg-type]


def receipt(home: Home, export: Run, **changes: object) -> Receipt:
    """As a push leaves it."""
    sent = Sent(f"{export.id}/gguf/invented-q4_k_m.gguf", 1000, "ab" * 32, "cd" * 32, True)
    made = Receipt(
        "20261124-000000-abcdef", runs.now(), "Ann", "operator", export.id, "f" * 16, "ann/persona",
        "https://huggingface.co/buckets/ann/persona", export.id, True, (sent,), 1000, 1000, 2.0,
    )  # fmt: skip
    made = msgspec.structs.replace(made, **changes)
    folder = home.root / "reviews" / export.id / "pushes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{made.id}.json").write_bytes(msgspec.json.encode(made))
    return made


# ------------------------------------------------------------------------------------------------------- what is there


def test_without_an_export_the_page_says_what_to_do_and_offers_nothing(home):
    visitor = visit(home)
    assert "There is no export that could be published yet" in visitor.html()
    assert not [b for b in visitor.page.blocks.values() if isinstance(b, gr.Button) and visitor.visible(b)][1:]


def test_an_export_that_has_not_succeeded_is_not_offered(home, export):
    export.set_status(state=State.failed)
    visitor = visit(home)
    assert visitor.value(visitor.find(label="Export")) is None


def test_the_newest_export_is_shown_with_its_files_and_what_was_seen_of_them(home):
    export = exported(home, failing=("q5_k_m",))
    probed(home, export, {"base": (5, 0), "q4_k_m": (26, 23)})
    reviews.recommend(
        home, Recommendation("r", runs.now(), "Rea", "reviewer", export.id, False, f"{export.id}:q6_k", "too stiff")
    )
    visitor = visit(home)
    assert visitor.value(visitor.find(label="Export")) == export.id
    rows = visitor.rows(visitor.find(column="Passed checks"))
    assert [row[:2] for row in rows] == [
        ["q4_k_m", "3 of 3"], ["q5_k_m", "NOT ACCEPTED, 2 of 3"], ["q6_k", "3 of 3"],
    ]  # fmt: skip
    assert rows[0][4:] == ["23 of 26", "no"] and rows[1][4:] == ["", "no"]
    assert "base 0 of 5, q4_k_m 23 of 26" in visitor.html()
    assert "Rea: NOT good enough, would take q6_k: “too stiff”" in visitor.html()
    assert "Nobody has approved this export." in visitor.html()
    assert is_dead(visitor, "Push")


def test_nothing_is_sent_again_while_nothing_changes(home, export):
    approved(home, export)
    receipt(home, export)
    visitor = visit(home)
    assert visitor.refresh() == set()


# ----------------------------------------------------------------------------------------------------------- approving


def test_approving_takes_a_name_and_says_before_what_exactly_is_approved(home, export):
    visitor = visit(home)
    assert visitor.button("Approve 3 files")
    manifest = json.loads((export.out / "gguf" / "manifest.json").read_text())
    assert all(f"{file['sha256']}  {file['file']}" in visitor.html() for file in manifest["files"])
    assert "You approve 3 files" in visitor.html() and "no verdicts" in visitor.html()
    with pytest.raises(gr.Error, match="name"):
        press(visitor, "Approve 3")
    assert errands.everyone(home) == []
    type_name(visitor)
    visitor.shows[visitor.find(label="Note, if there is something to say")._id]["value"] = "fine"
    press(visitor, "Approve 3")
    assert visitor.value(visitor.find(label="Note, if there is something to say")) == ""
    (errand,) = errands.everyone(home)
    assert errand.request == {"export": export.id, "who": "Ann", "role": "operator", "note": "fine"}
    wait_for_errands(home)
    visitor.refresh()
    given = approval.standing(home, export.id)
    assert given.valid and given.approval and given.approval.note == "fine"
    assert "Approved</span> by Ann (operator)" in visitor.html() and "fine</p>" in visitor.html()
    assert [row[5] for row in visitor.rows(visitor.find(column="Passed checks"))] == ["yes"] * 3
    assert "Approve 3 files, in place of the last approval" in visitor.value(visitor.button("Approve"))


def test_some_of_the_files_can_be_approved(home, export):
    visitor = visit(home)
    type_name(visitor)
    visitor.choose(visitor.find(label="Files that it covers"), ["invented-q6_k.gguf"], "input")
    press(visitor, "Approve 1 file")
    assert errands.everyone(home)[0].request["files"] == ["invented-q6_k.gguf"]
    wait_for_errands(home)
    visitor.refresh()
    assert [row[5] for row in visitor.rows(visitor.find(column="Passed checks"))] == ["no", "no", "yes"]
    visitor.choose(visitor.find(label="Files that it covers"), [], "input")
    assert is_dead(visitor, "Approve")
    with pytest.raises(gr.Error, match="No file is ticked"):
        press(visitor, "Approve")


def test_a_token_pasted_into_the_note_reaches_no_file(home, export):
    shaped = "hf_" + "Ab3" * 10
    visitor = visit(home)
    type_name(visitor)
    visitor.shows[visitor.find(label="Note, if there is something to say")._id]["value"] = f"see {shaped}"
    press(visitor, "Approve 3")
    wait_for_errands(home)
    visitor.refresh()
    assert "see [secret]" in visitor.html()
    assert not [path for path in home.root.rglob("*") if path.is_file() and shaped.encode() in path.read_bytes()]


def test_an_approval_that_failed_says_why(home, export):
    path = export.out / "gguf" / "invented-q5_k_m.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    visitor = visit(home)
    type_name(visitor)
    press(visitor, "Approve 3")
    wait_for_errands(home)
    visitor.refresh()
    assert "Not approved</span>: invented-q5_k_m.gguf was changed" in visitor.html()
    assert is_dead(visitor, "Push")


def test_a_void_approval_says_which_file_and_how(home, export):
    approved(home, export)
    (export.out / "gguf" / "invented-q4_k_m.gguf").unlink()
    visitor = visit(home)
    assert "Void</span> by Ann" in visitor.html() and "invented-q4_k_m.gguf is gone" in visitor.html()
    assert [row[5] for row in visitor.rows(visitor.find(column="Passed checks"))] == ["void"] * 3
    assert is_dead(visitor, "Push") and is_dead(visitor, "Approve")
    assert visitor.button("Withdraw")


def test_files_that_were_touched_can_be_checked_and_are_then_known(home, export):
    approved(home, export)
    os.utime(export.out / "gguf" / "invented-q4_k_m.gguf")
    visitor = visit(home)
    assert "In doubt</span>" in visitor.html() and "was touched" in visitor.html()
    press(visitor, "Check the files")
    wait_for_errands(home)
    visitor.refresh()
    assert "Approved</span> by Ann" in visitor.html() and "In doubt" not in visitor.html()
    with pytest.raises(AssertionError):
        visitor.button("Check the files")


def test_withdrawing_takes_a_second_word(home, export):
    approved(home, export)
    visitor = visit(home)
    with pytest.raises(gr.Error, match="name"):
        press(visitor, "Withdraw …")
    type_name(visitor, "Bob")
    press(visitor, "Withdraw …")
    press(visitor, "Leave it")
    assert approval.standing(home, export.id).valid
    press(visitor, "Withdraw …")
    press(visitor, "Withdraw it")
    assert "Withdrawn by Bob (operator)" in visitor.html() and not approval.standing(home, export.id).valid
    with pytest.raises(AssertionError):
        visitor.button("Withdraw")
    assert is_dead(visitor, "Push")


def test_what_was_said_after_the_approval_stands_beside_it(home, export):
    approved(home, export)
    reviews.recommend(home, Recommendation("r", runs.now(), "Rea", "reviewer", export.id, False))
    visitor = visit(home)
    assert "1 recommendation came after the approval, 1 of them against it." in visitor.html()
    assert "Approved</span> by Ann" in visitor.html()


def test_an_operator_lets_reviewers_approve_and_takes_it_back(home, export):
    visitor = visit(home)
    switch = visitor.find(label="Reviewers may approve")
    with pytest.warns(UserWarning, match="give your name"):
        visitor.choose(switch, True, "input")
    # What was not granted is not shown.
    assert visitor.value(switch) is False and not approval.reviewers_may_approve(home)
    type_name(visitor)
    visitor.choose(switch, True, "input")
    assert approval.reviewers_may_approve(home)
    again = visit(home)
    assert again.value(again.find(label="Reviewers may approve")) is True
    visitor.choose(switch, False, "input")
    assert not approval.reviewers_may_approve(home)


def test_a_reviewers_request_to_any_of_it_is_refused_and_logged(home, export):
    approved(home, export)
    visitor = visit(home, Role.reviewer)
    type_name(visitor, "Rea")
    switch = visitor.find(label="Reviewers may approve")
    with pytest.raises(gr.Error, match="operator"):
        press(visitor, "Approve 3")
    with pytest.warns(UserWarning, match="operator"):
        visitor.choose(switch, True, "input")
    press(visitor, "Withdraw …")
    with pytest.raises(gr.Error, match="operator"):
        press(visitor, "Withdraw it")
    assert visitor.value(switch) is False and not approval.reviewers_may_approve(home)
    assert [line.event for line in audit.read(home)] == ["approved", "refused", "refused", "refused"]
    assert errands.everyone(home) == [] and approval.standing(home, export.id).valid


def test_made_up_exports_and_receipts_are_refused(home, export):
    visitor = visit(home)
    type_name(visitor)
    for made_up in ("../../etc", HOSTILE, export.record.parent):
        visitor.shows[visitor.find(label="Export")._id]["value"] = made_up
        with pytest.raises(gr.Error) as refused:
            press(visitor, "Approve 3")
        assert "<img" not in str(refused.value.message)
    visitor.shows[visitor.find(label="Export")._id]["value"] = export.id
    with pytest.raises(gr.Error):
        visitor.choose(visitor.find(label="Files that it covers"), ["../../etc"], "input")
    visitor.shows[visitor.find(label="Files that it covers")._id]["value"] = []
    with pytest.raises(gr.Error, match="no receipt"):
        visitor.fire(visitor.find(column="Took#"), "select", id="../approval")
    assert errands.everyone(home) == []


# ------------------------------------------------------------------------------------------------------------- pushing


def test_the_button_is_dead_until_the_approval_is_valid_and_the_token_is_there(home, export, monkeypatch):
    visitor = visit(home)
    assert is_dead(visitor, "Push") and "HF_TOKEN is not set" in visitor.html()
    approved(home, export)
    visitor.refresh()
    assert is_dead(visitor, "Push") and "once the approval above is valid" not in visitor.html()
    monkeypatch.setenv("HF_TOKEN", "canary-of-this-test")
    visitor.refresh()
    assert not is_dead(visitor, "Push")
    assert "canary" not in json.dumps(list(visitor.shows.values()), default=str)
    os.utime(export.out / "gguf" / "invented-q4_k_m.gguf")
    visitor.refresh()
    assert is_dead(visitor, "Push") and "once the approval above is valid" in visitor.html()


def test_what_would_go_where_is_listed(home, export):
    approved(home, export)
    visitor = visit(home)
    plan = publish.plan(home, export.id)
    rows = visitor.rows(visitor.find(column="File in that folder"))
    assert [row[0] for row in rows] == [file.path for file in plan.files]
    assert rows[-1][1] == "manifest, last" and f"into the folder {export.id} of the bucket" in visitor.html()
    assert f"{len(plan.files)} files" in visitor.value(visitor.button("Push"))


def test_pressing_a_dead_button_over_the_wire_is_refused_all_the_same(home, export, monkeypatch):
    visitor = visit(home)
    type_name(visitor)
    with pytest.raises(gr.Error, match="Name the bucket"):
        press(visitor, "Push")
    visitor.shows[visitor.find(label="Private bucket on Hugging Face")._id]["value"] = "ann/persona"
    monkeypatch.setenv("HF_TOKEN", "canary-of-this-test")
    with pytest.raises(gr.Error, match="not approved"):
        press(visitor, "Push")
    approved(home, export)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(gr.Error, match="HF_TOKEN is not set"):
        press(visitor, "Push")
    assert errands.everyone(home) == []


def test_a_push_is_asked_for_with_who_asks_and_its_failure_is_said_with_what_to_do(home, export, monkeypatch):
    approved(home, export)
    monkeypatch.setenv("HF_TOKEN", "canary-of-this-test")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    visitor = visit(home)
    type_name(visitor)
    visitor.shows[visitor.find(label="Private bucket on Hugging Face")._id]["value"] = " ann/persona "
    press(visitor, "Push")
    (errand,) = errands.everyone(home)
    assert (errand.kind, errand.who) == ("push", "Ann")
    assert errand.request == {"export": export.id, "to": "ann/persona", "who": "Ann", "role": "operator"}
    wait_for_errands(home)
    visitor.refresh()
    assert "Not pushed</span>" in visitor.html() and "cannot be reached" in visitor.html()
    assert visitor.value(visitor.button("Push again")).startswith("Push again")
    assert "canary" not in visitor.html() and "canary" not in errand.log.read_text()
    # The next visitor need not type where it goes.
    again = visit(home)
    assert again.value(again.find(label="Private bucket on Hugging Face")) == "ann/persona"


def test_a_push_under_way_shows_where_it_is_and_can_be_stopped(home, export, monkeypatch):
    approved(home, export)
    monkeypatch.setenv("HF_TOKEN", "canary-of-this-test")
    # Takes connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        visitor = visit(home)
        type_name(visitor)
        visitor.shows[visitor.find(label="Private bucket on Hugging Face")._id]["value"] = "ann/persona"
        press(visitor, "Push")
        (errand,) = errands.everyone(home)
        until(lambda: errand.status().phase == "ask the hub")
        visitor.refresh()
        assert "Pushing to ann/persona</span>: ask the hub" in visitor.html()
        assert is_dead(visitor, "Push") and "A push is under way." in visitor.html()
        visitor.shows[visitor.find(label="Private bucket on Hugging Face")._id]["value"] = "ann/other"
        with pytest.raises(gr.Error, match="Another push is under way"):
            press(visitor, "Push ·")
        press(visitor, "Stop the push")
        wait_for_errands(home)
    visitor.refresh()
    assert "Stopped</span>: Stopped by you." in visitor.html()
    assert visitor.button("Push again")


def test_receipts_are_shown_with_every_file_that_was_compared(home, export):
    older = receipt(home, export, id="20261123-000000-aaaaaa", time="2026-11-23T00:00:00+00:00", bucket="ann/older")
    newer = receipt(home, export)
    visitor = visit(home)
    rows = visitor.rows(visitor.find(column="Took#"))
    assert [row[2] for row in rows] == ["ann/persona", "ann/older"]
    assert f"/operator/files/exports/{export.id}/pushes/{newer.id}.json" in visitor.html()
    assert 'href="https://huggingface.co/buckets/ann/persona"' in visitor.html()
    assert visitor.rows(visitor.find(column="Hub's hash"))[0][2:] == ["ab" * 6, "cd" * 6, "sent"]
    visitor.fire(visitor.find(column="Took#"), "select", id=older.id)
    assert f"pushes/{older.id}.json" in visitor.html()


def test_an_address_that_is_none_of_the_webs_is_no_link(home, export):
    receipt(home, export, url="javascript:alert(1)")
    assert "javascript:" not in visit(home).html()


# ------------------------------------------------------------------------------------------------------- the audit log


def test_the_log_is_shown_newest_first_with_the_state_of_its_chain(home, export):
    approved(home, export)
    approval.withdraw(home, export.id, who="Bob", role="operator", note="wait")
    visitor = visit(home)
    rows = visitor.rows(visitor.find(column="About"))
    assert [(row[0], row[2], row[3]) for row in rows] == [("2", "withdrawn", "Bob"), ("1", "approved", "Ann")]
    assert "3 files" in rows[1][5] and export.id in rows[1][5]
    assert "The chain holds</span> over 2 lines." in visitor.html()
    audit.path(home).write_text(audit.path(home).read_text().replace("Ann", "Eve"))
    visitor.refresh()
    assert "The chain is broken</span>" in visitor.html() and "does not follow from line 1" in visitor.html()
    with audit.path(home).open("a") as file:
        file.write('{"half')
    visitor.refresh()
    assert visitor.rows(visitor.find(column="About"))[0][2:] == ["torn", "", "", '{"half']


@pytest.mark.parametrize(
    "line", ["[]", '{"time": "x", "event": "", "who": "", "role": "", "previous": "", "facts": {}}']
)
def test_whatever_stands_in_the_log_the_page_stays(home, export, line):
    audit.append(home, "approved", who="Ann", role="operator")
    with audit.path(home).open("a") as file:
        file.write(line + "\n")
    assert "The chain is broken" in visit(home).html()


def test_names_notes_and_files_are_escaped_wherever_they_are_html(home):
    export = exported(home)
    approval.approve(home, export.id, who=HOSTILE, role="operator", note=HOSTILE)
    reviews.recommend(home, Recommendation("r", runs.now(), HOSTILE, "reviewer", export.id, True, note=HOSTILE))
    probed(home, export, {HOSTILE: (1, 1)})
    receipt(home, export, who=HOSTILE, bucket=HOSTILE, others=(HOSTILE,), repository=HOSTILE)
    visitor = visit(home)
    assert "<img" not in visitor.html() and visitor.html().count("&lt;img") >= 8
    approval.withdraw(home, export.id, who=HOSTILE, role="operator", note=HOSTILE)
    visitor.refresh()
    assert "<img" not in visitor.html()


# ---------------------------------------------------------------------------------------------------------- downloads


def test_the_log_the_approval_and_receipts_can_be_taken_away(home, export):
    app = FastAPI()
    files.add_routes(app, home)
    client = TestClient(app)
    assert client.get(files.AUDIT).status_code == 404
    assert client.get(files.export_address(export.id, "approval.json")).status_code == 404
    approved(home, export)
    made = receipt(home, export)
    assert client.get(files.AUDIT).content == audit.path(home).read_bytes()
    got = client.get(files.export_address(export.id, "approval.json"))
    assert got.json()["who"] == "Ann" and "attachment" in got.headers["content-disposition"]
    assert client.get(files.export_address(export.id, f"pushes/{made.id}.json")).json()["bucket"] == "ann/persona"
    for path in ("hashed.json", "pushes/other.json", "pushes/..%2Fapproval.json", "rights.json"):
        assert client.get(f"{files.PREFIX}/exports/{export.id}/{path}").status_code == 404
    for made_up in ("nothing", "..", "%2e%2e", export.record.parent):
        assert client.get(f"{files.PREFIX}/exports/{made_up}/approval.json").status_code == 404
