"""Pushes as real errands, through the hub's own libraries, to a hub on this machine that speaks its protocol."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from exported import exported
from hub_stand_in import Account, Bucket, Hub, HubStandIn, Repository

from jobs import errands
from jobs.commands import publish as words
from jobs.errands import Errand
from katherine import approval, audit, publish
from katherine.destinations import Account as Owner
from katherine.destinations import place
from katherine.errors import NotFound, PublishError
from katherine.runs import ENDED, Run, State, Status
from katherine.settings import PROJECT, Home

# Ten times what the slowest wait here takes on two busy cores.
PATIENCE = 60.0
BUCKET = "me/persona"
CANARY = "hf_CANARYcanaryCANARYcanary"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with HubStandIn(tmp_path / "store") as made:
        made.accounts[CANARY] = made.accounts.pop(made.token)
        made.token = CANARY
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    yield made
    for errand in errands.under_way(made):
        os.killpg(errand.status().pid, signal.SIGKILL)


@pytest.fixture
def export(home: Home) -> Run:
    made = exported(home)
    approval.approve(home, made.id, who="Ann", role="operator")
    return made


def start(home: Home, export: Run, to: str = BUCKET, **more: str) -> Errand:
    request = {"export": export.id, "to": to, "who": "Ann", "role": "operator"} | more
    return errands.start(home, "push", request, "Ann")


def ended(home: Home, errand: Errand) -> Status:
    status = errands.wait(home, errand.id, PATIENCE)
    assert status.state in ENDED, status
    return status


def pushed(home: Home, export: Run, **more: str) -> publish.Receipt:
    errand = start(home, export, **more)
    status = ended(home, errand)
    assert status.state is State.succeeded, (status.reason, errand.log.read_text())
    found = publish.receipts(home, export.id)
    assert found[0].id == errand.result()["receipt"]
    return found[0]


def killed(home: Home, errand: Errand) -> None:
    until(lambda: errand.status().pid is not None)
    os.killpg(errand.status().pid, signal.SIGKILL)
    until(lambda: errand.status().state is State.interrupted)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def originals(home: Home, export: Run) -> dict[str, bytes]:
    """Path in the export's folder there → content here, of what is not written for the push alone."""
    found = {f"gguf/{path.name}": path.read_bytes() for path in (export.out / "gguf").glob("*.gguf")}
    line, number = export.record.parent, 2
    while line is not None:
        record = json.loads((home.runs / line / "run.json").read_text())
        for path in (home.runs / line / "out" / "adapter").iterdir():
            found[f"adapters/{number}-{record['kind']}/{path.name}"] = path.read_bytes()
        line, number = record["parent"], number - 1
    return found


PAPERS = {"README.md", "recipe.json", "acceptance.json", "probes.json", "approval.json", "manifest.json"}


def check_arrived(home: Home, export: Run, there: Hub, into: Path, bucket: str = BUCKET) -> dict[str, bytes]:
    """Everything there, after each byte was compared and the manifest was held against it."""
    shutil.rmtree(into, ignore_errors=True)
    below = f"{export.id}/"
    came = {path.removeprefix(below): content for path, content in there.download(bucket, into).items()}
    wanted = originals(home, export)
    assert {path: came.get(path) for path in wanted} == wanted
    assert set(came) == set(wanted) | PAPERS
    manifest = json.loads(came["manifest.json"])
    assert [entry["path"] for entry in manifest["files"]] == sorted(
        set(came) - {"manifest.json"}, key=[entry["path"] for entry in manifest["files"]].index
    )
    for entry in manifest["files"]:
        content = came[entry["path"]]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert there.buckets[bucket].paths[below + entry["path"]] == entry["xet"]
    return came


def manifest_there(there: Hub, export: Run) -> bool:
    return f"{export.id}/manifest.json" in there.buckets.get(BUCKET, Bucket(True)).paths


# ---------------------------------------------------------------------------------------------------------- a push


