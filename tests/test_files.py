"""Downloads over real HTTP: a real server process, real files."""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from bench.past import write_past
from katherine import runs
from katherine.runs import Run
from katherine.settings import PROJECT, Home
from ui import files

SERVER = """
import sys
from pathlib import Path
import uvicorn
from fastapi import FastAPI
from katherine.settings import Home
from ui import files
app = FastAPI()
files.add_routes(app, Home(Path(sys.argv[1])))
uvicorn.run(app, fd=int(sys.argv[2]), http="h11", log_level="error")
"""
WEIGHTS = os.urandom(3_500_000)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    home = Home(tmp_path_factory.mktemp("files") / "home")
    write_past(home, runs=4, steps=30, datasets=1)
    return home


@pytest.fixture(scope="module")
def family(home) -> dict[str, Run]:
    family = {run.record.kind: run for run in runs.everyone(home)}
    (family["export"].out / "gguf" / "qwen3.5-9b-q4_k_m.gguf").write_bytes(WEIGHTS)
    return family


@pytest.fixture(scope="module")
def server(home) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(home.root), str(listening.fileno())],
            pass_fds=[listening.fileno()],
            cwd=PROJECT,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def get(server: str, run: Run | str, name: str, **headers: str) -> httpx.Response:
    run_id = run if isinstance(run, str) else run.id
    return httpx.get(f"{server}/operator/files/runs/{run_id}/{name}", headers=headers, timeout=30)


def raw_status(server: str, path: str) -> int:
    """As it is, without a client that tidies the path up first."""
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=30)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_gguf_comes_whole_with_its_length_a_safe_name_and_as_a_download(server, family):
    answer = get(server, family["export"], "gguf/qwen3.5-9b-q4_k_m.gguf")
    assert answer.status_code == 200 and answer.content == WEIGHTS
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    assert answer.headers["content-disposition"] == 'attachment; filename="qwen3.5-9b-q4_k_m.gguf"'
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "private" in answer.headers["cache-control"]


def test_a_broken_download_goes_on_where_it_was(server, family):
    name = "gguf/qwen3.5-9b-q4_k_m.gguf"
    first = get(server, family["export"], name, Range="bytes=0-999999")
    assert first.status_code == 206 and first.content == WEIGHTS[:1_000_000]
    assert first.headers["content-range"] == f"bytes 0-999999/{len(WEIGHTS)}"
    rest = get(server, family["export"], name, **{"Range": "bytes=1000000-", "If-Range": first.headers["etag"]})
    assert rest.status_code == 206 and first.content + rest.content == WEIGHTS
    assert rest.headers["content-length"] == str(len(WEIGHTS) - 1_000_000)
    beyond = get(server, family["export"], name, Range=f"bytes={len(WEIGHTS)}-")
    assert beyond.status_code == 416


def test_a_file_that_changed_meanwhile_is_sent_anew(server, family):
    path = family["export"].out / "gguf" / "qwen3.5-9b-q5_k_m.gguf"
    path.write_bytes(b"old" * 1000)
    first = get(server, family["export"], f"gguf/{path.name}", Range="bytes=0-99")
    path.write_bytes(b"another" * 1000)
    rest = get(
        server, family["export"], f"gguf/{path.name}", **{"Range": "bytes=100-", "If-Range": first.headers["etag"]}
    )
    assert rest.status_code == 200 and rest.content == b"another" * 1000


def test_asking_for_the_head_alone_sends_no_body(server, family):
    for run, name in ((family["export"], "gguf/qwen3.5-9b-q4_k_m.gguf"), (family["sft"], "log.txt")):
        answer = httpx.head(f"{server}/operator/files/runs/{run.id}/{name}")
        assert answer.status_code == 200 and answer.content == b""
        assert int(answer.headers["content-length"]) > 0


def test_every_file_that_is_listed_can_be_fetched_at_its_address(server, family):
    for run in family.values():
        listed = files.listing(run)
        assert {"log.txt", "run.json", "result.json"} <= {each["name"] for each in listed}
        for each in listed:
            answer = httpx.get(server + each["address"])
            assert answer.status_code == 200 and len(answer.content) == each["bytes"], each
            assert "attachment" in answer.headers["content-disposition"]
    names = {each["name"] for each in files.listing(family["export"])}
    assert {"manifest.json", "gguf/qwen3.5-9b-q4_k_m.gguf", "gguf/qwen3.5-9b-q6_k.gguf"} <= names
    assert {"adapter/adapter_model.safetensors", "metrics.jsonl"} <= {e["name"] for e in files.listing(family["sft"])}


def test_a_rotated_log_is_one_download_oldest_first(server, home):
    run = runs.create(home, "sft", recipe={}, who="test")
    assert get(server, run, "log.txt").status_code == 404
    (run.path / "log.1.txt").write_text("older\n")
    run.log.write_text("newer\n")
    answer = get(server, run, "log.txt")
    assert answer.text == "older\nnewer\n"
    assert answer.headers["content-length"] == "12"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-disposition"] == f"attachment; filename*=utf-8''{run.id}-log.txt"


def test_metrics_that_grow_while_they_are_sent_come_at_the_length_that_was_said(server, home):
    run = runs.create(home, "sft", recipe={}, who="test")
    path = run.path / "metrics.jsonl"
    path.write_bytes(b"x" * 6_000_000)
    with httpx.stream("GET", f"{server}/operator/files/runs/{run.id}/metrics.jsonl") as answer:
        chunks = answer.iter_raw(100_000)
        got = len(next(chunks))
        with path.open("ab") as more:
            more.write(b"y" * 1_000_000)
        got += sum(len(chunk) for chunk in chunks)
    assert got == 6_000_000 == int(answer.headers["content-length"])


