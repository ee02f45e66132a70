"""The web process from start to end, and behind a proxy that speaks TLS; in part looked at with a real Chromium."""

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from browser import PASSWORDS, Served, left_out

import app
from jobs import queue
from katherine import runs
from katherine.runs import State
from katherine.settings import PROJECT, Home
from ui import server


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


def refused(home: Home, port: int) -> str:
    """What a second panel says that cannot start."""
    ended = subprocess.run(
        [sys.executable, PROJECT / "app.py", "serve", "--port", str(port)],
        env=os.environ | {"KATHERINE_HOME": str(home.root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_it_serves_on_every_address_of_the_machine_and_says_which_to_open(home, serving):
    panel = serving(home)
    assert f"The panel is at http://localhost:{panel.port}\n" in panel.output
    # Another of the machine's own addresses: what listens on 127.0.0.1 alone does not answer there.
    assert httpx.get(f"http://127.0.0.2:{panel.port}/health", timeout=10).status_code == 200


def test_no_part_of_an_answer_waits_until_the_part_before_is_acknowledged():
    seen = []

    async def answered(_, writer):
        seen.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def asked():
        with server._listening(0) as listener:
            async with await asyncio.start_server(answered, sock=listener):
                reader, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
                await reader.read()
                writer.close()

    asyncio.run(asked())
    assert seen == [1]


def test_on_a_pod_it_says_the_proxys_address(home, serving):
    panel = serving(home, RUNPOD_POD_ID="abc123")
    assert f"The panel is at https://abc123-{panel.port}.proxy.runpod.net\n" in panel.output


@pytest.mark.parametrize(("words", "port"), [([], 7860), (["serve"], 7860), (["serve", "--port", "8000"], 8000)])
def test_serving_is_what_is_done_unasked_and_7860_its_port(words, port, monkeypatch):
    asked = []
    monkeypatch.setattr(app, "serve", lambda options: asked.append(options.port))
    assert app.main(words) == 0
    assert asked == [port]


def processor_seconds(words: list[str]) -> float:
    before = os.times()
    subprocess.run(words, check=True)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def test_its_start_is_gradios_and_loads_no_model_library_though_every_tab_is_opened(home, serving):
    """In seconds it is bench.panel's to say: here others may be using the processor."""
    panel = serving(home)
    spent = sum(map(int, Path(f"/proc/{panel.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    assert spent / os.sysconf("SC_CLK_TCK") < 2 * processor_seconds([sys.executable, "-c", "import gradio"])
    panel.kill()

    # Python itself says what it imports. What a model library brings is named by its first part.
    panel.start(PYTHONPROFILEIMPORTTIME="1")
    with panel.client("operator") as page:
        for area in ("operator", "review"):
            config = page.get(f"/{area}/config").json()
            for each in config["dependencies"]:
                if each["targets"] and each["targets"][0][1] == "tick":
                    call = {"data": [None] * len(each["inputs"]), "fn_index": each["id"], "session_hash": "test"}
                    page.post(f"/{area}/gradio_api/run/predict", json=call)
    lines = [line for line in panel.output.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"gradio", "ui"} <= imported
    assert not imported & {"torch", "transformers", "llama_cpp", "trl", "peft", "unsloth", "datasets"}


def test_a_second_panel_on_a_home_or_a_port_is_refused_by_name(home, tmp_path, serving):
    panel = serving(home)
    on_the_home = refused(home, panel.port + 1)
    assert f"on port {panel.port} (process {panel.pid}" in on_the_home
    elsewhere = Home(tmp_path / "elsewhere")
    assert f"Port {panel.port} cannot be had (Address already in use)" in refused(elsewhere, panel.port)
    assert "serve --port" in refused(elsewhere, panel.port)
    assert "Port 99999 cannot be had" in refused(elsewhere, 99999)
    # The dead hold nothing.
    panel.kill()
    panel.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_though_streams_are_open_and_takes_its_uploads_along(home, serving, number):
    panel = serving(home)
    with panel.client("operator") as page:
        (path,) = page.post("/operator/gradio_api/upload", files={"files": ("a", b"x")}).json()
        with page.stream("GET", "/operator/gradio_api/heartbeat/test") as stream:
            pieces = stream.iter_text()
            assert next(pieces)
            assert panel.stop(number) == 0
            # The stream is ended, not torn.
            assert list(pieces) == []
    # The file, the folder of its upload, and the panel's own beside the inbox, so that keeping it was no copy.
    assert Path(path).parents[2] == home.inbox
    assert not Path(path).parents[1].exists()
    assert "Traceback" not in panel.output + (home.root / "panel.log").read_text()


def test_what_a_killed_panel_left_is_removed_by_the_next_and_what_a_living_one_has_is_not(home, tmp_path, serving):
    living, killed = serving(tmp_path / "living"), serving(home)
    paths = []
    for panel in (living, killed):
        with panel.client("operator") as page:
            paths += page.post("/operator/gradio_api/upload", files={"files": ("a", b"x")}).json()
    killed.kill()
    assert all(Path(path).exists() for path in paths)
    killed.start()
    assert [Path(path).exists() for path in paths] == [True, False]
    assert not list(home.inbox.glob(f".*/{Path(paths[1]).parent.name}"))


def test_a_run_whose_machine_went_away_is_seen_by_the_panel_alone(home, serving):
    run = runs.create(home, "sft", recipe={}, who="test")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.set_status(state=State.running, supervisor=gone.pid, supervisor_started=1, machine=queue.machine())
    panel = serving(home)
    deadline = time.monotonic() + 30
    while run.status().state is not State.interrupted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.status().state is State.interrupted
    assert f"run {run.id} was interrupted" in (home.root / "panel.log").read_text()
    assert panel.stop() == 0


def test_a_home_given_by_a_relative_path_is_the_same_after_the_start(tmp_path):
    panel = Served(tmp_path / "home")
    # As a person types it: `KATHERINE_HOME=home python app.py`, from the folder above.
    panel.start(KATHERINE_HOME="home")
    try:
        assert (tmp_path / "home" / "panel.json").is_file()
        assert json.loads((tmp_path / "home" / "panel.json").read_text())["port"] == panel.port
    finally:
        assert panel.stop() == 0
    assert not (tmp_path / "home" / "panel.json").exists()


# ------------------------------------------------------------------------------------------------ a real browser


@pytest.fixture(scope="module")
def panel(tmp_path_factory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("server") / "home").start()
    yield served
    served.kill()


@pytest.mark.browser
@pytest.mark.parametrize("role", ["operator", "reviewer"])
def test_logging_in_and_out_needs_no_script(panel, browser, role):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{panel.address}/review/")
    assert page.url.endswith("/login?next=/review/")
    field = page.get_by_label("Password")
    assert field.get_attribute("autocomplete") == "current-password"
    field.fill("not-the-password")
    field.press("Enter")
    assert page.get_by_role("alert").inner_text() == "That password is not right."
    page.get_by_label("Password").fill(PASSWORDS[role])
    page.get_by_role("button", name="Log in").click()
    assert page.url == f"{panel.address}/review/"
    page.goto(f"{panel.address}/logout")
    page.get_by_role("button", name="Log out").click()
    assert page.url == f"{panel.address}/login"
    page.goto(f"{panel.address}/review/")
    assert page.url.endswith("/login?next=/review/")
    context.close()


@pytest.mark.browser
def test_markup_that_got_into_a_page_runs_nothing(panel, browser):
    context = browser.new_context()
    page = context.new_page()
    panel.log_in(page)
    page.evaluate(
        """() => {
          const box = document.createElement('div');
          box.innerHTML = '<img src="data:," onerror="window.ran = 1"><a onclick="window.ran = 2">x</a>'
            + '<iframe srcdoc="<script>parent.ran = 3</script>"></iframe><script>window.ran = 4</script>';
          document.body.append(box);
          box.querySelector('a').click();
        }"""
    )
    image = page.locator("img[src='data:,']")
    # By now the picture has failed, and its handler would have run.
    image.evaluate("image => image.complete || new Promise(done => image.addEventListener('error', done))")
    assert page.evaluate("window.ran") is None
    context.close()


def test_where_browsers_are_required_a_missing_one_fails_and_elsewhere_is_left_out(monkeypatch):
    monkeypatch.setenv("KATHERINE_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        left_out("no Chromium")
    monkeypatch.delenv("KATHERINE_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        left_out("no Chromium")
    # What every change must pass asks for it.
    assert "export KATHERINE_BROWSER=required\n" in (PROJECT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        left_out("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@contextmanager
def proxied(panel: Served, certificate: tuple[Path, Path], manner: str) -> Iterator[str]:
    """A reverse proxy that ends TLS, on a port of its own. manner: which of the browser's host and scheme it tells:
    "host kept", "host forwarded", or "silent", which tells neither. One request a connection, passed on as it comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    started = threading.Event()
    place: dict[str, object] = {}

    def rewritten(head: bytes) -> bytes:
        first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith((b"connection:", b"host:"))]
        host = next(line for line in lines if line.lower().startswith(b"host:")).partition(b":")[2].strip()
        inner = f"127.0.0.1:{panel.port}".encode()
        kept += [b"Connection: close", b"Host: " + (host if manner == "host kept" else inner)]
        if manner != "silent":
            kept += [b"X-Forwarded-Proto: https", b"X-Forwarded-For: 198.51.100.7"]
        if manner == "host forwarded":
            kept += [b"X-Forwarded-Host: " + host]
        return b"\r\n".join([first, *kept]) + b"\r\n\r\n"

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            writer.write(part)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            there, back = await asyncio.open_connection("127.0.0.1", panel.port)
            back.write(rewritten(head))
            up, down = asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in (writer, back):
                if each is not None:
                    each.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        ending = asyncio.Event()
        place.update(loop=asyncio.get_running_loop(), end=ending.set, port=server.sockets[0].getsockname()[1])
        started.set()
        await ending.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    started.wait()
    try:
        yield f"https://localhost:{place['port']}"
    finally:
        place["loop"].call_soon_threadsafe(place["end"])
        thread.join()


def a_run_with_curves(home: Home) -> None:
    """A finished run as its folder says, so that there is something to draw."""
    run = runs.create(home, "sft", recipe=queue.complete("sft", {}), who="test")
    rows = [{"step": step, "loss": 4 / step, "learning_rate": 1e-4, "grad_norm": 1.0} for step in range(1, 31)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.set_status(state=State.succeeded, step=30, of=30, started=runs.now(), ended=runs.now())


@pytest.mark.browser
@pytest.mark.parametrize("manner", ["host kept", "host forwarded", "silent"])
def test_behind_a_tls_proxy_a_page_loads_uploads_streams_downloads_and_draws(home, browser, certificate, manner):
    a_run_with_curves(home)
    panel = Served(home)
    with proxied(panel, certificate, manner) as address:
        panel.start(**({"KATHERINE_PUBLIC_URL": address} if manner == "silent" else {}))
        context = browser.new_context(ignore_https_errors=True, viewport={"width": 1440, "height": 1000})
        # Two cores may be busy with another test's model.
        context.set_default_timeout(120_000)
        page = context.new_page()
        said, failed = [], []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        try:
            panel.log_in(page, address=address)
            cookies = {cookie["name"]: cookie for cookie in context.cookies()}
            assert cookies["__Host-katherine"]["secure"] and cookies["__Host-katherine"]["httpOnly"]

            # A timer's event, through Gradio's own client.
            with page.expect_response("**/gradio_api/run/predict") as answer:
                pass
            assert answer.value.status == 200

            sent = page.evaluate(
                """async () => {
                  const form = new FormData();
                  form.append('files', new Blob(['x'.repeat(3e6)]), 'talk.jsonl');
                  const answer = await fetch('/operator/gradio_api/upload', {method: 'POST', body: form});
                  return await answer.json();
                }"""
            )
            assert Path(sent[0]).stat().st_size == 3e6

            # The heartbeat has no end: what is heard of it came while it went on.
            heard = page.evaluate(
                """() => new Promise((done) => {
                  const source = new EventSource('/operator/gradio_api/heartbeat/test');
                  source.onmessage = (message) => { source.close(); done(message.data); };
                  source.onerror = () => done('failed');
                })"""
            )
            assert heard == "ALIVE"

            page.get_by_role("tab", name="History").click()
            page.locator(".k-all-runs .k-row").first.click()
            # Not by a click: Chromium's downloads heed no exception for a certificate of one's own.
            link = page.get_by_role("link", name="metrics.jsonl").get_attribute("href")
            (metrics,) = home.runs.glob("*/metrics.jsonl")
            text = page.evaluate("async (address) => await (await fetch(address)).text()", link)
            assert text == metrics.read_text()
            page.wait_for_selector(".k-plot .main-svg:visible")

            assert (said, failed) == ([], [])
            assert {url[: len(address)] for url in asked if not url.startswith(("data:", "blob:"))} == {address}
        finally:
            context.close()
            panel.kill()
