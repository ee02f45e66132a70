import argparse
import json
import os
import threading
from pathlib import Path

import pytest
from exported import CHECKS, entry, exported, probed, sha256

from jobs import errands
from jobs.commands import approval as words
from katherine import approval, audit, reviews, runs
from katherine.errors import ApprovalError, DataError, KatherineError, NotFound
from katherine.progress import Quiet, Stopped
from katherine.reviews import Recommendation
from katherine.runs import Run, State
from katherine.settings import Home

BY = {"who": "Ann", "role": "operator"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def export(home) -> Run:
    return exported(home)


def gguf(export: Run, quant: str = "q4_k_m") -> Path:
    return export.out / "gguf" / f"invented-{quant}.gguf"


def adapter(home: Home, export: Run) -> Path:
    assert export.record.parent
    return home.runs / export.record.parent / "out" / "adapter"


def manifest(export: Run) -> Path:
    return export.out / "gguf" / "manifest.json"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def recommend(home: Home, export: Run, who: str, good: bool) -> None:
    line = Recommendation("r", runs.now(), who, "reviewer", export.id, good, note="nice")
    reviews.recommend(home, line)


def flip(path: Path) -> None:
    """Another byte, at the same size, time and inode."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ------------------------------------------------------------------------------------------------------- giving one


def test_nothing_is_approved_until_somebody_does(home, export):
    stands = approval.standing(home, export.id)
    assert not stands.valid and stands.approval is None and stands.reasons == ("Nobody has approved this export.",)
    with pytest.raises(ApprovalError, match="Nobody has approved"):
        approval.require(home, export.id)


def test_an_approval_freezes_the_files_and_what_was_seen_of_them(home, export):
    probe = probed(home, export, {"base": (5, 0), "q4_k_m": (26, 23)})
    recommend(home, export, "Rea", True)
    given = approval.approve(home, export.id, **BY, note=" Good enough. ")
    assert (given.who, given.role, given.export, given.note) == ("Ann", "operator", export.id, "Good enough.")
    assert [(f.quant, f.file, f.bytes, f.sha256) for f in given.files] == [
        (quant, path.name, path.stat().st_size, sha256(path))
        for quant in ("q4_k_m", "q5_k_m", "q6_k")
        for path in [gguf(export, quant)]
    ]
    assert given.manifest_sha256 == sha256(manifest(export))
    assert given.adapter_sha256 == sha256(adapter(home, export) / "adapter_model.safetensors")
    assert given.template_sha256 == json.loads(manifest(export).read_text())["template_sha256"]
    assert [each.kind for each in given.adapters] == ["sft", "dpo"]
    assert given.adapters[1].run == export.record.parent and len(given.adapters[1].files) == 3
    assert given.checks["q6_k"] == CHECKS
    (seen,) = given.probes
    assert (seen.run, seen.set) == (probe.id, "katherine")
    assert [(c.column, c.asked, c.passed) for c in seen.counts] == [("base", 5, 0), ("q4_k_m", 26, 23)]
    assert given.verdicts.count == 0 and given.verdicts.fingerprint == reviews.fingerprint(home, export.id) != ""
    assert [(each.reviewer, each.good) for each in given.recommendations] == [("Rea", True)]
    stands = approval.standing(home, export.id)
    assert stands.valid and stands.approval == given and not stands.reasons and not stands.later
    assert approval.require(home, export.id) == given
    (line,) = audit.read(home)
    assert line.event == "approved" and line.facts["approval"]["files"][0]["sha256"] == given.files[0].sha256


def test_only_files_that_passed_can_be_approved(home):
    export = exported(home, failing=("q5_k_m",))
    given = approval.approve(home, export.id, **BY)
    assert [file.quant for file in given.files] == ["q4_k_m", "q6_k"]
    with pytest.raises(ApprovalError, match="q5_k_m cannot be approved"):
        approval.approve(home, export.id, **BY, files=["q4_k_m", "q5_k_m"])
    none = exported(home, failing=("q4_k_m", "q5_k_m", "q6_k"))
    with pytest.raises(ApprovalError, match="No file of this export passed"):
        approval.approve(home, none.id, **BY)
    assert approval.offer(home, none.id).reasons and not approval.offer(home, none.id).files


def test_accepted_is_not_taken_from_the_manifests_word_where_a_check_failed(home, export):
    whole = json.loads(manifest(export).read_text())
    whole["files"][0]["checks"][0]["passed"] = False
    manifest(export).write_text(json.dumps(whole))
    assert [file.quant for file in approval.approve(home, export.id, **BY).files] == ["q5_k_m", "q6_k"]


@pytest.mark.parametrize("named", [["q6_k"], ["invented-q6_k.gguf"], ["q6_k", "invented-q6_k.gguf"]])
def test_an_approval_may_cover_some_of_the_files_and_the_others_may_change(home, export, named):
    given = approval.approve(home, export.id, **BY, files=named)
    assert [file.quant for file in given.files] == ["q6_k"]
    gguf(export, "q4_k_m").unlink()
    assert approval.standing(home, export.id).valid and approval.require(home, export.id) == given
    with pytest.raises(ApprovalError, match="No file"):
        approval.approve(home, export.id, **BY, files=[])


@pytest.mark.parametrize("state", [State.running, State.failed, State.queued])
def test_an_export_that_has_not_succeeded_cannot_be_approved(home, export, state):
    approval.approve(home, export.id, **BY)
    export.set_status(state=state)
    with pytest.raises(ApprovalError, match=f"it is {state}"):
        approval.approve(home, export.id, **BY)
    with pytest.raises(ApprovalError, match=f"it is {state}"):
        approval.require(home, export.id)


def test_what_is_no_export_cannot_be_approved(home, export):
    with pytest.raises(NotFound, match="not an export"):
        approval.approve(home, export.record.parent or "", **BY)
    for made_up in ("../..", "", "nothing"):
        with pytest.raises(NotFound):
            approval.approve(home, made_up, **BY)
        with pytest.raises(NotFound):
            approval.standing(home, made_up)


def test_a_file_that_is_not_its_manifests_cannot_be_approved_even_at_the_same_size_and_time(home, export):
    flip(gguf(export))
    with pytest.raises(ApprovalError, match=r"invented-q4_k_m.gguf was changed"):
        approval.approve(home, export.id, **BY)
    assert approval.standing(home, export.id).approval is None


def test_every_reason_is_said_at_once(home, export):
    flip(gguf(export, "q4_k_m"))
    gguf(export, "q5_k_m").unlink()
    gguf(export, "q6_k").write_bytes(b"GGUF")
    with pytest.raises(ApprovalError) as refused:
        approval.approve(home, export.id, **BY)
    assert "q4_k_m.gguf was changed" in str(refused.value)
    assert "q5_k_m.gguf is gone" in str(refused.value) and "q6_k.gguf has 4 bytes" in str(refused.value)


def test_a_link_is_not_a_file_that_can_be_approved(home, export, tmp_path):
    real = gguf(export).rename(tmp_path / "elsewhere.gguf")
    gguf(export).symlink_to(real)
    with pytest.raises(ApprovalError, match=r"invented-q4_k_m.gguf is gone, or no plain file"):
        approval.approve(home, export.id, **BY)


def test_an_export_whose_adapter_is_another_or_gone_cannot_be_approved(home, export):
    weights = adapter(home, export) / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"of another training")
    with pytest.raises(ApprovalError, match="not the one that this export was made from"):
        approval.approve(home, export.id, **BY)
    weights.unlink()
    with pytest.raises(ApprovalError, match=r"adapter that export .* was made from is gone"):
        approval.approve(home, export.id, **BY)
    assert "is gone" in approval.offer(home, export.id).reasons[0]
    weights.write_bytes(kept)
    assert approval.approve(home, export.id, **BY)


def test_an_earlier_adapter_that_was_removed_before_is_left_out(home, export):
    sft = next(run for run in runs.everyone(home) if run.record.kind == "sft")
    (sft.out / "adapter" / "base.json").unlink()
    assert [each.kind for each in approval.approve(home, export.id, **BY).adapters] == ["dpo"]


def test_names_and_notes_are_kept_as_text_in_bounds(home, export):
    hostile = "<img src=x onerror=alert(1)>\u202e"
    given = approval.approve(home, export.id, who=f"  {hostile}\n", role="operator", note="<b>\n{{x}}</b>")
    assert given.who == "<img src=x onerror=alert(1)>" and given.note == "<b>\n{{x}}</b>"
    for who in ("", " \n\t", "x" * 100):
        with pytest.raises(DataError, match="name"):
            approval.approve(home, export.id, who=who, role="operator")
    with pytest.raises(DataError, match="note is too long"):
        approval.approve(home, export.id, **BY, note="x" * 3000)
    assert approval.require(home, export.id) == given


def test_a_token_pasted_into_a_note_is_kept_nowhere(home, export):
    shaped = "hf_" + "Ab3" * 10
    approval.approve(home, export.id, **BY, note=f"push with {shaped}")
    assert approval.require(home, export.id).note == "push with [secret]"
    assert not [path for path in home.root.rglob("*") if path.is_file() and shaped.encode() in path.read_bytes()]


def test_progress_goes_from_nothing_to_all_in_megabytes(home, export):
    big = gguf(export, "q6_k")
    big.write_bytes(b"GGUF" + bytes(9_000_000))
    whole = json.loads(manifest(export).read_text())
    whole["files"][2] = entry(big, "q6_k")
    manifest(export).write_text(json.dumps(whole))

    class Counted(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[int, int]] = []

        def step(self, step: int, of: int) -> None:
            self.steps.append((step, of))

    told = Counted()
    approval.approve(home, export.id, **BY, progress=told)
    assert told.phases[:3] == [f"read invented-{quant}.gguf" for quant in ("q4_k_m", "q5_k_m", "q6_k")]
    assert told.steps[0] == (0, 9) and told.steps[-1] == (9, 9) and told.steps == sorted(told.steps)


def test_one_that_is_stopped_while_it_reads_approves_nothing(home, export):
    class Stopping(Quiet):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(Stopped):
        approval.approve(home, export.id, **BY, progress=Stopping())
    assert audit.read(home) == [] and approval.standing(home, export.id).approval is None


# --------------------------------------------------------------------------------------------------- what voids one


def test_a_byte_that_was_flipped_behind_size_time_and_inode_is_found_by_reading(home, export):
    approval.approve(home, export.id, **BY)
    flip(gguf(export))
    assert approval.standing(home, export.id).valid  # cheap, and says so
    with pytest.raises(ApprovalError, match=r"invented-q4_k_m.gguf was changed: its sha256 is"):
        approval.require(home, export.id)
    stands = approval.standing(home, export.id)
    assert not stands.valid and not stands.unsure and "invented-q4_k_m.gguf was changed" in stands.reasons[0]


def change_size(home: Home, export: Run) -> None:
    with gguf(export).open("ab") as file:
        file.write(b"x")


def remove_file(home: Home, export: Run) -> None:
    gguf(export).unlink()


def link_file(home: Home, export: Run) -> None:
    gguf(export).rename(home.root / "elsewhere")
    gguf(export).symlink_to(home.root / "elsewhere")


def edit_manifest(home: Home, export: Run) -> None:
    edit(manifest(export), base="another/base")


def add_quant(home: Home, export: Run) -> None:
    path = gguf(export, "q8_0")
    path.write_bytes(b"GGUF q8")
    edit(manifest(export), files=[*json.loads(manifest(export).read_text())["files"], entry(path, "q8_0")])


def add_file(home: Home, export: Run) -> None:
    gguf(export, "q8_0").write_bytes(b"GGUF q8")


def damage_manifest(home: Home, export: Run) -> None:
    manifest(export).write_text("{")


def remove_manifest(home: Home, export: Run) -> None:
    manifest(export).unlink()


def change_adapter(home: Home, export: Run) -> None:
    (adapter(home, export) / "adapter_model.safetensors").write_bytes(b"longer weights than there were before, by far")


def remove_adapter(home: Home, export: Run) -> None:
    (adapter(home, export) / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_size, "invented-q4_k_m.gguf has 1,0"),
        (remove_file, "invented-q4_k_m.gguf is gone"),
        (link_file, "invented-q4_k_m.gguf is gone, or no plain file"),
        (edit_manifest, "manifest.json was changed"),
        (add_quant, "manifest.json was changed"),
        (add_file, "invented-q8_0.gguf was added"),
        (damage_manifest, "manifest.json was changed"),
        (remove_manifest, "manifest.json is gone"),
        (change_adapter, "adapter_model.safetensors of .*-dpo-.* has 45 bytes now"),
        (remove_adapter, "adapter_config.json of .*-dpo-.* is gone"),
    ],
)
def test_every_change_voids_an_approval_and_is_named(home, export, change, words):
    approval.approve(home, export.id, **BY)
    change(home, export)
    stands = approval.standing(home, export.id)
    assert not stands.valid and not stands.unsure and stands.approval
    with pytest.raises(ApprovalError, match=words):
        raise ApprovalError("\n".join(stands.reasons))
    with pytest.raises(ApprovalError, match=words):
        approval.require(home, export.id)


def test_a_file_that_was_touched_is_in_doubt_until_it_is_read(home, export):
    given = approval.approve(home, export.id, **BY)
    os.utime(gguf(export))
    stands = approval.standing(home, export.id)
    assert not stands.valid and stands.unsure and "was touched or put there anew" in stands.reasons[0]
    assert approval.require(home, export.id) == given
    assert approval.standing(home, export.id).valid
    # A copy with the old time has another inode.
    copy = gguf(export).with_suffix(".copy")
    copy.write_bytes(bytes(gguf(export).stat().st_size))
    os.utime(copy, ns=(0, gguf(export).stat().st_mtime_ns))
    copy.rename(gguf(export))
    assert approval.standing(home, export.id).unsure
    with pytest.raises(ApprovalError, match="was changed"):
        approval.require(home, export.id)
    assert not approval.standing(home, export.id).unsure


def test_what_was_read_is_known_to_another_process_and_its_loss_is_only_doubt(home, export):
    approval.approve(home, export.id, **BY)
    kept = home.root / "reviews" / export.id / "hashed.json"
    for content in ("{", "[]", '{"a": []}', "null"):
        kept.write_text(content)
        assert approval.standing(home, export.id).unsure
    approval.require(home, export.id)
    assert approval.standing(home, export.id).valid


def test_an_approval_that_the_log_does_not_know_counts_for_nothing(home, export):
    approval.approve(home, export.id, **BY)
    path = home.root / "reviews" / export.id / "approval.json"
    whole = path.read_text()
    for content in (whole.replace("Ann", "Bob"), "{", "[]", whole.replace("q4_k_m", "q4_k_s")):
        path.write_text(content)
        assert not approval.standing(home, export.id).valid
        with pytest.raises(ApprovalError, match=r"approval\.json"):
            approval.require(home, export.id)
    path.write_text(whole)
    assert approval.standing(home, export.id).valid
    other = exported(home)
    (home.root / "reviews" / other.id).mkdir()
    path.rename(home.root / "reviews" / other.id / "approval.json")
    assert "is gone" in approval.standing(home, export.id).reasons[0]
    assert approval.standing(home, other.id).reasons == ("Nobody has approved this export.",)
    audit.path(home).unlink()
    with pytest.raises(ApprovalError):
        approval.require(home, other.id)


def test_an_approval_of_another_version_that_cannot_be_understood_is_void(home, export):
    approval.approve(home, export.id, **BY)
    path, log = approval.stored(home, export.id), audit.path(home)
    path.write_text(path.read_text().replace('"manifest_sha256"', '"manifest"'))
    log.write_text(log.read_text().replace('"manifest_sha256"', '"manifest"'))
    assert "cannot be read" in approval.standing(home, export.id).reasons[0]
    with pytest.raises(ApprovalError, match="cannot be read"):
        approval.require(home, export.id)
    approval.approve(home, export.id, **BY)
    assert approval.standing(home, export.id).valid


def test_what_people_say_later_is_told_and_voids_nothing(home, export):
    recommend(home, export, "Rea", True)
    given = approval.approve(home, export.id, **BY)
    recommend(home, export, "Tom", False)
    recommend(home, export, "Una", True)
    stands = approval.standing(home, export.id)
    assert stands.valid and stands.later == ("2 recommendations came after the approval, 1 of them against it.",)
    assert approval.require(home, export.id) == given


# -------------------------------------------------------------------------------------------- withdrawing, and rights


def test_a_withdrawn_approval_is_gone_and_can_be_given_again(home, export):
    first = approval.approve(home, export.id, **BY)
    approval.withdraw(home, export.id, who="Bob", role="operator", note="wait")
    stands = approval.standing(home, export.id)
    assert not stands.valid and stands.approval is None and stands.reasons == ("The approval was withdrawn.",)
    assert stands.since and (stands.since.who, stands.since.facts["note"]) == ("Bob", "wait")
    with pytest.raises(ApprovalError, match="withdrawn"):
        approval.require(home, export.id)
    with pytest.raises(ApprovalError, match="nothing to withdraw"):
        approval.withdraw(home, export.id, **BY)
    second = approval.approve(home, export.id, **BY)
    third = approval.approve(home, export.id, **BY, files=["q6_k"])
    assert approval.require(home, export.id) == third
    lines = audit.read(home)
    assert [line.event for line in lines] == ["approved", "withdrawn", "approved", "approved"]
    assert lines[1].facts["approval"]["id"] == first.id
    assert [line.facts.get("replaces") for line in lines] == ["", None, "", second.id]
    assert audit.broken(home) == ""


def test_reviewers_may_approve_only_once_an_operator_allowed_it(home, export):
    by = {"who": "Rea", "role": "reviewer"}
    with pytest.raises(ApprovalError, match="A reviewer may not approve"):
        approval.approve(home, export.id, **by)
    with pytest.raises(ApprovalError, match="Only an operator"):
        approval.let_reviewers_approve(home, True, **by)
    refused = [(line.event, line.who, line.role) for line in audit.read(home)]
    assert refused == [("refused", "Rea", "reviewer")] * 2
    approval.let_reviewers_approve(home, True, who="Ann")
    approval.let_reviewers_approve(home, True, who="Ann")
    assert approval.reviewers_may_approve(home)
    given = approval.approve(home, export.id, **by)
    assert given.role == "reviewer"
    approval.let_reviewers_approve(home, False, who="Ann")
    with pytest.raises(ApprovalError):
        approval.withdraw(home, export.id, **by)
    # It was rightfully given.
    assert approval.require(home, export.id) == given
    rights = [line.facts["reviewers_may_approve"] for line in audit.read(home) if line.event == "rights"]
    assert rights == [True, False]


@pytest.mark.parametrize("role", ["", "admin", "Operator", "operator "])
def test_nobody_else_has_any_right(home, export, role):
    approval.let_reviewers_approve(home, True, who="Ann")
    with pytest.raises(ApprovalError):
        approval.approve(home, export.id, who="x", role=role)


@pytest.mark.parametrize("content", ["{", "[]", '{"reviewers_may_approve": 1}', '{"reviewers_may_approve": "yes"}'])
def test_rights_that_cannot_be_read_allow_nothing(home, export, content):
    approval.let_reviewers_approve(home, True, who="Ann")
    (home.root / "reviews" / "rights.json").write_text(content)
    assert not approval.reviewers_may_approve(home)


class During(Quiet):
    """Does something, once, while the files are read."""

    def __init__(self, does) -> None:
        super().__init__()
        self.does = does

    def phase(self, name: str) -> None:
        if not self.phases:
            self.does()
        super().phase(name)


def test_whoever_withdraws_while_the_files_are_read_has_the_last_word(home, export):
    approval.approve(home, export.id, **BY)

    def withdraw() -> None:
        approval.withdraw(home, export.id, who="Bob", role="operator")

    with pytest.raises(ApprovalError, match="withdrawn or given anew while the files were read"):
        approval.require(home, export.id, During(withdraw))
    approval.approve(home, export.id, **BY)
    with pytest.raises(ApprovalError, match="While the files were read, Bob said something else"):
        approval.approve(home, export.id, **BY, progress=During(withdraw))
    assert approval.standing(home, export.id).approval is None


def test_a_right_that_is_taken_away_while_the_files_are_read_is_gone(home, export):
    approval.let_reviewers_approve(home, True, who="Ann")

    def take() -> None:
        approval.let_reviewers_approve(home, False, who="Ann")

    with pytest.raises(ApprovalError, match="may not approve"):
        approval.approve(home, export.id, who="Rea", role="reviewer", progress=During(take))
    assert approval.standing(home, export.id).approval is None


def test_a_file_that_is_put_there_anew_while_the_others_are_read_is_noticed(home, export):
    class Late(Quiet):
        def phase(self, name: str) -> None:
            if name == "read invented-q6_k.gguf":
                os.utime(gguf(export, "q4_k_m"))

    with pytest.raises(ApprovalError, match="changed while they were read"):
        approval.approve(home, export.id, **BY, progress=Late())
    assert approval.standing(home, export.id).approval is None


def test_of_two_who_approve_at_once_one_stands_and_the_log_has_what_happened(home, export):
    given, refused = [], []

    def approve(who: str) -> None:
        try:
            given.append(approval.approve(home, export.id, who=who, role="operator"))
        except ApprovalError as error:
            refused.append(error)

    threads = [threading.Thread(target=approve, args=(f"person {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) + len(refused) == 4 and given
    logged = [line.facts["approval"]["id"] for line in audit.read(home) if line.event == "approved"]
    assert approval.require(home, export.id).id == logged[-1] and set(logged) == {each.id for each in given}
    assert audit.broken(home) == ""


# ------------------------------------------------------------------------------------------------------------ errands


def test_an_errand_approves_and_another_reads_again(home, export):
    request = {"export": export.id, "who": "Ann", "role": "operator", "note": "ok"}
    errand = errands.start(home, "approve", request, "Ann")
    status = errands.wait(home, errand.id, 60)
    assert status.state is State.succeeded, errand.log.read_text()
    assert errand.result()["approval"] == approval.require(home, export.id).id
    os.utime(gguf(export))
    checked = errands.start(home, "verify", {"export": export.id}, "Ann")
    assert errands.wait(home, checked.id, 60).state is State.succeeded
    assert approval.standing(home, export.id).valid
    flip(gguf(export))
    checked = errands.start(home, "verify", {"export": export.id}, "Ann")
    status = errands.wait(home, checked.id, 60)
    assert status.state is State.failed and "was changed" in status.reason


def test_an_errand_of_a_reviewer_without_the_right_is_refused_and_logged(home, export):
    request = {"export": export.id, "who": "Rea", "role": "reviewer", "note": ""}
    errand = errands.start(home, "approve", request, "Rea")
    status = errands.wait(home, errand.id, 60)
    assert status.state is State.failed and "may not approve" in status.reason
    assert [line.event for line in audit.read(home)] == ["refused"]


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def word(home, monkeypatch, capsys):
    """Says a word of the command line: (what it printed, what went wrong)."""
    monkeypatch.setenv("KATHERINE_HOME", str(home.root))
    parser = argparse.ArgumentParser()
    words.register(parser.add_subparsers())

    def said(*arguments: str) -> tuple[str, str]:
        options = parser.parse_args(arguments)
        wrong = ""
        try:
            options.action(options)
        except (KatherineError, SystemExit) as error:
            wrong = str(error)
        return capsys.readouterr().out, wrong

    return said


def test_everything_that_the_page_does_has_its_word(home, export, word):
    out, wrong = word("approval", export.id)
    assert "Nobody has approved" in out and wrong == "1"
    out, wrong = word("approve", export.id, "--who", "Ann", "--note", "ok", "--files", "q6_k")
    assert "by Ann (operator)" in out and "covers q6_k" in out and "note: ok" in out and not wrong
    out, wrong = word("approval", export.id, "--check")
    assert "valid" in out and sha256(gguf(export, "q6_k")) in out and not wrong
    assert json.loads(word("approval", export.id, "--json")[0])["approval"]["note"] == "ok"
    flip(gguf(export, "q6_k"))
    out, wrong = word("approval", export.id, "--check")
    assert "invented-q6_k.gguf was changed" in wrong
    assert "void" in word("approval", export.id)[0]
    assert "was changed" in word("approve", export.id, "--who", "Ann")[1]
    assert "withdrawn" in word("withdraw", export.id, "--who", "Bob", "--note", "no")[0]
    assert "nothing to withdraw" in word("withdraw", export.id, "--who", "Bob")[1]
    assert word("allow-reviewers")[0] == "reviewers may approve: no\n"
    assert word("allow-reviewers", "yes", "--who", "Ann")[0] == "reviewers may approve: yes\n"
    assert word("allow-reviewers", "no")[0] == "reviewers may approve: no\n"


def test_the_log_is_shown_and_checked_by_a_word(home, export, word):
    assert word("audit", "--check") == ("", "")
    approval.approve(home, export.id, **BY)
    approval.withdraw(home, export.id, **BY)
    out, wrong = word("audit")
    assert "approved" in out and "withdrawn" in out and "3 files" in out and not wrong
    assert len(json.loads(word("audit", "--json")[0])["lines"]) == 2
    audit.path(home).write_text(audit.path(home).read_text().replace("Ann", "Eve"))
    assert "does not follow from line 1" in word("audit", "--check")[1]