def test_everything_arrives_byte_for_byte_in_a_private_bucket_and_the_manifest_last(home, export, there, tmp_path):
    receipt = pushed(home, export)
    came = check_arrived(home, export, there, tmp_path / "came")
    assert there.buckets[BUCKET].private is True
    assert there.did[0] == ("create", BUCKET) and there.did[-1] == ("batch", f"{export.id}/manifest.json")
    assert json.loads(came["approval.json"])["id"] == receipt.approval == json.loads(came["manifest.json"])["approval"]
    assert came["README.md"].startswith(b"---\n") and b"invented/base" in came["README.md"]
    assert (receipt.bucket, receipt.folder, receipt.made, receipt.who) == (BUCKET, export.id, True, "Ann")
    assert {file.path.removeprefix(f"{export.id}/"): file.sha256 for file in receipt.files} == {
        path: hashlib.sha256(content).hexdigest() for path, content in came.items()
    }
    assert receipt.bytes == receipt.sent == sum(len(content) for content in came.values())
    events = [entry.event for entry in audit.read(home)]
    assert events == ["approved", "push begun", "push"] and not audit.broken(home)
    assert audit.read(home)[1].sha256 == receipt.audit_sha256 and receipt.audit_lines == 2


def test_the_plan_names_every_file_with_its_size_and_asks_nobody(home, export, there):
    planned = publish.plan(home, export.id)
    assert planned.approved and not there.asked
    receipt = pushed(home, export)
    assert [(f"{export.id}/{item.path}", item.bytes) for item in planned.files] == [
        (file.path, file.bytes) for file in receipt.files
    ]
    assert planned.bytes == receipt.bytes


def test_what_is_not_approved_can_be_planned_with_the_reason_why_not(home):
    made = exported(home, failing=("q5_k_m",))
    planned = publish.plan(home, made.id)
    assert not planned.approved and planned.reasons == ("Nobody has approved this export.",)
    assert [item.quant for item in planned.files if item.kind == "gguf"] == ["q4_k_m", "q6_k"]
    assert len([item for item in planned.files if item.kind == "adapter"]) == 6
    with pytest.raises(NotFound):
        publish.plan(home, "20260101-000000-export-abcdef")


def test_only_the_approved_files_go(home, there, tmp_path):
    made = exported(home)
    approval.approve(home, made.id, who="Ann", role="operator", files=["q4_k_m"])
    pushed(home, made)
    sent = [path for path in there.buckets[BUCKET].paths if path.endswith(".gguf")]
    assert sent == [f"{made.id}/gguf/invented-q4_k_m.gguf"]
    assert "q5" not in there.download(BUCKET, tmp_path / "came")[f"{made.id}/README.md"].decode()


def test_a_second_push_of_the_same_sends_nothing(home, export, there):
    pushed(home, export)
    there.did.clear()
    again = pushed(home, export)
    assert not there.did and again.sent == 0 and not any(file.now for file in again.files)
    assert len(publish.receipts(home, export.id)) == 2


def test_a_push_repairs_what_differs_and_takes_the_manifest_away_before(home, export, there, tmp_path):
    pushed(home, export)
    paths = there.buckets[BUCKET].paths
    broken, gone = (f"{export.id}/gguf/invented-{quant}.gguf" for quant in ("q4_k_m", "q6_k"))
    paths[broken] = paths[f"{export.id}/README.md"]
    del paths[gone]
    there.did.clear()
    receipt = pushed(home, export)
    manifest = f"{export.id}/manifest.json"
    assert there.did == [("delete", manifest), ("batch", broken), ("batch", gone), ("batch", manifest)]
    assert {file.path for file in receipt.files if file.now} == {broken, gone, manifest}
    check_arrived(home, export, there, tmp_path / "came")


def test_what_else_lies_in_the_folder_is_left_there_and_told(home, export, there):
    pushed(home, export)
    paths = there.buckets[BUCKET].paths
    paths[f"{export.id}/gguf/older.gguf"] = paths[f"{export.id}/README.md"]
    paths["elsewhere/notes.txt"] = paths[f"{export.id}/README.md"]
    assert pushed(home, export).others == (f"{export.id}/gguf/older.gguf",)
    assert len(there.buckets[BUCKET].paths) == len(publish.plan(home, export.id).files) + 2


