"""The one place where a request is let in or refused, before anything else sees it: by path and role, by origin, by
size. It also sets the security headers. Passwords are ui/passwords.py's, cookies ui/sessions.py's, what is behind the
door is the server's.

Nothing is open unless it is named here: of Gradio's hundred routes, those that its page uses and no others.
"""

import asyncio
import logging
import os
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from katherine.errors import SetupError
from ui.passwords import Role
from ui.plain import page
from ui.sessions import Session, Sessions

_log = logging.getLogger("katherine.ui")

COOKIE = "katherine"
# Behind https: a browser takes a cookie of such a name from this very host alone, over https alone.
SECURE_COOKIE = "__Host-katherine"

# What anybody may have.
_OPEN = re.compile(r"/(login|health|favicon\.ico|static/[\w.-]+)")
# What anybody may have who is logged in.
_INSIDE = re.compile(r"/(logout)?")
_AREAS = {"/operator": frozenset({Role.operator}), "/review": frozenset({Role.operator, Role.reviewer})}
_PAGES = frozenset(f"{area}/" for area in _AREAS)
# Within an area: what a page of Gradio 6.31 reads and writes. Not among it, on purpose: proxy= and file=http... (the
# server would fetch for the asker), deep_link (writes files), token, login, monitoring, runs, dev/reload, openapi.json,
# custom_component, component_server, stream, vibe-*.
_READ = re.compile(
    r"/(config|theme\.css|manifest\.json|favicon\.ico|(assets|static|svelte)/.+"
    r"|gradio_api/(info|app_id/?|startup-events|theme\.css|heartbeat/\w+|queue/data|queue/status))?"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|run/[\w-]+|cancel|reset)/?")
# Only the operator hands in files, and gets back those that Gradio keeps for a page. /files is the server's own.
_OPERATOR_READ = re.compile(r"/(gradio_api/upload_progress|files/.+)")
_OPERATOR_WRITE = re.compile(r"/gradio_api/upload")
_FILE = "/gradio_api/file="

# Larger than any form here; uploads have their own limit (RunPod's proxy takes no more in one request).
_BODY = 8 * 2**20
UPLOAD = 100 * 10**6

# Gradio's page needs its own inline scripts, which get a nonce, and Function(). What got into a page by way of data has
# no nonce: its scripts, those of its frames (srcdoc inherits this policy), its onerror and onclick do not run.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-eval'{nonce}",
        "script-src-attr 'none'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: a browser would then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), display-capture=()",
}
_HOST = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
# A dot, a slash or a backslash that was percent-encoded, or a NUL: no browser writes them so.
_DISGUISED = re.compile(rb"%(2e|2f|5c|00)", re.I)


@dataclass(frozen=True, slots=True)
class Address:
    """What the world calls this server. public: origins that are ours whatever the request says, the one to prefer
    first."""

    public: tuple[str, ...]
    on_pod: bool

    @classmethod
    def of(cls, port: int) -> "Address":
        """From KATHERINE_PUBLIC_URL and RunPod's RUNPOD_POD_ID. Raises SetupError for an address that is none."""
        public = []
        if (text := os.environ.get("KATHERINE_PUBLIC_URL", "").strip()) != "":
            parts = urlsplit(text)
            if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.netloc) or parts.path.strip("/"):
                raise SetupError(f"KATHERINE_PUBLIC_URL is {text!r}. Set it to scheme and host: https://example.org")
            public.append(f"{parts.scheme}://{parts.netloc}".lower())
        if pod := os.environ.get("RUNPOD_POD_ID", "").strip():
            public.append(f"https://{pod}-{port}.proxy.runpod.net".lower())
        return cls(tuple(public), bool(pod))


@dataclass(slots=True)
class Visit:
    """What the door found out about a request. client: whose address it comes from. here: the server itself, as the
    browser calls it (scheme://host)."""

    method: str
    path: str
    headers: Headers
    client: str
    direct: bool
    here: str
    origins: frozenset[str]
    session: Session | None = None
    cookies: dict[str, str] = field(default_factory=dict)

    @property
    def who(self) -> str:
        return f"{self.session.role} at {self.client}" if self.session else self.client

    @property
    def secure(self) -> bool:
        """Whether the browser speaks https. With a form it says so itself, in an Origin that was checked; else the
        proxy does."""
        return self.headers.get("origin", self.here).startswith("https://")

    @property
    def is_page(self) -> bool:
        """Whether a person looks at the answer, rather than a script."""
        accepts_html = "text/html" in self.headers.get("accept", "")
        mode = self.headers.get("sec-fetch-mode", "navigate" if accepts_html else "")
        return self.method in ("GET", "HEAD") and mode == "navigate"


