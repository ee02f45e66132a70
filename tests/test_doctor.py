"""The doctor, run for real on this machine, and on planted faults."""

import http.server
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from katherine import bases, doctor, gpu, settings
from katherine.settings import PROJECT, Home

CANARY = "canary-3f9a-do-not-print"


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers, so that no test asks the real one. Yields its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory):
    """The small base with the name of another tokenizer in it: llama.cpp loads that, and aborts at the first space.

    Another name gives up a letter, so that every offset stays true.
    """

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    whole = bases.small_gguf().read_bytes()
    key = text(b"tokenizer.ggml.model") + struct.pack("<I", 8)  # 8: the type of a string
    name = b"Smollm2 135M 8k Lc100K Mix1 Ep2"
    assert whole.count(key + text(b"gpt2")) == 1
    assert whole.count(text(name)) == 1
    path = tmp_path_factory.mktemp("planted") / "other-tokenizer.gguf"
    path.write_bytes(whole.replace(key + text(b"gpt2"), key + text(b"llama")).replace(text(name), text(name[:-1])))
    assert path.stat().st_size == len(whole)
    yield path
    path.unlink()


def test_it_examines_this_machine_without_loading_torch_or_llama(tmp_path, hub):
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path\n"
        "from katherine import doctor; from katherine.settings import Home\n"
        "checks = [asdict(check) for check in doctor.examine(Home(Path(sys.argv[1])))]\n"
        "print(json.dumps([checks, sorted({'torch', 'llama_cpp', 'transformers'} & set(sys.modules))]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    checks, loaded = json.loads(ended.stdout)
    assert loaded == []
    found = {check["name"]: check for check in checks}
    assert {"GPU", "torch", "memory", "disk", "llama.cpp", "decode", "HF_TOKEN", "hub"} <= set(found)
    assert found["decode"]["state"] == "ok"
    assert "Q4_1.gguf" in found["decode"]["finding"]
    assert found["torch"]["state"] == "ok"
    assert found["hub"] == {"name": "hub", "state": "ok", "finding": "127.0.0.1 answers (HTTP 204)", "remedy": ""}
    assert found["converter"]["state"] == "problem"  # this home is empty
    assert found["converter"]["remedy"] == "bash bootstrap.sh setup"


def test_a_llama_that_crashes_is_named_as_a_crash(unloadable):
    check = doctor._alone("decode", lambda: doctor.decode(unloadable))
    assert check.state == "problem"
    assert "crashed with SIGABRT" in check.finding
    assert "setup --again" in check.finding


def test_a_file_that_is_no_model_is_a_failure_and_no_crash(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(bases.small_gguf().read_bytes()[: 1 << 20])
    check = doctor._alone("decode", lambda: doctor.decode(path))
    assert check.state == "problem"
    assert "crashed" not in check.finding
    assert "Failed to load model" in check.finding


def test_secrets_are_said_to_be_there_and_never_shown(tmp_path, hub, monkeypatch):
    for name in settings.SECRETS:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"].replace("//", f"//user:{CANARY}@"))
    checks = doctor.examine(Home(tmp_path))
    assert {check.name for check in checks if check.finding == "set"} == set(settings.SECRETS)
    assert CANARY not in repr(checks)


def test_a_blank_secret_counts_as_absent(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " ")
    assert doctor.secret_present("HF_TOKEN").state == "absent"


def test_a_check_that_fails_hides_no_other(tmp_path, hub, monkeypatch):
    def broken() -> doctor.Check:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(doctor, "memory", broken)
    checks = doctor.examine(Home(tmp_path))
    states = {check.name: check for check in checks}
    assert states["memory"].state == "problem"
    assert "planted" in states["memory"].finding
    assert states["decode"].state == "ok"
    assert len(checks) == len(states) >= 11


def test_a_hub_that_is_not_there_is_a_warning_with_a_remedy(hub):
    hub.shutdown()
    hub.server_close()
    check = doctor.hub()
    assert check.state == "warning"
    assert "cannot be reached" in check.finding
    assert check.remedy


def test_a_package_that_differs_from_its_pin_is_named(tmp_path, monkeypatch):
    pins = "# why\ntorch==2.13.0\npytest==0.0.1  # another\nno-such-package[extra]==1.0\n"
    (tmp_path / "requirements.txt").write_text(pins)
    (tmp_path / "requirements-cuda.txt").write_text("")
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    check = doctor.packages()
    assert check.state == "problem"
    assert "instead of 0.0.1" in check.finding
    assert "no-such-package missing instead of 1.0" in check.finding
    assert "torch" not in check.finding  # 2.13.0+cpu is 2.13.0


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "5"}, (None, 0)),
        ("0::/", {"memory.max": "900", "memory.current": "300"}, (900, 200)),
        (
            "0::/pod/job",
            {"memory.max": "900", "memory.current": "300", "pod/memory.max": "700", "pod/memory.current": "200"},
            (700, 100),
        ),
        ("0::/not/in/this/container", {"memory.max": "900", "memory.current": "300"}, (900, 200)),
        (
            "4:memory:/\n1:cpu:/",
            {"memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "400"},
            (800, 300),
        ),
    ],
)
def test_the_containers_memory_limit_is_found(tmp_path, membership, files, expected):
    (tmp_path / "cgroup").write_text(membership + "\n")
    for name, value in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value + "\n")
        (path.parent / "memory.stat").write_text("anon 7\ninactive_file 100\n")
    assert doctor.cgroup_memory(tmp_path, tmp_path / "cgroup") == expected


def test_a_home_that_cannot_be_written_is_a_problem():
    check = doctor.disk(Home(Path("/proc/katherine")))
    assert check.state == "problem"


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has an NVIDIA GPU")
def test_without_a_driver_there_are_no_readings():
    assert gpu.read() == []
    assert doctor.graphics().state == "absent"
