"""Everything that the operator's page can do, tried by a reviewer over raw HTTP in every way that Gradio has: refused,
logged, and without a trace on the disk."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Served

# Which routes Gradio 6.31 has for making a handler run, or for acting on what runs.
JOIN = "/gradio_api/queue/join"
HASH = "of-a-reviewer"


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("refused") / "home").start()
    yield served
    served.kill()


def handlers(panel: Served) -> list[dict[str, Any]]:
    """What the operator's page declares, as only the operator may read it."""
    with panel.client("operator") as operator:
        found = operator.get("/operator/config").json()["dependencies"]
    assert len(found) > 60, "the operator's page has lost its handlers"
    return found


def prints(home: Path) -> dict[str, str]:
    """Every file of the home but the log that refusals go to."""
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.rglob("*")
        if path.is_file() and not path.name.startswith("panel.log")
    }


def body(handler: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": [None] * len(handler["inputs"]),
        "fn_index": handler["id"],
        "session_hash": HASH,
        "trigger_id": handler["targets"][0][0] if handler["targets"] else None,
    }


def every_way(handler: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path below an area, JSON) of each request that would make this handler run."""
    given = body(handler)
    name = str(handler["api_name"] or handler["id"])
    ways = [
        ("POST", JOIN, given),
        ("POST", f"/gradio_api/run/{name}", given),
        ("POST", f"/gradio_api/api/{name}", given),
        ("POST", f"/gradio_api/call/{name}", given),
        ("POST", f"/gradio_api/call/v2/{name}", given),
        ("GET", f"/gradio_api/call/{name}/{HASH}", {}),
    ]
    return ways


def test_every_operators_action_is_refused_to_a_reviewer_in_every_way_and_logged(panel):
    known = handlers(panel)
    before = prints(panel.home.root)
    refused = 0
    with panel.client("reviewer") as reviewer:
        for handler in known:
            for method, path, given in every_way(handler):
                answer = reviewer.request(method, f"/operator{path}", json=given or None)
                assert answer.status_code == 403, (handler["id"], method, path, answer.status_code)
                refused += 1
    assert prints(panel.home.root) == before
    log = "".join(path.read_text() for path in sorted(panel.home.root.glob("panel.log*")))
    assert log.count("refused reviewer at 127.0.0.1") >= min(refused, 500), "three files of a megabyte keep the latest"


def test_an_operators_handler_cannot_be_named_on_the_reviewers_page(panel):
    """The same numbers and names, put to the reviewer's own Gradio app: its own handlers, or nothing."""
    known = handlers(panel)
    with panel.client("reviewer") as reviewer:
        # Gradio answers a name that it does not know with 500, after which the connection is closed.
        reviewer.headers["Connection"] = "close"
        own = {row["id"]: row for row in reviewer.get("/review/config").json()["dependencies"]}
        for handler in known:
            if handler["id"] in own:
                continue
            for method, path, given in every_way(handler):
                answer = reviewer.request(method, f"/review{path}", json=given or None)
                if answer.status_code == 200 and path.startswith(JOIN):
                    # Accepted into the queue; what comes of it is an error, and the queue lives.
                    assert "error" in outcome(reviewer, answer.json()), (handler["id"], path)
                    continue
                assert answer.status_code >= 400, (handler["id"], method, path)
        assert reviewer.get("/review/config").status_code == 200


def outcome(client: httpx.Client, joined: dict[str, Any]) -> str:
    """ "error" or "success": how an event that was taken into the reviewer's queue ended."""
    with client.stream("GET", f"/review/gradio_api/queue/data?session_hash={HASH}") as stream:
        for line in stream.iter_lines():
            if '"process_completed"' in line and joined["event_id"] in line:
                return "success" if '"success":true' in line.replace(" ", "") else "error"
            if '"unexpected_error"' in line:
                return "error"
    return "error"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/operator/gradio_api/upload"),
        ("POST", "/operator/gradio_api/cancel"),
        ("POST", "/operator/gradio_api/reset"),
        ("GET", "/operator/gradio_api/queue/data?session_hash=" + HASH),
        ("GET", "/operator/gradio_api/heartbeat/" + HASH),
        ("GET", "/operator/gradio_api/info"),
        ("GET", "/operator/config"),
        ("GET", "/operator/files/audit.jsonl"),
        ("GET", "/operator/files/talks/any.json"),
        ("HEAD", "/operator/files/runs/any/run.json"),
    ],
)
def test_what_stands_beside_the_handlers_is_refused_too(panel, method, path):
    with panel.client("reviewer") as reviewer:
        assert reviewer.request(method, path).status_code == 403


def test_the_handlers_that_a_reviewer_has_say_who_asks_by_the_cookie_alone(panel):
    """A role that a request claims for itself changes nothing."""
    with panel.client(
        "reviewer",
    ) as reviewer:
        for claim in ({"X-Role": "operator"}, {"X-Forwarded-User": "operator"}, {"Cookie": "role=operator"}):
            answer = reviewer.post(f"/operator{JOIN}", json={"data": [], "fn_index": 0}, headers=claim)
            assert answer.status_code in (401, 403)