def test_a_bare_name_is_the_accounts_own_and_one_server_error_is_nothing(home, export, there):
    for operation in ("batch", "paths-info"):
        there.fail(operation, 500)
    assert pushed(home, export, to="persona").bucket == BUCKET


def test_receipts_outlive_the_errands(home, export, there, monkeypatch):
    monkeypatch.setattr(errands, "KEPT", 1)
    receipts = [pushed(home, export), pushed(home, export)]
    assert len(errands.everyone(home)) == 1
    assert publish.receipts(home, export.id) == receipts[::-1]
    (home.root / "reviews" / export.id / "pushes" / "torn.json").write_text("{")
    assert publish.receipts(home, export.id) == receipts[::-1]


# ----------------------------------------------------------------------------------------------- killed and stopped


@pytest.mark.parametrize(
    ("operation", "number"),
    [("whoami", 1), ("info", 1), ("create", 1), ("paths-info", 1), ("token", 1), ("token", 4), ("batch", 1),
     ("batch", 6), ("paths-info", 2), ("info", 9), ("batch", 7), ("paths-info", 4), ("tree", 1)],
)  # fmt: skip
def test_a_push_killed_anywhere_and_begun_again_converges(home, export, there, tmp_path, operation, number):
    held = there.hold(operation, number)
    errand = start(home, export)
    assert held.reached.wait(PATIENCE), (errand.status(), there._counts)
    whole = len(publish.plan(home, export.id).files) - 1
    assert not manifest_there(there, export) or len(there.buckets[BUCKET].paths) == whole + 1
    killed(home, errand)
    assert not publish.receipts(home, export.id)
    # What the hub had got by then, it may still carry out.
    held.release()
    pushed(home, export)
    check_arrived(home, export, there, tmp_path / "came")
    batches = [path for done, path in there.did if done == "batch"]
    assert batches[-1].endswith("/manifest.json") and there.buckets[BUCKET].private
    folder = home.root / "reviews" / export.id / "pushes"
    assert not list(folder.glob(".draft-*"))


def test_one_killed_while_contents_are_under_way_converges_too(home, export, there, tmp_path):
    there.contents_hang = True
    errand = start(home, export)
    until(lambda: any(path.startswith("/store/") for path, *_ in there.asked))
    killed(home, errand)
    assert not there.buckets[BUCKET].paths
    there.contents_hang = False
    pushed(home, export)
    check_arrived(home, export, there, tmp_path / "came")


def test_a_stop_says_what_is_left_and_ends_even_an_upload_that_hangs(home, export, there, tmp_path):
    there.contents_hang = True
    errand = start(home, export)
    until(lambda: any(path.startswith("/store/") for path, *_ in there.asked))
    errands.stop(home, errand.id)
    status = ended(home, errand)
    assert status.state is State.cancelled
    assert status.reason == f"Stopped by you. {publish.LEFT}"
    there.contents_hang = False
    pushed(home, export)
    check_arrived(home, export, there, tmp_path / "came")


def test_two_pushes_at_once_are_one(home, export, there):
    held = there.hold("batch")
    first = start(home, export)
    assert held.reached.wait(PATIENCE)
    assert start(home, export).id == first.id
    other = start(home, export, to="me/elsewhere")
    assert ended(home, other).reason == "Another push is under way. Wait for its end, or stop it."
    assert [errand.id for errand in errands.under_way(home)] == [first.id], "autostop sees it as work"
    held.release()
    assert ended(home, first).state is State.succeeded
    assert "me/elsewhere" not in there.buckets


# ------------------------------------------------------------------------------------------------------ what may not


def test_without_an_approval_the_hub_is_not_even_asked(home, there):
    made = exported(home)
    errand = start(home, made)
    assert ended(home, errand).reason == "Nobody has approved this export."
    approval.approve(home, made.id, who="Ann", role="operator")
    approval.withdraw(home, made.id, who="Ann", role="operator")
    assert ended(home, start(home, made)).reason == "The approval was withdrawn."
    assert not there.asked