class Refusal(Exception):
    """status: of the answer. why: for the log and, in plain words, for the person."""

    def __init__(self, status: int, why: str):
        self.status, self.why = status, why
        super().__init__(why)


class Door:
    """ASGI, around everything. A plain function of messages: answers pass through as they come, so streams stream."""

    def __init__(self, app: ASGIApp, sessions: Sessions, address: Address, uploads: str):
        self._app = app
        self._sessions = sessions
        self._address = address
        self._uploads = uploads
        self._streams: set[asyncio.Task] = set()
        self._closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here needs one
        else:
            await self._answer(scope, receive, send)

    def close(self) -> None:
        """End the streams that are open: the server is going."""
        self._closing = True
        for task in self._streams:
            task.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        secure = False
        asked: str | None = None
        answer: Response | None = None
        try:
            visit = self._visit(scope)
            secure, asked = visit.here.startswith("https://"), visit.path
            answer = self._judge(visit)
        except Refusal as refusal:
            if asked is None:
                _log.warning("refused %s: %s", (scope.get("client") or ("?",))[0], refusal.why)
            answer = PlainTextResponse(refusal.why, refusal.status)
        send = _headed(send, asked, secure)
        if answer is not None:
            await answer(scope, receive, send)
            return
        if asked in _PAGES:
            send = _nonced(send)
        limit = UPLOAD if asked is not None and asked.endswith("/upload") else _BODY
        await self._pass(self._rewritten(scope, visit), _Limited(receive, limit), send)

    async def _pass(self, scope: Scope, receive: "_Limited", send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        begun = ended = False

        async def noted(message: Message) -> None:
            nonlocal begun, ended
            if message["type"] == "http.response.start":
                if receive.exceeded:
                    return
                begun = True
                if Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
                    self._streams.add(task)
            elif message["type"] == "http.response.body":
                if not begun:
                    return
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            task.uncancel()
        except Exception:
            # The application has said what it is; what it could not read to the end is ours to explain.
            if not receive.exceeded:
                raise
        finally:
            self._streams.discard(task)
        if receive.exceeded and not begun:
            await PlainTextResponse(_too_large(receive.limit), 413)(scope, receive, send)
        elif begun and not ended and self._closing:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _visit(self, scope: Scope) -> Visit:
        headers = Headers(scope=scope)
        host = _first(headers.get("x-forwarded-host")) or headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not _HOST.fullmatch(host):
            raise Refusal(400, "The request names no host, or one that cannot be.")
        hosts = {host.lower(), headers["host"].lower()}
        forwarded = _first(headers.get("x-forwarded-proto"))
        scheme = forwarded if forwarded in ("http", "https") else scope["scheme"]
        # A proxy that says nothing of https is still recognised by its host.
        if any(f"https://{one}" in self._address.public for one in hosts):
            scheme = "https"
        # A foreign page cannot pass for ours by these headers: a browser sets Host and Origin itself, and lets a page
        # set X-Forwarded-* on a request to another origin only after asking with OPTIONS, which is always refused.
        # What no browser sends can be made to say anything, but brings no session's cookie.
        origins = frozenset(f"{scheme}://{one}" for one in hosts).union(self._address.public)
        path, raw = scope["path"], scope.get("raw_path") or scope["path"].encode()
        if not _is_plain(path) or _DISGUISED.search(raw.partition(_FILE.encode())[0]):
            raise Refusal(400, "The address is not written plainly.")
        client, direct = self._client(scope, headers)
        cookies = cookie_parser(headers.get("cookie", ""))
        visit = Visit(scope["method"], path, headers, client, direct, f"{scheme}://{host}".lower(), origins)
        visit.cookies = cookies
        for name in (SECURE_COOKIE, COOKIE):
            if visit.session is None and name in cookies:
                visit.session = self._sessions.read(cookies[name])
                # A browser sends this one over https alone: a proxy that tells neither host nor scheme stands between.
                if visit.session and name == SECURE_COOKIE and scheme == "http" and self._address.public:
                    visit.here = self._address.public[0]
        scope["katherine.visit"] = visit
        return visit

    def _client(self, scope: Scope, headers: Headers) -> tuple[str, bool]:
        """The address a request comes from, and whether it comes straight from this machine. On a pod all come through
        RunPod's proxy, which adds the address it saw at the end of X-Forwarded-For; elsewhere anybody can write it."""
        peer = (scope.get("client") or ("unknown", 0))[0]
        hops = ",".join(headers.getlist("x-forwarded-for"))
        if hops and self._address.on_pod:
            return hops.rpartition(",")[2].strip()[:45] or peer, False
        return peer, not hops and peer in ("127.0.0.1", "::1")

    def _judge(self, visit: Visit) -> Response | None:
        """None to let it in, else the answer. Raises Refusal for what has no better one."""
        try:
            self._check_origin(visit)
            return self._check_role(visit)
        except Refusal as refusal:
            # The path alone: a query may hold what is nobody's business.
            _log.warning("refused %s: %s %.200r: %s", visit.who, visit.method, visit.path, refusal.why)
            if refusal.status == 401 and visit.is_page:
                return RedirectResponse(f"/login?next={quote(visit.path)}", 303)
            if visit.is_page:
                return _refused(visit, refusal)
            raise

    def _check_origin(self, visit: Visit) -> None:
        if visit.method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, f"{visit.method} is not used here.")
        origin = visit.headers.get("origin")
        if origin is not None and origin.lower() not in visit.origins:
            raise Refusal(
                403,
                f"The request comes from another site, {origin[:100]!r}. If that is this panel's own address, start it "
                "with KATHERINE_PUBLIC_URL set to it.",
            )
        # Browsers send it with every POST.
        if origin is None and visit.method == "POST":
            raise Refusal(403, "The request does not say which site it comes from (Origin).")
        # Every tenant of RunPod's proxy is same-site with us: the browser sends our cookies along with their
        # requests. A link to a page may be followed; nothing else may come from elsewhere.
        if visit.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            followed = visit.method == "GET" and visit.headers.get("sec-fetch-mode") == "navigate"
            if not (followed and visit.headers.get("sec-fetch-dest") == "document"):
                raise Refusal(403, "The request comes from another site.")
        length = visit.headers.get("content-length", "0")
        limit = UPLOAD if visit.path.endswith("/upload") else _BODY
        if visit.method == "POST" and (not length.isascii() or not length.isdigit() or int(length) > limit):
            raise Refusal(413, _too_large(limit))

    def _check_role(self, visit: Visit) -> Response | None:
        path, session = visit.path, visit.session
        reads = visit.method in ("GET", "HEAD")
        if _OPEN.fullmatch(path):
            if reads or path == "/login":
                return None
            raise Refusal(405, "This page is only for reading.")
        if session is None:
            raise Refusal(401, "Log in first.")
        if _INSIDE.fullmatch(path):
            if reads or path == "/logout":
                return None
            raise Refusal(405, "This page is only for reading.")
        area = next((area for area in _AREAS if path == area or path.startswith(area + "/")), None)
        if area is None:
            raise Refusal(404, "There is no such page.")
        if session.role not in _AREAS[area]:
            raise Refusal(403, f"This page is for the {'/'.join(_AREAS[area])} only.")
        if path == area:
            # Relative, for behind a proxy nobody but the browser knows the whole address.
            return RedirectResponse(f"{area}/", 307)
        if not self._is_used(path.removeprefix(area), reads, area == "/operator"):
            raise Refusal(404, "There is no such page.")
        return None

    def _is_used(self, rest: str, reads: bool, whole: bool) -> bool:
        if rest.startswith(_FILE):
            return whole and reads and rest.removeprefix(_FILE).startswith(f"{self._uploads}/")
        patterns = [_READ, _OPERATOR_READ] if reads else [_WRITE, _OPERATOR_WRITE]
        return any(pattern.fullmatch(rest) for pattern in (patterns if whole else patterns[:1]))

    def _rewritten(self, scope: Scope, visit: Visit) -> Scope:
        """As the browser sees it: Gradio builds its addresses from the scheme and the host."""
        scheme, _, host = visit.here.partition("://")
        dropped: tuple[bytes, ...] = (b"host", b"x-forwarded-host", b"x-forwarded-proto", b"x-gradio-server")
        if visit.path in _PAGES:
            dropped += (b"accept-encoding",)  # nonces are written into what is not compressed
        headers = [pair for pair in scope["headers"] if pair[0] not in dropped]
        return {**scope, "scheme": scheme, "headers": [(b"host", host.encode()), *headers]}


