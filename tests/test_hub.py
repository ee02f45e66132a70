"""Fetching from the hub, in a process of its own each time: the hub's library reads HF_ENDPOINT when it is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Account, Bucket, Hub, HubStandIn

from katherine import hub as asked
from katherine.errors import DataError
from katherine.settings import PROJECT, Home

LINE = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"}]}\n'


@pytest.fixture
def there() -> Iterator[Hub]:
    with HubStandIn() as made:
        made.files["owner/talk"] = {"a.jsonl": LINE * 3, "more/b.jsonl": LINE * 50, "README.md": b"# talk"}
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def fetch(there: Hub, home: Home) -> Callable[..., dict]:
    def call(place: str, endpoint: str = there.endpoint, before: str = "", **environment: str) -> dict:
        script = (
            "import json, sys; from pathlib import Path\n"
            "from katherine import errors, hub, progress, settings\n"
            f"{before}\n"
            "told = progress.Quiet(); steps = []; told.step = lambda *at: steps.append(at)\n"
            "try: found = {'folder': str(hub.fetch(settings.Home(Path(sys.argv[1])), sys.argv[2], told))}\n"
            "except errors.KatherineError as error: found = {'kind': type(error).__name__, 'error': str(error)}\n"
            "print(json.dumps(found | {'phases': told.phases, 'steps': steps}))"
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ran = subprocess.run(
            [sys.executable, "-c", script, str(home.root), place],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            env=clean | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return call


def contents(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(home: Home) -> list[str]:
    return sorted(path.name for path in home.inbox.rglob("*")) if home.inbox.exists() else []


def test_the_jsonl_files_of_a_dataset_come_into_the_inbox_and_nothing_else(fetch, there, home):
    found = fetch("owner/talk")
    assert Path(found["folder"]) == home.inbox / "owner--talk"
    assert contents(found["folder"]) == {"a.jsonl": LINE * 3, "more/b.jsonl": LINE * 50}
    assert everything(home) == ["a.jsonl", "b.jsonl", "more", "owner--talk"]
    assert found["phases"] == ["list", "download"]
    assert not any(authorization for _, authorization, _ in there.asked)


@pytest.mark.parametrize("place", ["datasets/owner/talk/more", "hf://datasets/owner/talk/more/b.jsonl"])
def test_a_folder_or_file_alone_can_be_named(fetch, place):
    assert contents(fetch(place)["folder"]) == {"more/b.jsonl": LINE * 50}


def test_a_download_that_breaks_off_goes_on_where_it_ended(fetch, there):
    there.cut["more/b.jsonl"] = 1000
    assert contents(fetch("owner/talk")["folder"])["more/b.jsonl"] == LINE * 50
    ranges = [wanted for path, _, wanted in there.asked if path.endswith("b.jsonl")]
    assert ranges == [None, "bytes=1000-"]


def test_a_second_attempt_does_not_fetch_again_what_the_first_one_had(fetch, there, home):
    there.broken = False
    there.files["owner/talk"]["z.jsonl"] = LINE
    first = fetch("owner/talk", before="hub.ATTEMPTS = 1; hub.PATIENCE = 0.5")
    assert "folder" in first
    there.cut |= {"z.jsonl": 5}
    there.commit = "f" * 40
    broken = fetch("owner/talk", before="hub.ATTEMPTS = 1")
    assert broken["kind"] == "SetupError"
    assert contents(home.inbox / "owner--talk") == contents(first["folder"]), "the old one stays until the new is whole"
    there.asked.clear()
    assert "folder" in fetch("owner/talk")
    assert [path.rpartition("/")[2] for path, _, _ in there.asked if "/resolve/" in path] == ["z.jsonl"]
    assert {path.name for path in home.inbox.iterdir()} == {"owner--talk"}


def test_files_of_another_commit_are_never_mixed_in(fetch, there):
    there.cut["more/b.jsonl"] = 10
    assert fetch("owner/talk", before="hub.ATTEMPTS = 1")["kind"] == "SetupError"
    there.commit = "e" * 40
    there.files["owner/talk"] = {"a.jsonl": LINE.replace(b"hey", b"hoy") * 3, "more/b.jsonl": LINE * 50}
    assert contents(fetch("owner/talk")["folder"])["a.jsonl"] == LINE.replace(b"hey", b"hoy") * 3


def test_a_private_dataset_needs_the_token_and_only_the_named_one_is_used(fetch, there, tmp_path):
    there.private.add("owner/talk")
    cached = tmp_path / "hf"
    cached.mkdir()
    (cached / "token").write_text("hf_right")
    refused = fetch("owner/talk", HF_HOME=str(cached))
    assert (refused["kind"], "Set HF_READ_TOKEN if it is private" in refused["error"]) == ("NotFound", True)
    assert not any(authorization for _, authorization, _ in there.asked)
    wrong = fetch("owner/talk", HF_READ_TOKEN="hf_wrong")
    assert "HF_READ_TOKEN may not read it" in wrong["error"] and "hf_wrong" not in wrong["error"]
    assert "folder" in fetch("owner/talk", HF_READ_TOKEN="hf_right")


@pytest.fixture
def bucket(there: Hub, tmp_path: Path) -> Hub:
    """A bucket that the hub's own library has filled."""
    there.store = tmp_path / "store"
    there.store.mkdir()
    there.accounts[there.token] = Account("owner")
    there.buckets["owner/data"] = Bucket(private=False)
    there.files["owner/data"] = {"a.jsonl": LINE * 3, "deep/b.jsonl": LINE * 5000, "c.txt": b"text"}
    script = (
        "import json, sys; from huggingface_hub import HfApi\n"
        "files = {name: text.encode() for name, text in json.load(sys.stdin).items()}\n"
        "HfApi(token=sys.argv[1]).batch_bucket_files('owner/data', add=[(data, name) for name, data in files.items()])"
    )
    texts = json.dumps({name: content.decode() for name, content in there.files["owner/data"].items()})
    environment = os.environ | {"HF_ENDPOINT": there.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script, there.token],
        input=texts,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return there