@pytest.mark.parametrize(("operation", "named"), [("token", 0), ("batch", 1)])
def test_a_withdrawal_while_it_is_pushed_lets_nothing_more_have_its_name(home, export, there, operation, named):
    held = there.hold(operation)
    errand = start(home, export)
    assert held.reached.wait(PATIENCE)
    approval.withdraw(home, export.id, who="Ann", role="operator")
    held.release()
    assert "withdrawn" in ended(home, errand).reason
    assert len(there.buckets[BUCKET].paths) == named
    assert not manifest_there(there, export) and not publish.receipts(home, export.id)


def test_a_file_that_changes_before_it_is_sent_gets_no_name_there(home, export, there):
    held = there.hold("token")
    errand = start(home, export)
    assert held.reached.wait(PATIENCE)
    file = export.out / "gguf" / "invented-q4_k_m.gguf"
    file.write_bytes(file.read_bytes()[::-1])
    held.release()
    reason = ended(home, errand).reason
    assert "is not the file that was approved" in reason and "invented-q4_k_m.gguf" in reason
    assert not there.buckets[BUCKET].paths


def test_a_file_that_changes_after_it_was_sent_keeps_the_manifest_away(home, export, there):
    held = there.hold("batch", 2)
    errand = start(home, export)
    assert held.reached.wait(PATIENCE)
    file = export.out / "gguf" / "invented-q4_k_m.gguf"
    file.write_bytes(file.read_bytes()[::-1])
    held.release()
    assert "invented-q4_k_m.gguf was changed" in ended(home, errand).reason
    assert not manifest_there(there, export)


def test_links_are_refused(home, export, there, tmp_path):
    folder = export.out / "gguf"
    folder.rename(tmp_path / "away")
    folder.symlink_to(tmp_path / "away")
    assert "is no plain file in its own folder" in ended(home, start(home, export)).reason
    assert not there.asked


def test_a_public_bucket_is_refused_and_left_as_it_is(home, export, there):
    there.buckets[BUCKET] = Bucket(private=False)
    reason = ended(home, start(home, export)).reason
    assert f"bucket {BUCKET} is public" in reason and "Nothing was changed" in reason
    assert there.buckets == {BUCKET: Bucket(private=False)}
    assert not any("xet-write-token" in path for path, *_ in there.asked)


@pytest.mark.parametrize(("operation", "number"), [("token", 1), ("batch", 5), ("batch", 6)])
def test_a_bucket_that_is_made_public_meanwhile_gets_nothing_more(home, export, there, operation, number):
    held = there.hold(operation, number)
    errand = start(home, export)
    assert held.reached.wait(PATIENCE)
    there.buckets[BUCKET].private = False
    held.release()
    assert "is public" in ended(home, errand).reason
    assert not manifest_there(there, export)
    # What was being named when it happened; a file that was still on its way gets no name.
    named = {("token", 1): 0, ("batch", 5): 5, ("batch", 6): len(publish.plan(home, export.id).files) - 1}
    assert len([1 for done, _ in there.did if done == "batch"]) == named[operation, number]


# --------------------------------------------------------------------------------------------------- errors in words


@pytest.fixture
def push(home: Home, export: Run, there: Hub) -> Callable[..., str]:
    """A push in a process of its own, without an errand around it: what it says at its end, "" where all went well."""

    def call(to: str = BUCKET, before: str = "", **environment: str) -> str:
        script = (
            "import sys; from pathlib import Path\n"
            "from katherine import destinations, errors, hub, publish, progress, settings\n"
            f"{before}\n"
            "by = {'who': 'Ann', 'role': 'operator'}\n"
            "home = settings.Home(Path(sys.argv[1]))\n"
            "try: publish.push(home, sys.argv[2], sys.argv[3], **by, progress=progress.Quiet())\n"
            "except errors.KatherineError as error: print(type(error).__name__, error, flush=True)\n"
            # As the errand ends: without waiting for threads that hang in the network.
            "import os; os._exit(0)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script, str(home.root), export.id, to],
            cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | environment,
        )  # fmt: skip
        assert not ran.stderr, ran.stderr
        assert not (secret := environment.get("HF_TOKEN", CANARY)) or secret not in ran.stdout
        return ran.stdout.strip()

    return call