class _Limited:
    """receive(), until more than `limit` bytes have come: then the sender is as good as gone."""

    def __init__(self, receive: Receive, limit: int):
        self._receive, self.limit = receive, limit
        self._come = 0
        self.exceeded = False

    async def __call__(self) -> Message:
        if self.exceeded:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._come += len(message.get("body", b""))
        self.exceeded = self._come > self.limit
        return {"type": "http.disconnect"} if self.exceeded else message


def _headed(send: Send, path: str | None, secure: bool) -> Send:
    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("Content-Security-Policy", _POLICY.format(nonce=""))
            if secure:
                headers["Strict-Transport-Security"] = "max-age=31536000"
            # Downloads say themselves how they may be kept.
            if not (path or "").startswith("/operator/files/"):
                headers["Cache-Control"] = _caching(path) if message["status"] == 200 else "no-store"
        await send(message)

    return headed


def _nonced(send: Send) -> Send:
    """A page of Gradio's, whose own scripts the browser is to know by a nonce. (Gradio writes its settings into one
    of them with every < escaped: no text in it looks like a tag.) Pages are small, so they may be held back."""
    nonce = secrets.token_urlsafe(16)
    start: Message = {}
    body = b""

    async def nonced(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                page = body.replace(b"<script", f'<script nonce="{nonce}"'.encode())
                headers = MutableHeaders(scope=start)
                if "content-length" in headers and int(headers["content-length"]) == len(body):
                    headers["content-length"] = str(len(page))
                headers["Content-Security-Policy"] = _POLICY.format(nonce=f" 'nonce-{nonce}'")
                await send(start)
                await send({"type": "http.response.body", "body": page})

    return nonced


def _caching(path: str | None) -> str:
    """Only what has its content's mark in its address may be kept: our own files, and Gradio's assets, which are
    private as they are behind the door. A year is what HTTP calls for ever."""
    if path is not None and path.startswith("/static/"):
        return "public, max-age=31536000, immutable"
    if path is not None and re.match(r"/(operator|review)/assets/", path):
        return "private, max-age=31536000, immutable"
    return "no-store"


def home_of(role: Role) -> str:
    """Where a role begins."""
    return "/operator/" if role is Role.operator else "/review/"


def wanted(target: str, role: Role) -> str:
    """Where to go after logging in: the page that was asked for if it is one of this role's, else the role's first."""
    for area, roles in _AREAS.items():
        if role in roles and (target == area or target.startswith(f"{area}/")) and _is_plain(target):
            return quote(target)
    return home_of(role)


def _refused(visit: Visit, refusal: Refusal) -> Response:
    """A refusal for a person to read."""
    title = {403: "Not for you", 404: "Not found"}.get(refusal.status, "That did not work")
    if visit.session is None:
        return page(title, refusal.why, status=refusal.status, link=("/login", "Log in"))
    return page(
        title,
        f"{refusal.why} You are logged in as {visit.session.role}.",
        status=refusal.status,
        form="logout" if refusal.status == 403 else "",
        link=(home_of(visit.session.role), "Back to your page"),
    )


def _is_plain(path: str) -> bool:
    """Whether a decoded path has one meaning: no empty, `.` or `..` parts, no backslash, no control characters."""
    if not path.startswith("/") or "\\" in path or not path.isprintable():
        return False
    parts = path[1:].split("/")
    return all(part not in ("", ".", "..") for part in parts[:-1]) and parts[-1] not in (".", "..")


def _first(value: str | None) -> str:
    """Of a list that every proxy added to, what the first of them said: it spoke with the browser."""
    return (value or "").partition(",")[0].strip()


def _too_large(limit: int) -> str:
    return f"That is too large: at most {limit // 10**6} MB at a time."