def test_the_jsonl_files_of_a_bucket_come_into_the_inbox_too(fetch, bucket, home):
    found = fetch("buckets/owner/data")
    assert Path(found.get("folder", found.get("error"))) == home.inbox / "bucket--owner--data"
    assert contents(found["folder"]) == {"a.jsonl": LINE * 3, "deep/b.jsonl": LINE * 5000}
    assert list(contents(fetch("hf://buckets/owner/data/deep")["folder"])) == ["deep/b.jsonl"]


def test_a_bucket_that_is_not_there_is_said(fetch):
    assert "The hub knows no bucket owner/absent" in fetch("buckets/owner/absent")["error"]


@pytest.mark.parametrize(
    ("place", "kind", "says"),
    [
        ("owner/nothing", "NotFound", "The hub knows no dataset owner/nothing"),
        ("owner/talk/absent", "NotFound", "There is no absent in datasets/owner/talk"),
        ("owner/papers", "NotFound", "holds no .jsonl file (it holds: .pdf, .txt)"),
        ("owner", "DataError", "is no place on the hub"),
        ("hf://models/owner/talk", "DataError", "is a model"),
        ("https://elsewhere.example/owner/talk", "DataError", "Unrecognized host"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_words_and_leaves_nothing(fetch, there, home, place, kind, says):
    there.files["owner/papers"] = {"a.pdf": b"x", "b.txt": b"y"}
    found = fetch(place)
    assert (found.get("kind"), says in found.get("error", "")) == (kind, True), found
    assert everything(home) == []


def test_a_hub_that_is_down_is_an_error_in_words(fetch, there):
    there.broken = True
    assert "The hub answered 500" in fetch("owner/talk")["error"]
    assert "cannot be reached" in fetch("owner/talk", endpoint="http://127.0.0.1:9")["error"]


def test_a_hub_that_says_nothing_is_given_up(fetch, there, home):
    there.stalls.add("a.jsonl")
    found = fetch("owner/talk", before="hub.PATIENCE = 0.3; hub.ATTEMPTS = 1")
    assert found["kind"] == "SetupError" and "cannot be reached (ReadTimeout)" in found["error"]
    assert not (home.inbox / "owner--talk").exists()


@pytest.mark.parametrize("name", ["../out.jsonl", "/etc/out.jsonl", "a/../../out.jsonl"])
def test_a_name_that_leads_out_of_the_inbox_is_refused(fetch, there, home, name):
    there.files["owner/talk"] = {name: LINE}
    assert "leads out of the inbox" in fetch("owner/talk")["error"]
    assert not list(home.root.rglob("out.jsonl")) and not list(home.root.parent.glob("out.jsonl"))


def test_a_full_disk_is_said_and_leaves_no_half_file(fetch, there, home):
    """A limit on file size stands for the disk: the kernel refuses the write in the same place."""
    there.files["owner/talk"] = {"big.jsonl": LINE * 20_000}
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))"
    found = fetch("owner/talk", before=limit)
    assert found["kind"] == "DiskError"
    assert "big.jsonl" not in everything(home)


def test_too_little_room_is_said_before_anything_comes(fetch, there, home):
    full = "collections.namedtuple('U', 'total used free')(100, 90, 10)"
    before = f"import collections, shutil; shutil.disk_usage = lambda _: {full}"
    assert "these files need" in fetch("owner/talk", before=before)["error"]
    assert not [path for path, _, _ in there.asked if "/resolve/" in path]


def test_two_places_never_share_a_folder():
    places = ["a/b", "a/b/c", "a/b/d", "buckets/a/b", "a/b@v1", "a/b-c", "a-b/c", "hf://buckets/a/b/c"]
    names = {asked._folder_name(asked.parse(place)) for place in places}
    assert len(names) == len(places)
    with pytest.raises(DataError):
        asked.parse("a/b@/c")