def test_no_token_a_wrong_one_and_one_that_only_reads_are_told_apart(push, there):
    there.echo = True
    assert "There is no HF_TOKEN in the environment" in push(HF_TOKEN="")
    assert not there.asked
    assert "does not accept HF_TOKEN (401)" in push(HF_TOKEN="hf_wrongWRONGwrongWRONGwrong")
    there.accounts["hf_reader"] = Account("me", role="read")
    assert "HF_TOKEN, of me, may only read" in push(HF_TOKEN="hf_reader")
    there.accounts["hf_fine"] = Account("me", role="fineGrained")
    there.fail("create", 403, message="You don't have the rights")
    assert "HF_TOKEN may not write to bucket me/persona (403). It says: You don't have" in push(HF_TOKEN="hf_fine")
    assert not there.buckets


def test_a_token_that_lies_on_this_machine_is_never_used(push, there, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(CANARY)
    assert "There is no HF_TOKEN" in push(HF_TOKEN="")
    assert not there.asked


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("nobody/persona", "has no such owner, or hides it from HF_TOKEN: bucket nobody/persona (404)"),
        ("somebody/persona", "may not write to bucket somebody/persona (403)"),
        ("a/b/c", "cannot be a place on the hub"),
        ("../x", "cannot be a place on the hub"),
        ("", "cannot be a place on the hub"),
        ("me/per sona", "cannot be a place on the hub"),
    ],
)
def test_a_place_that_cannot_be_is_said(push, there, to, says):
    assert says in push(to)
    assert not there.buckets


def test_somebody_elses_private_bucket_of_that_name_is_said(push, there):
    there.accounts["hf_other_right"] = Account("me")
    there.buckets["our-lab/persona"] = Bucket(private=True)
    there.fail("create", 409)
    assert "exists, and HF_TOKEN may not look into it" in push("our-lab/persona", HF_TOKEN="hf_other_right")


@pytest.mark.parametrize(
    ("operation", "status", "message", "says"),
    [
        ("token", 403, "", "HF_TOKEN may not write to bucket me/persona (403)"),
        ("token", 401, "", "does not accept HF_TOKEN (401)"),
        ("token", 404, "", "does not know it (any more): bucket me/persona (404)"),
        ("batch", 403, "", "HF_TOKEN may not write to bucket me/persona (403)"),
        ("batch", 403, "Private repository storage limit reached", "has no room left for bucket me/persona (403)"),
        ("batch", 413, "", "has no room left for bucket me/persona (413)"),
        ("create", 402, "Payment required", "has no room left for bucket me/persona (402)"),
        ("info", 500, "", "The hub answered 500 about bucket me/persona"),
        ("whoami", 429, "", "asked too often (429)"),
        ("paths-info", 404, "", "does not know it (any more)"),
    ],
)
def test_what_the_hub_refuses_is_said_and_leaves_no_manifest(
    push, home, export, there, operation, status, message, says
):
    there.echo = True
    there.fail(operation, status, times=20, message=message)
    said = push()
    assert said.startswith("PublishError") and says in said
    assert not manifest_there(there, export) and not publish.receipts(home, export.id)


def test_a_batch_that_fails_in_part_is_said_and_finished_by_the_next_push(push, home, export, there, tmp_path):
    there.refuses.add("README.md")
    assert "did not take 1 of the files for bucket me/persona" in (said := push()) and "README.md: refused" in said
    assert not manifest_there(there, export)
    there.refuses.clear()
    there.did.clear()
    assert push() == ""
    assert [path.rpartition("/")[2] for _, path in there.did] == ["README.md", "manifest.json"]
    check_arrived(home, export, there, tmp_path / "came")


