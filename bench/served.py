"""The panel in a process of its own, and a bare Gradio likewise, for what measures them from outside, as a browser has
them. What is measured is bench.panel's and bench.chat's."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from katherine.settings import PROJECT, Home

PASSWORD = "a password of this benchmark"


@contextmanager
def panel(home: Home) -> Iterator[tuple[int, subprocess.Popen, float]]:
    """Its port, its process, and how many seconds it took until it answered."""
    secrets = {"KATHERINE_OPERATOR_PASSWORD": PASSWORD, "KATHERINE_REVIEWER_PASSWORD": PASSWORD[::-1]}
    with _served(["app.py", "serve", "--port"], secrets | {"KATHERINE_HOME": str(home.root)}) as served:
        yield served


@contextmanager
def bare_gradio() -> Iterator[tuple[int, subprocess.Popen, float]]:
    """The same of bench.bare, the baseline."""
    with _served(["-m", "bench.bare"], {}) as served:
        yield served


@contextmanager
def _served(command: list[str], environment: dict[str, str]) -> Iterator[tuple[int, subprocess.Popen, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command, str(port)], cwd=PROJECT, env=os.environ | environment, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start.") from None
                time.sleep(0.1)
        yield port, process, time.monotonic() - began
    finally:
        process.terminate()
        process.wait(timeout=20)
