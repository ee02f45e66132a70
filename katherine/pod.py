"""The RunPod pod that this program runs on, if it does: what its environment says, how long it has been paid for, and
stopping it. When to stop is the business of jobs.autostop, what an hour costs that of prices."""

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

from katherine.errors import PodError
from katherine.settings import secret

# Where RunPod mounts a pod's volume, network volume or not.
VOLUME = Path("/workspace")
KEY = "RUNPOD_API_KEY"
# POST /pods/{podId}/stop of RunPod's REST API; 200 when the stop is accepted.
API = "https://rest.runpod.io/v1"
# It answers in a second or two; a proxy in between gives up at 100.
API_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Pod:
    """started: when its container last began, UTC; what ran before a restart is not counted. gpus: how many it rents;
    the price is for each."""

    id: str
    gpus: int
    started: datetime

    def hours(self, now: datetime | None = None) -> float:
        return max(((now or datetime.now(UTC)) - self.started).total_seconds() / 3600, 0.0)

    def dollars(self, hourly: float, now: datetime | None = None) -> float:
        """What it has cost since it started, at `hourly` dollars an hour and GPU. Storage is not in it."""
        return self.hours(now) * hourly * max(self.gpus, 1)

    def address(self, port: int) -> str:
        """Where a port that the pod exposes over HTTP is reached from outside."""
        return f"https://{self.id}-{port}.proxy.runpod.net"


def here() -> Pod | None:
    """This pod, or None on any other machine."""
    pod_id = os.environ.get("RUNPOD_POD_ID", "").strip()
    if not pod_id:
        return None
    count = os.environ.get("RUNPOD_GPU_COUNT", "").strip()
    return Pod(
        id=pod_id,
        gpus=int(count) if count.isdecimal() else 1,
        started=_started(),
    )


def _started() -> datetime:
    """When the container's first process began. The machine under it may have been up for months."""
    with open("/proc/uptime") as file:
        up = float(file.read().split()[0])
    with open("/proc/1/stat") as file:
        began = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(time.time() - max(up - began, 0.0), UTC)


def has_key() -> bool:
    """Whether there is a key to stop this pod with. Its value goes nowhere."""
    return secret(KEY) is not None


def api() -> str:
    """The API's address; KATHERINE_RUNPOD_API puts another in its place. Raises PodError for one that would send the
    key over a network in the clear."""
    address = (os.environ.get("KATHERINE_RUNPOD_API", "").strip() or API).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")):
        return address
    raise PodError("KATHERINE_RUNPOD_API must be an https address: the API's key is sent there. Correct or unset it.")


def stop(pod_id: str, key: str | None = None) -> None:
    """Ask RunPod to stop the pod, with `key` or $RUNPOD_API_KEY; returns once it has accepted.

    Raises PodError, saying what was answered and what to do; `passing` on it is true where asking again may help. The
    key is in no message."""
    import httpx

    key = key or secret(KEY)
    if key is None:
        raise PodError(f"{KEY} is not in the environment. {_BY_HAND}")
    address = f"{api()}/pods/{quote(pod_id, safe='')}/stop"
    try:
        # A redirect is not followed: the key is for this address alone.
        answer = httpx.post(
            address, headers={"Authorization": f"Bearer {key}"}, timeout=API_SECONDS, follow_redirects=False
        )
    except (httpx.TransportError, httpx.InvalidURL, UnicodeError, ValueError) as error:
        # Only the error's kind is told, and no cause is kept: a malformed header is quoted in full by some of them.
        kind = "no answer in time" if isinstance(error, httpx.TimeoutException) else type(error).__name__
        passing = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.LocalProtocolError)
        where = urlsplit(address).hostname
        raise PodError(f"{where} could not be asked to stop the pod: {kind}. {_BY_HAND}", passing=passing) from None
    if answer.status_code // 100 == 2:
        return
    advice = _ADVICE.get(answer.status_code, _BY_HAND)
    said = _said(answer.content, key)
    raise PodError(
        f"RunPod refused to stop the pod: HTTP {answer.status_code}{said}. {advice}",
        passing=answer.status_code >= 500 or answer.status_code in (408, 425, 429),
    )


_BY_HAND = "Stop the pod yourself in RunPod's console: it goes on costing money."
_ADVICE = {
    401: f"The key in {KEY} is not accepted. {_BY_HAND}",
    403: f"The key in {KEY} may not stop pods. {_BY_HAND}",
    404: f"RunPod knows no such pod under this key. {_BY_HAND}",
}


def _said(content: bytes, key: str) -> str:
    """The start of what the API said, on one line and without the key."""
    text = " ".join(content[:2000].decode(errors="replace").replace(key, "…").split())
    return f" ({text[:200]})" if text else ""