def test_what_the_hub_loses_without_a_word_is_noticed(push, home, export, there):
    there.loses.add("q5_k_m.gguf")
    assert "Not everything arrived" in (said := push()) and "invented-q5_k_m.gguf is not there" in said
    assert not manifest_there(there, export)
    there.loses = {"manifest.json"}
    assert "manifest.json is not there" in push()
    assert not publish.receipts(home, export.id)


def test_a_hub_that_is_down_is_given_up(push):
    assert "The hub cannot be reached for the account of HF_TOKEN" in push(HF_ENDPOINT="http://127.0.0.1:9")


def test_a_hub_that_takes_contents_and_says_nothing_is_given_up(push, there):
    there.contents_hang = True
    said = push(before="destinations.STALLED = 1.0")
    assert "Nothing moved for 1 s while" in said and "push again" in said


def test_a_hub_that_goes_down_before_contents_are_sent_is_given_up(push, there):
    held = there.hold("token")
    said = push(before="destinations.STALLED = 1.0")
    held.release()
    assert "Nothing moved for 1 s" in said


def test_a_hub_that_does_not_answer_is_given_up(push, there):
    held = there.hold("info")
    said = push(before="hub.PATIENCE = 0.5")
    held.release()
    assert "cannot be reached for bucket me/persona (ReadTimeout" in said


def test_a_receipt_that_cannot_be_written_is_said_once_all_is_there(push, home, export, there):
    fails = "def no(*_): raise OSError(28, 'No space left on device')\npublish.runs.write_json = no"
    # approval keeps what it read, by the same function: so only once everything was compared.
    before = (
        "original = publish._Push._receipt\n"
        f"def receipt(self, *given):\n    {fails.splitlines()[0]}\n    {fails.splitlines()[1]}\n"
        "    return original(self, *given)\n"
        "publish._Push._receipt = receipt"
    )
    assert "Everything arrived in bucket me/persona, but the receipt cannot be written" in push(before=before)
    assert manifest_there(there, export)


# --------------------------------------------------------------------------------------------------------- the token


