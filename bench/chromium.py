"""The Chromium that draws the panel in benchmarks and tests: the machine's own, driven by Playwright.
`python -m bench.chromium` says which, or what is missing."""

import functools
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without a sandbox it runs as root, as in a container; the rest keeps it from calling home.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@functools.cache
def find() -> tuple[str | None, str]:
    """A Chromium that really runs without a screen, or None and what was found instead. Ubuntu's package is a stub
    that asks for snap, which does not run in containers."""
    finding = "no Chromium is installed"
    for name in [os.environ.get("KATHERINE_CHROMIUM", ""), *NAMES]:
        if name and (program := shutil.which(name)):
            try:
                ran = subprocess.run(
                    [program, "--headless", *FLAGS, "--dump-dom", "data:text/html,<p>it runs</p>"],
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                finding = f"{program} does not run ({type(error).__name__})"
                continue
            if "it runs" in ran.stdout:
                return program, ""
            finding = f"{program} does not run without a screen"
    return None, finding


if __name__ == "__main__":
    program, finding = find()
    print(program or finding)
    sys.exit(program is None)
