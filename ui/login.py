"""Logging in and out: plain HTML forms, which work without a script. Whether a request may come in is the door's."""

import asyncio
import logging
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from ui.door import COOKIE, SECURE_COOKIE, Visit, home_of, wanted
from ui.passwords import LONGEST, Passwords, Role
from ui.plain import page
from ui.sessions import KNOWN_FOR, LIFETIME, Sessions
from ui.throttle import Throttle

_log = logging.getLogger("katherine.ui")
# The form's two fields, percent-encoded at worst.
_FORM = 4096
_KNOWN = "katherine-browser"


def routes(passwords: Passwords, sessions: Sessions) -> APIRouter:
    router = APIRouter()
    throttle = Throttle()
    # One at a time: each takes 16 MB and a core.
    hashing = asyncio.Semaphore(1)

    @router.get("/login")
    def ask(request: Request) -> Response:
        return page("Log in", form="login", next=request.query_params.get("next", "")[:500])

    @router.post("/login")
    async def enter(request: Request) -> Response:
        visit: Visit = request.scope["katherine.visit"]
        form = await _form(request)
        target, password = form.get("next", "")[:500], form.get("password", "")

        def again(status: int, problem: str, **headers: str) -> Response:
            response = page("Log in", status=status, form="login", next=target, problem=problem)
            response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
            return response

        browser = sessions.browser(visit.cookies.get(_KNOWN, ""))
        client = f"browser {browser}" if browser else f"address {visit.client}"
        known = browser is not None or visit.direct
        if wait := throttle.take(client, known=known):
            _log.warning("refused %s: POST '/login': too many tries", visit.who)
            return again(429, f"Too many tries. Wait {_spoken(wait)}, then try again.", retry_after=str(wait))
        role = None
        if len(password) <= LONGEST:
            async with hashing:
                role = await asyncio.to_thread(passwords.role, password)
        if role is None:
            _log.warning("refused %s: POST '/login': wrong password", visit.who)
            return again(401, "That password is not right.")
        throttle.forget(client, known=known)
        _log.info("logged in: %s at %s", role, visit.client)
        response = RedirectResponse(wanted(target, role), 303)
        secure = visit.secure
        # Lax, so that a link from elsewhere to a page finds its reader logged in; requests that change anything are
        # checked by their Origin.
        response.set_cookie(
            SECURE_COOKIE if secure else COOKIE,
            sessions.begin(role),
            max_age=LIFETIME,
            path="/",
            secure=secure,
            httponly=True,
            samesite="lax",
        )
        response.set_cookie(
            _KNOWN,
            sessions.known_browser(role),
            max_age=KNOWN_FOR,
            path="/login",
            secure=secure,
            httponly=True,
            samesite="strict",
        )
        return response

    @router.get("/logout")
    def ask_out(request: Request) -> Response:
        visit: Visit = request.scope["katherine.visit"]
        assert visit.session is not None
        text = "What is running goes on." if visit.session.role is Role.operator else ""
        return page("Log out", text, form="logout", link=(home_of(visit.session.role), "Stay"))

    @router.post("/logout")
    async def leave(request: Request) -> Response:
        visit: Visit = request.scope["katherine.visit"]
        assert visit.session is not None
        await asyncio.to_thread(sessions.end, visit.session)
        _log.info("logged out: %s", visit.who)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        response.delete_cookie(SECURE_COOKIE, secure=True)
        return response

    return router


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _FORM:
            return {}
    fields = parse_qs(body.decode("latin-1"), keep_blank_values=True, max_num_fields=8)
    return {name: values[-1] for name, values in fields.items()}


def _spoken(seconds: int) -> str:
    return f"{seconds} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