def test_pages_are_answered_while_a_large_file_is_fetched(server, home, family):
    path = family["export"].out / "gguf" / "qwen3.5-9b-q6_k.gguf"
    with path.open("wb") as file:
        file.truncate(300_000_000)
    with httpx.stream("GET", f"{server}/operator/files/runs/{family['export'].id}/gguf/{path.name}") as answer:
        chunks = answer.iter_raw(65_536)
        got = len(next(chunks))
        # The client has taken little, so that the server is in the middle of it.
        assert get(server, family["sft"], "run.json").status_code == 200
        got += sum(len(chunk) for chunk in chunks)
    assert got == 300_000_000


@pytest.mark.parametrize(
    "path",
    [
        "/operator/files/runs/{sft}/../../secret.txt",
        "/operator/files/runs/{sft}/..%2f..%2fsecret.txt",
        "/operator/files/runs/{sft}/%2e%2e/%2e%2e/secret.txt",
        "/operator/files/runs/{sft}/adapter/../run.json",
        "/operator/files/runs/{sft}/adapter/..%2f..%2frun.json",
        "/operator/files/runs/../secret.txt",
        "/operator/files/runs/%2e%2e/secret.txt",
        "/operator/files/runs/..%2f/secret.txt",
        "/operator/files/runs/./run.json",
        "/operator/files/runs//etc/passwd",
        "/operator/files/runs/{sft}//etc/passwd",
        "/operator/files/runs/{sft}/%2Fetc%2Fpasswd",
        "/operator/files/runs/{sft}/status.json",
        "/operator/files/runs/{sft}/out/adapter/base.json",
        "/operator/files/runs/{sft}/run.json%00.txt",
        "/operator/files/runs/{sft}/RUN.JSON",
        "/operator/files/runs/{sft}/",
        "/operator/files/runs/{export}/gguf/",
        "/operator/files/runs/{export}/gguf/unnamed.gguf",
        "/operator/files/runs/{export}/gguf/manifest.json",
        "/operator/files/runs/{sft}x/run.json",
        "/operator/files/secret.txt",
        "/operator/files/../secret.txt",
        "/operator/files/",
    ],
)
def test_nothing_else_is_given_out(server, home, family, path):
    (home.root / "secret.txt").write_text("secret")
    (family["export"].out / "gguf" / "unnamed.gguf").write_bytes(b"half")
    asked = path.format(sft=family["sft"].id, export=family["export"].id)
    assert raw_status(server, asked) == 404


def test_links_are_never_followed_whether_they_are_files_or_folders(server, home, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("secret.txt", "adapter/base.json"):
        (tmp_path / name).write_text("secret")
    run = runs.create(home, "sft", recipe={}, who="test")
    run.log.symlink_to(tmp_path / "secret.txt")
    (run.path / "metrics.jsonl").symlink_to(tmp_path / "secret.txt")
    (run.out / "adapter").symlink_to(tmp_path / "adapter")
    for name in ("log.txt", "metrics.jsonl", "adapter/base.json"):
        assert get(server, run, name).status_code == 404
    assert [each["name"] for each in files.listing(run)] == ["run.json"]


def test_a_manifest_that_names_a_file_elsewhere_gives_nothing(server, home, family):
    run = runs.create(home, "export", recipe={}, who="test")
    (run.out / "gguf").mkdir()
    (home.root / "secret.txt").write_text("secret")
    manifest = json.loads((family["export"].out / "gguf" / "manifest.json").read_text())
    for name in ("../../../../secret.txt", "/etc/passwd", "..", ""):
        manifest["files"][0]["file"] = name
        (run.out / "gguf" / "manifest.json").write_text(json.dumps(manifest))
        assert [each["name"] for each in files.listing(run)] == ["run.json", "manifest.json"]
        assert raw_status(server, f"/operator/files/runs/{run.id}/gguf/{name}") == 404


def test_a_file_name_that_is_no_ascii_or_holds_quotes_makes_a_sound_header(server, home, family):
    run = runs.create(home, "export", recipe={}, who="test")
    (run.out / "gguf").mkdir()
    manifest = json.loads((family["export"].out / "gguf" / "manifest.json").read_text())
    name = 'käth"erine; x=1.gguf'
    manifest["files"] = [manifest["files"][0] | {"file": name}]
    (run.out / "gguf" / "manifest.json").write_text(json.dumps(manifest))
    (run.out / "gguf" / name).write_bytes(b"GGUF")
    (link,) = [each for each in files.listing(run) if each["name"].startswith("gguf/")]
    answer = httpx.get(server + link["address"])
    assert answer.content == b"GGUF"
    said = answer.headers["content-disposition"]
    assert said == "attachment; filename*=utf-8''k%C3%A4th%22erine%3B%20x%3D1.gguf"


def test_a_damaged_run_is_said_to_be_so(server, home):
    run = runs.create(home, "sft", recipe={}, who="test")
    (run.path / "run.json").write_text("[")
    answer = get(server, run, "run.json")
    assert answer.status_code == 409 and "is damaged" in answer.text


def test_what_was_sent_is_what_lies_there(server, family):
    digest = hashlib.sha256()
    with httpx.stream(
        "GET", f"{server}/operator/files/runs/{family['export'].id}/gguf/qwen3.5-9b-q4_k_m.gguf"
    ) as answer:
        for chunk in answer.iter_raw():
            digest.update(chunk)
            time.sleep(0.001)  # a client slower than the disk
    assert digest.hexdigest() == hashlib.sha256(WEIGHTS).hexdigest()