def everywhere(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def environments() -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and CANARY.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_the_token_is_in_the_pushs_environment_and_nowhere_else(home, export, there, tmp_path):
    held = there.hold("batch", 2)
    errand = start(home, export)
    assert held.reached.wait(PATIENCE)
    assert environments() == {errand.status().pid}
    held.release()
    assert ended(home, errand).state is State.succeeded
    there.echo = True
    there.buckets.clear()
    there.fail("batch", 403, times=20, message="No.")
    failed = start(home, export)
    assert "[secret]" in ended(home, failed).reason and "[secret]" in failed.log.read_text()
    assert any(authorization == f"Bearer {CANARY}" for _, authorization, _ in there.asked), "it was really used"
    assert list((home.cache / "xet").rglob("*.log")), "the native library's own logs are looked into as well"
    assert not everywhere(tmp_path) and not everywhere(home.root)


def test_whatever_a_process_prints_its_secrets_are_left_out():
    script = (
        "import os, subprocess, sys, logging\n"
        "from jobs import printed\n"
        "token = os.environ['HF_TOKEN']\n"
        "print('before')\n"
        "with printed.without_secrets():\n"
        "    print('python', token, flush=True)\n"
        "    os.write(2, f'native {token}\\nBearer {token}'.encode())\n"
        "    subprocess.run(['sh', '-c', 'echo child $HF_TOKEN; printf half; printf \" $HF_TOKEN\\n\"'])\n"
        "    logging.error('x' * 3_000_000 + token)\n"
        "    os.write(1, b'\\xff no end ' + token.encode())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, env=os.environ | {"HF_TOKEN": CANARY}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = ran.stdout + ran.stderr
    assert CANARY.encode() not in said and said.count(b"[secret]") == 7
    assert said.startswith(b"before\npython [secret]\nnative [secret]\n") and said.rstrip().endswith(b"no end [secret]")


# ------------------------------------------------------------------------------------------------- a model repository


MODEL = "our-lab/persona-model"


def test_a_private_model_repository_gets_the_same_in_one_commit(home, export, there, tmp_path):
    receipt = pushed(home, export, repo=MODEL)
    came = check_arrived(home, export, there, tmp_path / "came")
    repository = there.repositories[MODEL]
    assert repository.private and len(repository.commits) == 1
    assert (receipt.repository, receipt.commit) == (MODEL, repository.commits[0])
    assert set(repository.paths) == set(came)
    for path, stands in repository.paths.items():
        if path.endswith((".gguf", ".safetensors")):
            assert stands == ("lfs", hashlib.sha256(came[path]).hexdigest(), len(came[path]))
        else:
            assert stands == ("git", came[path])
    again = pushed(home, export, repo=MODEL)
    assert len(repository.commits) == 1 and again.commit == ""


def test_a_public_model_repository_is_refused_before_anything_is_sent(home, export, there):
    there.repositories[MODEL] = Repository(private=False)
    assert f"model repository {MODEL} is public" in ended(home, start(home, export, repo=MODEL)).reason
    assert not there.repositories[MODEL].paths and not there.buckets[BUCKET].paths


@pytest.mark.parametrize(("operation", "number"), [("repo-create", 1), ("commit", 1), ("repo-paths", 2)])
def test_one_killed_at_the_repository_converges(home, export, there, tmp_path, operation, number):
    held = there.hold(operation, number)
    errand = start(home, export, repo=MODEL)
    assert held.reached.wait(PATIENCE)
    killed(home, errand)
    held.release()
    pushed(home, export, repo=MODEL)
    came = check_arrived(home, export, there, tmp_path / "came")
    assert set(there.repositories[MODEL].paths) == set(came)


def test_a_repository_that_fails_leaves_the_buckets_receipt(home, export, there):
    there.fail("commit", 403, times=9)
    assert f"may not write to model repository {MODEL} (403)" in ended(home, start(home, export, repo=MODEL)).reason
    (receipt,) = publish.receipts(home, export.id)
    assert receipt.bucket == BUCKET and receipt.repository == ""


# ------------------------------------------------------------------------------------------------------- names, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" me/persona ", "me/persona"),
        ("persona", "ann/persona"),
        ("hf://buckets/me/persona", "me/persona"),
        ("buckets/me/persona/", "me/persona"),
        ("https://huggingface.co/buckets/me/persona", "me/persona"),
        ("Me.2/per_so-na.1", "Me.2/per_so-na.1"),
    ],
)
def test_places_are_read(text, found):
    assert place(text, Owner("ann", ("ann",))) == found


@pytest.mark.parametrize("text", ["", "/", "a//b", "-a/b", "a/b.", "a/b--c", "a/..", "a/b\nc", "a/" + "b" * 97, "a/ü"])
def test_places_that_cannot_be_are_refused(text):
    with pytest.raises(PublishError, match="cannot be a place"):
        place(text)


def command(*given: str) -> None:
    parser = argparse.ArgumentParser()
    words.register(parser.add_subparsers())
    options = parser.parse_args(given)
    options.action(options)


def test_the_command_line_plans_pushes_and_shows_receipts(home, export, there, monkeypatch, capsys):
    monkeypatch.setenv("KATHERINE_HOME", str(home.root))
    command("push", export.id, "--dry-run")
    assert "gguf/invented-q4_k_m.gguf" in capsys.readouterr().out and not there.asked
    command("push", export.id, "--to", BUCKET, "--who", "Ann")
    said = capsys.readouterr()
    assert re.search(r"^(starting|read|ask|send|compare|write) ?", said.err, re.M)
    assert "README.md" in said.out and "by Ann" in said.out
    command("receipts", "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert told["bucket"] == BUCKET and told["export"] == export.id
    there.buckets[BUCKET].private = False
    with pytest.raises(Exception, match="is public"):
        command("push", export.id, "--to", BUCKET)
