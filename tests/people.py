"""People at the panel: each a browser of their own, with what its console complained of. Pictures of what was on the
screen stay in KATHERINE_SCREENSHOTS, by default screenshots/ in the project."""

import os
import time
from pathlib import Path
from typing import Any

from katherine.settings import PROJECT

PICTURES = Path(os.environ.get("KATHERINE_SCREENSHOTS") or PROJECT / "screenshots")
# Seconds until the longest of the demo's runs has ended: two minutes are usual; a machine half as fast that runs two
# files of tests at once was seen to need more than 400.
WHOLE_RUN = 1500
WIDE, PHONE = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}


class Person:
    """A browser at the page of `role`."""

    def __init__(self, browser: Any, served: Any, role: str = "operator", **context: Any):
        self._context = browser.new_context(**{"viewport": WIDE, "accept_downloads": True} | context)
        self.page = self._context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))
        served.log_in(self.page, role)
        if role == "operator":
            self.page.wait_for_selector("#tabs [role=tab]")

    def open(self, tab: str) -> None:
        """A tab of the operator's page."""
        self.page.wait_for_function("window.katherine !== undefined")
        self.page.evaluate("(name) => katherine.openTab(name)", tab)
        self.page.wait_for_function("(name) => location.hash === `#${name}`", arg=tab)

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        # What stays at the top of the window would stand in the middle of a page that is scrolled down.
        self.page.evaluate("scrollTo(0, 0)")
        self.page.wait_for_timeout(700)  # for a figure's or a tab's last frame: a picture, not a check
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def sees(self, text: str, patience: float = 15) -> None:
        """Wait until the text is in sight, at most `patience` seconds."""
        found, deadline = self.page.get_by_text(text).locator("visible=true"), time.monotonic() + patience
        while not found.count():
            shown = "" if time.monotonic() < deadline else self.page.locator("body").inner_text()
            assert not shown, f"{text!r} is not in sight; complaints: {self.complaints}; what is:\n{shown}"
            self.page.wait_for_timeout(100)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name).locator("visible=true").first

    def close(self) -> None:
        self._context.close()


def until(truth: Any, patience: float, what: str) -> Any:
    """What `truth()` gives once that is true; within `patience` seconds, else `what` was wrong."""
    deadline = time.monotonic() + patience
    while not (found := truth()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found
