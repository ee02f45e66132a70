import os
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from katherine import disk, doctor, pod
from katherine.errors import PodError
from katherine.settings import Home

KEY = "rpa_canary_4711"


class RunPod(ThreadingHTTPServer):
    """RunPod's API as far as a stop goes: remembers what it was asked, and answers `status` with `body`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status, self.body, self.location = 200, '{"id": "abc", "desiredStatus": "EXITED"}', ""
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Answer(BaseHTTPRequestHandler):
    server: RunPod

    def _answer(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        body = self.server.body.encode()
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET = _answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPod]:
    server = RunPod()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("KATHERINE_RUNPOD_API", server.address)
    monkeypatch.setenv(pod.KEY, KEY)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_machine_without_runpods_variables_is_no_pod(monkeypatch):
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    assert pod.here() is None
    monkeypatch.setenv("RUNPOD_POD_ID", " ")
    assert pod.here() is None


def test_a_pod_knows_its_address_its_gpus_and_since_when_it_costs(monkeypatch):
    monkeypatch.setenv("RUNPOD_POD_ID", "abc123")
    monkeypatch.setenv("RUNPOD_GPU_COUNT", "2")
    here = pod.here()
    assert here is not None
    assert here.address(7860) == "https://abc123-7860.proxy.runpod.net"
    assert here.gpus == 2
    # The first process of this machine began before this test, and not before its kernel.
    with open("/proc/uptime") as file:
        up = timedelta(seconds=float(file.read().split()[0]))
    assert datetime.now(UTC) - up - timedelta(seconds=2) <= here.started <= datetime.now(UTC)
    later = here.started + timedelta(hours=1, minutes=30)
    assert here.hours(later) == 1.5
    assert here.dollars(4.0, later) == pytest.approx(12.0)
    assert here.dollars(4.0, here.started - timedelta(hours=1)) == 0


def test_stopping_asks_the_api_once_with_the_key(runpod):
    pod.stop("abc/../123")
    assert runpod.asked == [("POST", "/v1/pods/abc%2F..%2F123/stop", f"Bearer {KEY}")]


@pytest.mark.parametrize(
    ("status", "says", "passing"),
    [
        (400, "HTTP 400", False),
        (401, "is not accepted", False),
        (403, "may not stop pods", False),
        (404, "knows no such pod", False),
        (429, "HTTP 429", True),
        (500, "HTTP 500", True),
        (503, "HTTP 503", True),
    ],
)
def test_a_refusal_says_its_status_and_what_to_do_and_never_the_key(runpod, status, says, passing):
    runpod.status, runpod.body = status, f'{{"error": "no\n{KEY} " }}'
    with pytest.raises(PodError, match=says) as refused:
        pod.stop("abc")
    assert f"HTTP {status}" in str(refused.value) and "goes on costing money" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.passing is passing
    assert KEY not in "".join(traceback.format_exception(refused.value))


def test_a_redirect_does_not_carry_the_key_elsewhere(runpod):
    runpod.status, runpod.location = 307, f"{runpod.address}/elsewhere"
    with pytest.raises(PodError, match="HTTP 307"):
        pod.stop("abc")
    assert len(runpod.asked) == 1


def test_an_api_that_is_down_may_be_asked_again(runpod, monkeypatch):
    monkeypatch.setenv("KATHERINE_RUNPOD_API", "http://127.0.0.1:9/v1")
    with pytest.raises(PodError, match=r"127\.0\.0\.1 could not be asked to stop the pod: ConnectError") as refused:
        pod.stop("abc")
    assert refused.value.passing


def test_an_api_that_is_silent_is_given_up(runpod, monkeypatch):
    monkeypatch.setattr(pod, "API_SECONDS", 0.05)
    monkeypatch.setattr(_Answer, "do_POST", lambda self: threading.Event().wait(1))
    with pytest.raises(PodError, match="no answer in time") as refused:
        pod.stop("abc")
    assert refused.value.passing


@pytest.mark.parametrize("key", ["line\nbreak-canary", "schlüssel-canary"])
def test_a_key_that_no_header_can_carry_is_not_quoted(runpod, key):
    with pytest.raises(PodError) as refused:
        pod.stop("abc", key)
    told = "".join(traceback.format_exception(refused.value))
    assert "canary" not in told
    assert not refused.value.passing


def test_without_a_key_nothing_is_asked(runpod, monkeypatch):
    monkeypatch.delenv(pod.KEY)
    with pytest.raises(PodError, match="RUNPOD_API_KEY is not in the environment"):
        pod.stop("abc")
    assert runpod.asked == []


def test_the_key_is_sent_over_https_or_to_this_machine_only(monkeypatch):
    monkeypatch.delenv("KATHERINE_RUNPOD_API", raising=False)
    assert pod.api() == "https://rest.runpod.io/v1"
    monkeypatch.setenv("KATHERINE_RUNPOD_API", "http://pods.example/v1")
    with pytest.raises(PodError, match="https"):
        pod.stop("abc", KEY)


# ----------------------------------------------------------------------------------------------------------- the disk

# As on a pod with a network volume; as in /proc/self/mountinfo, see proc(5).
POD_MOUNTS = """\
1 0 0:97 / / rw,relatime - overlay overlay rw
2 1 0:99 / /proc rw - proc proc rw
3 1 0:100 / /dev/shm rw - tmpfs shm rw
4 1 259:2 /containers/hosts /etc/hosts rw - ext4 /dev/nvme0n1p2 rw
5 1 0:55 / /workspace rw,nosuid - fuse mfs#euro-1 rw
6 1 259:5 /vol\\0401 /my\\040disk rw - xfs /dev/md0 rw
"""


@pytest.fixture
def table(tmp_path: Path) -> list[disk.Mount]:
    (tmp_path / "mountinfo").write_text(POD_MOUNTS)
    return disk.mounts(tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind", "outlives"),
    [
        ("/workspace/katherine", "fuse", True),
        ("/my disk/katherine", "xfs", True),
        ("/root/katherine", "overlay", False),
        ("/workspaces", "overlay", False),
        ("/dev/shm/katherine", "tmpfs", False),
    ],
)
def test_what_lies_on_a_volume_outlives_a_stop(table, monkeypatch, path, kind, outlives):
    monkeypatch.delenv("KATHERINE_VOLUME", raising=False)
    assert disk.mount(Path(path), table).kind == kind
    assert disk.outlives_a_stop(Path(path), table) is outlives


def test_a_home_on_the_machines_one_disk_does_not_outlive_a_stop_unless_one_is_told_so(table, monkeypatch):
    monkeypatch.delenv("KATHERINE_VOLUME", raising=False)
    assert not disk.outlives_a_stop(Path("/"), table)
    assert not disk.outlives_a_stop(Path("/root/x"), table)
    monkeypatch.setenv("KATHERINE_VOLUME", "/root")
    assert disk.outlives_a_stop(Path("/root/x"), table)
    assert not disk.outlives_a_stop(Path("/rooted/x"), table)


def test_the_kernel_names_this_machines_mounts():
    assert disk.mount(Path("/proc/self")).kind == "proc"
    assert disk.mount(Path(__file__)).kind not in ("proc", "unknown")


def test_room_is_told_for_a_folder_that_is_not_there_yet(tmp_path):
    room = disk.room(tmp_path / "not" / "yet")
    usage = os.statvfs(tmp_path)
    assert room.total == usage.f_blocks * usage.f_frsize
    assert 0 < room.free <= room.total


def test_the_doctor_warns_of_a_pods_home_on_the_disk_that_a_stop_wipes(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    monkeypatch.setattr(disk, "mounts", lambda: [disk.Mount(Path("/"), "overlay", "0:97")])
    check = doctor.disk(Home(tmp_path))
    assert check.state == "warning" and "wiped when the pod stops" in check.finding and "/workspace" in check.remedy
    monkeypatch.delenv("RUNPOD_POD_ID")
    assert doctor.disk(Home(tmp_path)).state == "ok"
