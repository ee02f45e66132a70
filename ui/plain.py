"""Pages without a script: log in, log out, refused. What they say is their callers'."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from ui.passwords import LONGEST

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "plain.css").read_text(encoding="utf-8")
_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    (_FOLDER / "plain.html").read_text(encoding="utf-8")
)
# Stricter than the panel's: the style that is ours, and nothing else.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'",
        "img-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


def page(
    title: str,
    text: str = "",
    *,
    status: int = 200,
    form: str = "",
    next: str = "",
    problem: str = "",
    link: tuple[str, str] | None = None,
) -> HTMLResponse:
    """form: "login", "logout" or "". next: where to go after logging in. link: where to, and its words. All of it is
    escaped."""
    return HTMLResponse(
        _PAGE.render(
            style=Markup(_STYLE),
            longest=LONGEST,
            title=title,
            text=text,
            form=form,
            next=next,
            problem=problem,
            link=link,
        ),
        status,
        {"Content-Security-Policy": _POLICY},
    )
