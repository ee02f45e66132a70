"""The panel as a person meets it: served by a real child process, looked at with a real Chromium.

`serving(home)` starts one, `browser` is a Chromium, `served.log_in(page)` goes through the door. A test that takes
`browser` is left out where no Chromium runs; with KATHERINE_BROWSER=required it fails instead.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from bench import chromium
from katherine.settings import PROJECT, Home, child_environment

OPERATOR = "operator-under-test"
REVIEWER = "reviewer-under-test"
PASSWORDS = {"operator": OPERATOR, "reviewer": REVIEWER}


class Served:
    """A panel in a child process. `environment` adds to its variables; a value of None takes one away."""

    def __init__(self, home: Home | Path, **environment: str | None):
        self.home = home if isinstance(home, Home) else Home(home)
        with socket.socket() as asking:
            asking.bind(("127.0.0.1", 0))
            self.port: int = asking.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        variables = child_environment(
            KATHERINE_HOME=str(self.home.root),
            KATHERINE_OPERATOR_PASSWORD=OPERATOR,
            KATHERINE_REVIEWER_PASSWORD=REVIEWER,
        )
        # A pod's own would change what the server calls itself.
        for name in ("RUNPOD_POD_ID", "KATHERINE_PUBLIC_URL"):
            variables.pop(name, None)
        variables |= {name: value for name, value in environment.items() if value is not None}
        self._variables = {name: value for name, value in variables.items() if environment.get(name, "") is not None}
        self._output = self.home.root.parent / f"{self.home.root.name}-{self.port}.output"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *words: str, patience: float = 60, **environment: str) -> "Served":
        """Start it, on the same port each time, and wait until it answers. `words` go to `app.py serve`."""
        self._variables |= environment
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / "app.py"), "serve", "--port", str(self.port), *words],
                env=self._variables,
                cwd=self.home.root.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        deadline = time.monotonic() + patience
        while True:
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the panel did not come up:\n{self.output}")
            time.sleep(0.05)

    @property
    def output(self) -> str:
        """What it has said on its terminal."""
        return self._output.read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """As when the machine goes away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, patience: float = 20) -> int:
        """Ask it to end, and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(patience)

    def client(self, role: str | None = None, **given: Any) -> httpx.Client:
        """An HTTP client that behaves like a page of this panel, logged in as `role`."""
        client = httpx.Client(base_url=self.address, headers={"Origin": self.address}, timeout=30, **given)
        if role is not None:
            answer = httpx.post(
                f"{self.address}/login", data={"password": PASSWORDS[role]}, headers=client.headers, timeout=30
            )
            assert answer.status_code == 303, answer.text
            client.cookies.update(answer.cookies)
        return client

    def log_in(self, page: Any, role: str = "operator", address: str | None = None) -> None:
        """Log a Playwright page in through the form, and wait for the role's page."""
        page.goto(f"{address or self.address}/login")
        page.get_by_label("Password").fill(PASSWORDS[role])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/operator/" if role == "operator" else "**/review/")
        page.wait_for_selector(".gradio-container", state="attached")


@pytest.fixture
def serving() -> Iterator[Callable[..., Served]]:
    """serving(home, **environment): a panel that answers, ended with the test."""
    started: list[Served] = []

    def serve(home: Home | Path, *words: str, **environment: str | None) -> Served:
        started.append(Served(home, **environment))
        return started[-1].start(*words)

    yield serve
    for served in started:
        served.kill()


# A module's, not the session's: Playwright leaves an event loop in its thread, beside which asyncio.run refuses to run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, shared: take `browser.new_context()` for cookies of your own, and close it."""
    program, finding = chromium.find()
    if program is not None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            program, finding = None, "playwright is not installed (requirements-dev.txt)"
    if program is None:
        left_out(f"{finding}; `bash bootstrap.sh test` as root brings one")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=chromium.FLAGS)
        yield launched
        launched.close()


def left_out(why: str) -> NoReturn:
    """Leave a test out, or fail it where none may be."""
    if os.environ.get("KATHERINE_BROWSER") == "required":
        pytest.fail(f"{why} (KATHERINE_BROWSER=required)", pytrace=False)
    pytest.skip(why)
