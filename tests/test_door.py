"""The door, over HTTP against the running server: a real child process on a real port. What is asserted of Gradio is
asserted of the version that is installed."""

import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import OPERATOR, REVIEWER, Served

from katherine.errors import SetupError
from katherine.settings import Home
from ui import throttle
from ui.door import Address, wanted
from ui.passwords import Passwords, Role
from ui.sessions import LIFETIME, Sessions
from ui.throttle import Throttle

FOREIGN = "https://evil.example"
# Every tenant of RunPod's proxy is same-site with us.
NEIGHBOUR = "https://abc123-8888.proxy.runpod.net"
CALL = {"data": [], "fn_index": 0, "session_hash": "stranger"}
# Gradio's routes that do something, or tell something: (method, what comes after /operator).
GRADIO = [
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/app_id"),  # how a page finds out that it is connected again
    ("GET", "/gradio_api/heartbeat/stranger"),
    ("GET", "/gradio_api/queue/data?session_hash=stranger"),
    ("GET", "/gradio_api/queue/status"),
    ("GET", "/gradio_api/upload_progress?upload_id=1"),
    ("GET", "/gradio_api/file=/etc/passwd"),
    ("GET", "/gradio_api/call/predict/1"),
    ("GET", "/files/some-run/run.json"),
    ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/api/predict"),
    ("POST", "/gradio_api/call/predict"),
    ("POST", "/gradio_api/call/v2/predict"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/component_server"),
]
# Those that nobody may have, whoever asks.
CLOSED = [
    ("GET", "/gradio_api/proxy=http://127.0.0.1:80/"),
    ("GET", "/gradio_api/proxy=https://example.hf.space/"),
    ("GET", "/gradio_api/file=http://127.0.0.1:80/"),
    ("GET", "/gradio_api/file=https://example.org/"),
    ("GET", "/gradio_api/file//etc/passwd"),
    ("GET", "/gradio_api/deep_link?session_hash=x"),
    ("GET", "/gradio_api/token"),
    ("GET", "/gradio_api/user"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/run-history/records"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/dev/reload"),
    ("GET", "/gradio_api/vibe-code"),
    ("GET", "/gradio_api/profiling/summary"),
    ("GET", "/gradio_api/mcp/schema"),
    ("GET", "/monitoring"),
    ("GET", "/monitoring/summary"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/login"),
    ("GET", "/logout"),
    ("POST", "/login"),
    ("POST", "/gradio_api/vibe-edit"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/call/predict"),
    ("POST", "/gradio_api/stream/x"),
]


@pytest.fixture(scope="module")
def panel(tmp_path_factory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("door") / "home").start()
    yield served
    served.kill()


@pytest.fixture(scope="module")
def operator(panel) -> httpx.Client:
    return panel.client("operator")


@pytest.fixture(scope="module")
def reviewer(panel) -> httpx.Client:
    return panel.client("reviewer")


def ask(client: httpx.Client, method: str, path: str, **headers: str) -> httpx.Response:
    """The answer's head, and its body unless it is a stream without end."""
    given = {"json": CALL} if method == "POST" else {}
    with client.stream(method, path, headers=headers, **given) as answer:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.read()
        return answer


def raw(panel: Served, target: str, *headers: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of a request whose target is sent letter by letter: clients would tidy it up."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{panel.port}", "Connection: close", *headers, "", ""]
    with socket.create_connection(("127.0.0.1", panel.port), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.decode("latin-1").partition("\r\n\r\n")
    return int(head.split()[1]), body


# ------------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("area", ["/operator", "/review"])
@pytest.mark.parametrize(("method", "path"), GRADIO + CLOSED)
def test_a_stranger_gets_nothing_from_gradio(panel, area, method, path):
    with panel.client() as stranger:
        answer = ask(stranger, method, area + path)
    assert answer.status_code == 401 or "//" in path
    assert answer.status_code in (400, 401)
    assert "set-cookie" not in answer.headers
    assert len(answer.text) < 100


def test_a_stranger_who_opens_a_page_is_asked_to_log_in_and_comes_back_to_it(panel):
    with panel.client() as stranger:
        sent = stranger.get("/review/", headers={"Accept": "text/html"})
        assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=/review/")
        form = stranger.get(sent.headers["location"])
        assert 'name="next" value="/review/"' in form.text
        back = stranger.post("/login", data={"password": OPERATOR, "next": "/review/"})
        assert (back.status_code, back.headers["location"]) == (303, "/review/")


def test_only_the_named_paths_are_open(panel):
    with panel.client() as stranger:
        for path in ("/login", "/health", "/favicon.ico", "/static/katherine.css", "/static/katherine.js"):
            assert stranger.get(path).status_code == 200, path
        for path in ("/", "/logout", "/docs", "/openapi.json", "/redoc", "/static/", "/anything"):
            assert stranger.get(path).status_code == 401, path
        for path in ("/static/../door.py", "/static/nothing.css"):
            assert stranger.get(path).status_code in (400, 401, 404), path


@pytest.mark.parametrize(
    "target", ["javascript:alert(1)", "//evil.example", "https://evil.example", "/\\evil.example", "/operator/../x", ""]
)
def test_after_logging_in_nobody_is_sent_elsewhere(target):
    assert wanted(target, Role.operator) == "/operator/"
    assert wanted("/operator/", Role.reviewer) == "/review/"


def test_health_says_nothing_private(panel):
    answer = httpx.get(f"{panel.address}/health")
    assert answer.json()["status"] == "ok"
    assert set(answer.json()) <= {"status", "version"}


# ---------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(("method", "path"), GRADIO)
def test_the_reviewer_reaches_nothing_of_the_operators(reviewer, method, path):
    answer = ask(reviewer, method, f"/operator{path}")
    assert answer.status_code == 403
    assert "operator only" in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/review/gradio_api/upload"),
        ("GET", "/review/gradio_api/upload_progress?upload_id=1"),
        ("GET", "/review/gradio_api/file=/etc/passwd"),
        ("GET", "/review/files/some-run/run.json"),
    ],
)
def test_the_reviewer_hands_in_no_files_and_gets_none(reviewer, method, path):
    assert ask(reviewer, method, path).status_code == 404


def test_each_role_begins_on_its_own_page_and_the_operator_may_see_both(operator, reviewer):
    assert operator.get("/").headers["location"] == "/operator/"
    assert reviewer.get("/").headers["location"] == "/review/"
    for client, path in ((operator, "/operator/"), (operator, "/review/"), (reviewer, "/review/")):
        assert "gradio" in client.get(path).text
        assert client.get(path.rstrip("/")).headers["location"] == path


def test_a_person_is_told_in_words_what_is_not_for_them(reviewer):
    answer = reviewer.get("/operator/", headers={"Accept": "text/html"})
    assert answer.status_code == 403
    assert "You are logged in as reviewer" in answer.text
    assert 'action="/logout"' in answer.text


def test_the_reviewers_page_has_no_operators_handler(reviewer, operator):
    def targets(client, area):
        config = client.get(f"{area}/config").json()
        return {row["id"] for row in config["components"]}, config["dependencies"]

    _, handlers = targets(reviewer, "/review")
    assert len(handlers) < len(targets(operator, "/operator")[1])
    # What belongs to no handler of this page cannot be called through it.
    beyond = {"data": [], "fn_index": len(handlers) + 100, "session_hash": "x"}
    assert reviewer.post("/review/gradio_api/run/predict", json=beyond).status_code >= 400


# ----------------------------------------------------------------------------------------- addresses in disguise


@pytest.mark.parametrize("role", [None, "reviewer"])
@pytest.mark.parametrize(
    "target",
    [
        "//operator/config",
        "/operator//config",
        "/./operator/config",
        "/review/../operator/config",
        "/review/..%2foperator/config",
        "/review/%2e%2e/operator/config",
        "/static/../operator/config",
        "/static/..%2f..%2foperator/config",
        "/login/../operator/config",
        "/login;/../operator/config",
        "/%6fperator/config",
        "/%6Fperator%2Fconfig",
        "/operator%2fconfig",
        "/operator/config/",
        "/operator/config%00",
        "/operator./config",
        "/operator.../config",
        "/OPERATOR/config",
        "/Operator/config",
        "/operator\\config",
        "/review\\..\\operator/config",
        "/operator/config#/login",
        "/operator/config?x=/login",
        "/operator;x=/login/config",
        "/%2foperator/config",
        "/%252e%252e/operator/config",
        "\t/operator/config",
        "http://127.0.0.1/operator/config",
        "*",
        "operator/config",
        "/ｏperator/config".encode().decode("latin-1"),
    ],
)
def test_no_way_of_writing_an_address_gets_around_the_door(panel, reviewer, role, target):
    cookie = [f"Cookie: katherine={reviewer.cookies['katherine']}"] if role else []
    forged = ["X-Forwarded-Prefix: /login", "X-Original-URL: /login", "X-Rewrite-URL: /login", "X-Script-Name: /login"]
    status, body = raw(panel, target, *cookie, *forged)
    assert status in (400, 401, 403, 404)
    assert "components" not in body and "gradio" not in body.lower()


def test_a_websocket_is_refused(panel, operator):
    upgrade = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    cookie = f"Cookie: katherine={operator.cookies['katherine']}"
    for target in ("/operator/gradio_api/queue/join", "/operator/", "/nowhere"):
        status, _ = raw(panel, target, cookie, *upgrade)
        assert status != 101


# ---------------------------------------------------------------------------------------------------- origin


def kept(panel: Served) -> list[Path]:
    """The uploads that the server keeps."""
    found = []
    for place in Path("/proc", str(panel.pid), "cwd").resolve().parent.rglob("*"):
        found += [place] if place.is_file() else []
    return found


@pytest.mark.parametrize(
    "origin",
    [
        FOREIGN,
        NEIGHBOUR,
        "null",
        "",
        "http://127.0.0.1",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1:{port}.evil.example",
    ],
)
def test_a_request_from_another_origin_is_refused_even_with_the_operators_cookie(panel, operator, origin):
    origin = origin.format(port=panel.port)
    before = kept(panel)
    uploaded = operator.post("/operator/gradio_api/upload", files={"files": ("a", b"x")}, headers={"Origin": origin})
    assert uploaded.status_code == 403
    assert kept(panel) == before
    for path in ("run/predict", "queue/join", "cancel", "reset"):
        answer = operator.post(f"/operator/gradio_api/{path}", json=CALL, headers={"Origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    for path in ("/login", "/logout"):
        assert operator.post(path, data={"password": OPERATOR}, headers={"Origin": origin}).status_code == 403
    assert operator.get("/operator/config", headers={"Origin": origin}).status_code == 403
    assert operator.get("/operator/config").status_code == 200


def test_a_post_that_names_no_origin_is_refused(panel, operator):
    cookie = {"Cookie": f"katherine={operator.cookies['katherine']}"}
    answer = httpx.post(f"{panel.address}/operator/gradio_api/run/predict", json=CALL, headers=cookie)
    assert answer.status_code == 403


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_and_preflights_are_refused(operator, method):
    for origin in (FOREIGN, str(operator.base_url)):
        asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = operator.request(method, "/operator/gradio_api/run/predict", headers=asking)
        assert answer.status_code in (403, 405)
        assert not [name for name in answer.headers if name.startswith("access-control-allow")]


def test_a_foreign_page_may_link_here_but_fetch_frame_or_post_nothing(panel, operator):
    with httpx.Client(base_url=panel.address, cookies=operator.cookies) as page:
        for site in ("cross-site", "same-site"):
            link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
            assert page.get("/operator/", headers=link).status_code == 200
            for other in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}):
                assert page.get("/operator/config", headers=link | other).status_code == 403


# ---------------------------------------------------------------------------------------------------- Gradio


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("area", ["/operator", "/review"])
def test_what_no_page_uses_is_closed_to_everybody(operator, area, method, path):
    answer = ask(operator, method, area + path)
    assert answer.status_code in (400, 404)
    assert not [name for name in answer.cookies if "access-token" in name]


@pytest.mark.parametrize("area", ["/operator", "/review"])
def test_gradios_own_extras_are_off(operator, area):
    config = operator.get(f"{area}/config").json()
    assert config["footer_links"] == []
    assert not config.get("run_history")
    assert not config.get("enable_monitoring")
    assert not config.get("mcp_server")
    assert config["analytics_enabled"] is False
    assert config["show_error"] is False


def test_an_upload_comes_back_to_the_operator_and_no_other_file_does(panel, operator, reviewer):
    sent = operator.post("/operator/gradio_api/upload", files={"files": ("talk.jsonl", b'{"messages": []}\n')})
    (path,) = sent.json()
    assert operator.get(f"/operator/gradio_api/file={path}").content == b'{"messages": []}\n'
    folder = Path(path).parent.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for other in (
        "/etc/passwd",
        str(panel.home.root / "session.key"),
        f"{folder}/../passwd",
        "pyproject.toml",
        "app.py",
    ):
        assert operator.get(f"/operator/gradio_api/file={other}").status_code in (400, 403, 404), other
    assert ask(reviewer, "GET", f"/review/gradio_api/file={path}").status_code == 404
    assert ask(operator, "GET", f"/review/gradio_api/file={path}").status_code == 404


def test_the_working_directory_is_empty_and_cannot_be_served(panel, operator):
    place = Path("/proc", str(panel.pid), "cwd").resolve()
    assert list(place.iterdir()) == []
    (place / "left.txt").write_text("not to be had")
    try:
        for name in ("left.txt", str(place / "left.txt")):
            assert "not to be had" not in ask(operator, "GET", f"/operator/gradio_api/file={name}").text
    finally:
        (place / "left.txt").unlink()


def test_a_file_that_is_too_large_is_refused_whether_or_not_it_says_so(panel, operator):
    def pieces():
        yield b'--edge\r\nContent-Disposition: form-data; name="files"; filename="big"\r\n\r\n'
        for _ in range(101):
            yield b"x" * 10**6
        yield b"\r\n--edge--\r\n"

    before = kept(panel)
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    said = (f"Origin: {panel.address}", f"Cookie: katherine={operator.cookies['katherine']}")
    status, _ = raw(panel, "/operator/gradio_api/upload", *said, "Content-Length: 101000000", method="POST")
    assert status == 413
    unsaid = operator.post("/operator/gradio_api/upload", content=pieces(), headers=headers)
    assert unsaid.status_code == 413
    call = operator.post("/operator/gradio_api/run/predict", content=b"[" * 9 * 2**20)
    assert call.status_code == 413
    assert kept(panel) == before


def test_a_stream_comes_as_it_is_written(operator):
    with operator.stream("GET", "/operator/gradio_api/heartbeat/test") as answer:
        # The heartbeat never ends: what is read here was passed on while it goes on.
        assert next(answer.iter_text()) == "data: ALIVE\n\n"


# --------------------------------------------------------------------------------------------------- headers


def test_the_security_headers_are_on_every_answer(panel, operator):
    with panel.client() as stranger:
        answers = [
            stranger.get("/login"),
            stranger.get("/health"),
            stranger.get("/operator/config"),
            stranger.get("/static/katherine.css"),
            stranger.post("/login", data={"password": "x"}, headers={"Origin": FOREIGN}),
            operator.get("/operator/"),
            operator.get("/operator/theme.css"),
            operator.get("/operator/nothing"),
            ask(operator, "GET", "/operator/gradio_api/heartbeat/test"),
        ]
    for answer in answers:
        headers = answer.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
        assert "strict-transport-security" not in headers
    for path in ("/operator/", "/review/"):
        first, second = (operator.get(path) for _ in range(2))
        policy = first.headers["content-security-policy"]
        assert "script-src-attr 'none'" in policy and "script-src 'self' 'unsafe-eval' 'nonce-" in policy
        assert "'unsafe-inline'" not in policy.partition("style-src")[0]
        assert policy != second.headers["content-security-policy"]
    proxied = {"X-Forwarded-Proto": "https", "Origin": f"https://127.0.0.1:{panel.port}"}
    over_https = operator.get("/operator/theme.css", headers=proxied)
    assert over_https.headers["strict-transport-security"].startswith("max-age=")


def test_pages_are_not_cached_and_what_carries_its_hash_is(operator):
    page = operator.get("/operator/")
    assert page.headers["cache-control"] == "no-store"
    assert operator.get("/operator/config").headers["cache-control"] == "no-store"
    asset = re.search(r'"\./(assets/[^"]+\.js)"', page.text) or re.search(r"(assets/[\w./-]+\.js)", page.text)
    assert operator.get(f"/operator/{asset[1]}").headers["cache-control"].startswith("private, max-age=")
    assert operator.get("/operator/assets/nothing.js").headers["cache-control"] == "no-store"
    assert operator.get("/static/katherine.js").headers["cache-control"].startswith("public, max-age=")


# --------------------------------------------------------------------------------------------------- sessions


def test_the_cookie_cannot_be_read_by_a_script_and_behind_https_travels_by_it_alone(panel):
    with panel.client() as client:
        plain = client.post("/login", data={"password": OPERATOR}).headers["set-cookie"]
        assert plain.startswith("katherine=")
        assert (
            "httponly" in plain.lower() and "samesite=lax" in plain.lower() and f"max-age={LIFETIME}" in plain.lower()
        )
    with httpx.Client(base_url=panel.address) as client:
        proxied = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "panel.example", "Origin": "https://panel.example"}
        cookies = client.post("/login", data={"password": OPERATOR}, headers=proxied).headers.get_list("set-cookie")
        assert [cookie for cookie in cookies if cookie.startswith("__Host-katherine=")]
        assert all("; secure" in cookie.lower() and "domain" not in cookie.lower() for cookie in cookies)


def test_a_forged_a_foreign_and_an_expired_cookie_open_nothing(panel, operator, monkeypatch, tmp_path):
    monkeypatch.setenv("KATHERINE_OPERATOR_PASSWORD", OPERATOR)
    monkeypatch.setenv("KATHERINE_REVIEWER_PASSWORD", REVIEWER)
    own = Sessions(panel.home, Passwords.of(panel.home))
    elsewhere = Sessions(Home(tmp_path), Passwords.of(Home(tmp_path)))
    good = own.begin(Role.operator)
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr("itsdangerous.timed.time.time", lambda: now - LIFETIME - 1)
        expired = own.begin(Role.operator)
    reviewers = own.begin(Role.reviewer)

    def status(cookie):
        return httpx.get(f"{panel.address}/operator/config", headers={"Cookie": f"katherine={cookie}"}).status_code

    assert status(good) == 200
    assert status(reviewers) == 403
    for bad in (
        expired,
        elsewhere.begin(Role.operator),
        good[:-2],
        f"{good}x",
        own.known_browser(Role.operator),
        "",
        ".",
    ):
        assert status(bad) == 401


def test_logging_out_ends_the_session_wherever_its_cookie_is_and_a_restart_ends_none(tmp_path, serving):
    panel = serving(tmp_path / "home")
    stays, leaves = panel.client("operator"), panel.client("operator")
    copy = leaves.cookies["katherine"]
    assert leaves.get("/logout").status_code == 200
    assert leaves.post("/logout").headers["location"] == "/login"

    def status(cookie):
        return httpx.get(f"{panel.address}/operator/config", headers={"Cookie": f"katherine={cookie}"}).status_code

    assert (status(copy), status(stays.cookies["katherine"])) == (401, 200)
    panel.kill()
    panel.start()
    assert (status(copy), status(stays.cookies["katherine"])) == (401, 200)
    panel.kill()
    panel.start(KATHERINE_OPERATOR_PASSWORD="another-password")
    assert status(stays.cookies["katherine"]) == 401


# --------------------------------------------------------------------------------------------------- passwords


def test_a_wrong_password_gives_no_hint_and_a_blank_one_is_wrong(panel):
    with panel.client() as client:
        wrong = [client.post("/login", data={"password": text}) for text in ("operator-under-tesT", "", "x" * 5000)]
        assert [answer.status_code for answer in wrong] == [401] * 3
        assert len({answer.text for answer in wrong}) == 1
        assert all("set-cookie" not in answer.headers for answer in wrong)
        assert client.post("/login", data={"password": f" {OPERATOR}\n"}).status_code == 303


def test_passwords_are_made_once_shown_once_and_kept_hashed(tmp_path, serving):
    none = {"KATHERINE_OPERATOR_PASSWORD": None, "KATHERINE_REVIEWER_PASSWORD": None}
    panel = serving(tmp_path / "home", **none)
    made = re.findall(r"The (\w+)'s password: (\S+)", panel.output)
    assert [role for role, _ in made] == ["operator", "reviewer"]

    def log_in(password):
        with panel.client() as client:
            return client.post("/login", data={"password": password}).headers.get("location")

    assert [log_in(password) for _, password in made] == ["/operator/", "/review/"]
    for file in panel.home.root.iterdir():
        assert not file.is_file() or made[0][1] not in file.read_text()
    for name in ("passwords.json", "session.key", "panel.log"):
        assert stat.S_IMODE((panel.home.root / name).stat().st_mode) == 0o600
    panel.stop()
    panel.start()
    assert "password:" not in panel.output
    assert log_in(made[0][1]) == "/operator/"
    session = panel.client()
    session.post("/login", data={"password": made[0][1]})
    panel.stop()
    panel.start("--new-passwords")
    assert log_in(made[0][1]) is None
    assert session.get("/operator/config").status_code == 401
    assert log_in(re.search(r"The operator's password: (\S+)", panel.output)[1]) == "/operator/"


@pytest.mark.parametrize(
    ("operators", "reviewers", "said"),
    [("short", "long-enough", "has 5 characters"), ("same-one!", "same-one!", "the same")],
)
def test_passwords_that_cannot_work_are_refused_at_the_start(tmp_path, monkeypatch, operators, reviewers, said):
    monkeypatch.setenv("KATHERINE_OPERATOR_PASSWORD", operators)
    monkeypatch.setenv("KATHERINE_REVIEWER_PASSWORD", reviewers)
    with pytest.raises(SetupError, match=said):
        Passwords.of(Home(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"operator": {}}', '{"nobody": {}}'])
def test_a_damaged_password_file_is_named_with_its_remedy(tmp_path, monkeypatch, content):
    monkeypatch.delenv("KATHERINE_OPERATOR_PASSWORD", raising=False)
    monkeypatch.delenv("KATHERINE_REVIEWER_PASSWORD", raising=False)
    (tmp_path / "passwords.json").write_text(content)
    with pytest.raises(SetupError, match=r"passwords\.json.*--new-passwords"):
        Passwords.of(Home(tmp_path))


# --------------------------------------------------------------------------------------------------- throttle


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tries_from_one_address_run_out_and_come_back_with_time():
    clock = Clock()
    tries = Throttle(clock)
    assert [tries.take("a") for _ in range(5)] == [0] * 5
    assert tries.take("a") == 30
    assert tries.take("b") == 0
    clock.now += 30
    assert (tries.take("a"), tries.take("a")) == (0, 30)


def test_strangers_from_everywhere_share_a_limit_that_does_not_shut_out_who_is_known():
    clock = Clock()
    tries = Throttle(clock)
    for number in range(10**5):
        tries.take(f"stranger {number}")
    assert tries.take("one more") > 0
    assert tries.take("browser that logged in before", known=True) == 0
    assert len(tries._each) <= throttle._REMEMBERED


def test_the_right_password_gives_its_tries_back():
    tries = Throttle(Clock())
    for _ in range(100):
        assert tries.take("a") == 0
        tries.forget("a")


def test_who_hammers_from_one_address_waits_and_who_knows_the_password_still_comes_in(tmp_path, serving):
    panel = serving(tmp_path / "home", RUNPOD_POD_ID="pod123")
    public = f"https://pod123-{panel.port}.proxy.runpod.net"
    hosts = {"Origin": public, "Host": public.removeprefix("https://")}

    def log_in(client, password, address):
        # The last hop is the proxy's own; what comes before it, the asker may have made up.
        headers = hosts | {"X-Forwarded-For": f"6.6.6.{len(tried) % 250}, {address}"}
        return client.post("/login", data={"password": password}, headers=headers)

    tried = []
    with httpx.Client(base_url=panel.address) as owner, httpx.Client(base_url=panel.address) as stranger:
        assert log_in(owner, OPERATOR, "1.1.1.1").status_code == 303
        while len(tried) < 40 and (not tried or tried[-1].status_code != 429):
            tried.append(log_in(stranger, "guessed-password", "2.2.2.2"))
        refused = tried[-1]
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "Too many tries" in refused.text
        # Not even the right one is looked at now: else guessing would go on at full speed.
        assert log_in(stranger, OPERATOR, "2.2.2.2").status_code == 429
        # From the address of the one who hammers, too, who has logged in before comes in.
        known = {cookie.name: cookie.value for cookie in owner.cookies.jar if cookie.name == "katherine-browser"}
        assert known
        stranger.cookies.clear()
        again = stranger.post(
            "/login",
            data={"password": OPERATOR},
            headers=hosts | {"X-Forwarded-For": "2.2.2.2", "Cookie": f"katherine-browser={known['katherine-browser']}"},
        )
        assert again.status_code == 303
        assert "__Host-katherine=" in again.headers["set-cookie"]
        assert f"The panel is at {public}" in panel.output


# -------------------------------------------------------------------------------------------------------- log


def test_refusals_are_logged_with_who_and_why_and_without_secrets(panel, operator):
    with panel.client() as stranger:
        stranger.post("/login", data={"password": "a-wrong-guess"})
        stranger.get("/operator/config?token=hidden-in-the-query")
        stranger.get("/operator/%0aforged%20line")
    operator.get("/operator/gradio_api/token?also=hidden-in-the-query")
    log = (panel.home.root / "panel.log").read_text()
    assert "refused 127.0.0.1: POST '/login': wrong password" in log
    assert "refused 127.0.0.1: GET '/operator/config': Log in first." in log
    assert "refused operator at 127.0.0.1: GET '/operator/gradio_api/token': There is no such page." in log
    assert "\nforged" not in log
    for secret in ("a-wrong-guess", "hidden-in-the-query", OPERATOR, REVIEWER, operator.cookies["katherine"]):
        assert secret not in log
        assert secret not in panel.output


# -------------------------------------------------------------------------------------------------- addresses


def test_an_address_of_its_own_is_an_origin_and_one_that_is_none_is_refused(monkeypatch):
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    monkeypatch.setenv("KATHERINE_PUBLIC_URL", "https://Panel.example/")
    assert Address.of(7860) == Address(("https://panel.example",), False)
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    assert "https://abc-7860.proxy.runpod.net" in Address.of(7860).public
    for text in ("panel.example", "ftp://panel.example", "https://panel.example/below", "https://a b"):
        monkeypatch.setenv("KATHERINE_PUBLIC_URL", text)
        with pytest.raises(SetupError, match="KATHERINE_PUBLIC_URL"):
            Address.of(7860)


def test_the_signing_key_is_not_taken_from_a_file_that_was_cut_short(tmp_path, monkeypatch):
    monkeypatch.setenv("KATHERINE_OPERATOR_PASSWORD", OPERATOR)
    monkeypatch.setenv("KATHERINE_REVIEWER_PASSWORD", REVIEWER)
    (tmp_path / "session.key").write_text("")
    with pytest.raises(SetupError, match=r"session\.key"):
        Sessions(Home(tmp_path), Passwords.of(Home(tmp_path)))
    (tmp_path / "session.key").unlink()
    (tmp_path / "logged-out.json").write_text(json.dumps(["not", "a", "table"]))
    with pytest.raises(SetupError, match=r"logged-out\.json"):
        Sessions(Home(tmp_path), Passwords.of(Home(tmp_path)))
    assert os.path.getsize(tmp_path / "session.key") >= 64
