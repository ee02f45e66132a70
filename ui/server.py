"""The web process: a FastAPI parent with the two Gradio pages mounted under it, and its life from the first line on
the terminal to the last. Who may come in is the door's."""

import ctypes
import gc
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager, suppress
from logging.handlers import RotatingFileHandler

from ui import uploads

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(uploads.FOLDER)

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from jobs import queue, slot
from katherine import runs
from katherine.errors import Busy, KatherineError, SetupError
from katherine.settings import Home
from ui import files, login, looks, operator, review
from ui.door import Address, Door, home_of
from ui.panel import Panel
from ui.passwords import Passwords
from ui.sessions import Sessions

PORT = 7860  # the one that the pod template of RunPod is to expose
# How soon a run whose supervisor died is seen, and the queue goes on.
_RECONCILE_EVERY = 3.0
_log = logging.getLogger("katherine.ui")


def create(home: Home, passwords: Passwords, address: Address) -> Door:
    panel = Panel.of(home)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_watching(panel))
    sessions = Sessions(home, passwords)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/")
    def first(request: Request) -> RedirectResponse:
        return RedirectResponse(home_of(request.scope["katherine.visit"].session.role))

    @app.get("/favicon.ico")
    def favicon() -> FileResponse:
        return FileResponse(looks.STATIC / "favicon.svg")

    @app.get("/static/plotly.min.js")
    def plotly_js() -> FileResponse:
        return FileResponse(looks.PLOTLY)

    app.include_router(login.routes(passwords, sessions))
    files.add_routes(app, home)
    app.mount("/static", StaticFiles(directory=looks.STATIC))
    for path, page in (("/operator", operator.build(panel)), ("/review", review.build(panel))):
        gr.mount_gradio_app(
            app,
            page,
            path,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            allowed_paths=[],
            max_file_size="95mb",
            theme=looks.theme(),
            head=looks.head(),
        )
        # Gradio looks a thousand times a second whether there is something to do: 3 % of a core a page, measured. This
        # is its own figure for Windows.
        page._queue.sleep_when_free = 0.05
    return Door(app, sessions, address, str(uploads.FOLDER))


def serve(home: Home, port: int = PORT, *, new_passwords: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, which end it within two seconds. Raises Busy where another panel serves this home,
    and SetupError for a port that cannot be had."""
    _share_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), _place(home, port), _listening(port) as listener, _logging(home):
        address = Address.of(port)
        passwords = Passwords.of(home, anew=new_passwords)
        _show(passwords)
        door = create(home, passwords, address)
        # All of that stays, and need not be gone through again whenever a page is answered.
        gc.freeze()
        gc.enable()
        os.environ["KATHERINE_HOME"] = str(home.root)  # which may have been relative
        os.chdir(uploads.NOTHING)
        with _housekeeping(home):
            _Server(door, port, address).run([listener])


def _share_memory() -> None:
    """glibc gives each thread memory of its own to allocate from, eight times as many as cores: measured, that costs
    the panel's forty threads 35 MB. Two will do."""
    m_arena_max = -8  # from glibc's malloc.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_arena_max, 2)


def _watching(panel: Panel) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        # Ended in the opposite order: whoever asks, then what is asked.
        with panel.watch, closing(panel.renderer), closing(panel.pool), closing(panel.asking):
            yield

    return life


class _Server(uvicorn.Server):
    """Says where it is once it can be reached, and ends the open streams when it goes."""

    def __init__(self, door: Door, port: int, address: Address):
        super().__init__(
            uvicorn.Config(
                door,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # The door itself decides whom it believes what.
                proxy_headers=False,
                # A request's line and headers; browsers send a few kB.
                h11_max_incomplete_event_size=32 * 1024,
                # Longer than a proxy keeps a connection that it means to use again, mostly 60 s: else it now and then
                # sends a request into one that is just being closed.
                timeout_keep_alive=75,
                timeout_graceful_shutdown=1,
            )
        )
        self._door, self._port, self._address = door, port, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        places = self._address.public or [f"http://localhost:{self._port}"]
        print(f"The panel is at {' and '.join(places)}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._door.close()
        await super().shutdown(sockets)


def _show(passwords: Passwords) -> None:
    # At once: should the start fail after this, they are known all the same.
    for role, password in passwords.made.items():
        print(f"The {role}'s password: {password}")
    if passwords.made:
        print("Shown this once. `python app.py serve --new-passwords` makes new ones.", flush=True)


@contextmanager
def _place(home: Home, port: int) -> Iterator[None]:
    """One panel a home: two would each have their own idea of who has logged out, and of the log."""
    held = slot.bind(home, "panel")
    note = home.root / "panel.json"
    if held is None:
        where = ""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(note.read_bytes())
            where = f" on port {found['port']} (process {found['process']}, since {found['since']})"
        raise Busy(f"A panel already serves {home.root}{where}. Use that one, or end it first.")
    with held:
        try:
            home.root.mkdir(parents=True, exist_ok=True)
            runs.write_json(note, {"port": port, "process": os.getpid(), "since": runs.now()})
        except OSError as error:
            raise SetupError(f"{home.root} cannot be written to ({error.strerror}). Set KATHERINE_HOME.") from None
        try:
            yield
        finally:
            note.unlink(missing_ok=True)


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    # Named TCP, since asyncio sets TCP_NODELAY only on connections of sockets that are. Without it an answer's second
    # write, its body, is held back until the browser has acknowledged the first, up to 40 ms later.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        # The port of a panel that was just killed is still waiting for its connections to end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("0.0.0.0", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SetupError(
                f"Port {port} cannot be had ({reason}). Choose another: `python app.py serve --port {PORT + 1}`, or "
                "end what holds it."
            ) from None
        yield listener


@contextmanager
def _logging(home: Home) -> Iterator[None]:
    """Refusals and bugs go to KATHERINE_HOME/panel.log: three files of a megabyte, whatever strangers do."""
    file = home.root / "panel.log"
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    handler = RotatingFileHandler(file, maxBytes=10**6, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("katherine")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        handler.close()


@contextmanager
def _housekeeping(home: Home) -> Iterator[None]:
    """Keep the queue going: after a pod's restart nobody else does."""
    ending = threading.Event()

    def keep() -> None:
        said = ""
        while True:
            try:
                for run in queue.reconcile(home):
                    _log.warning("run %s was interrupted", run.id)
                said = ""
            except Exception as error:
                # The same one every three seconds is one message.
                if (now := f"{type(error).__name__}: {error}") != said:
                    said = now
                    _log.log(
                        logging.WARNING if isinstance(error, KatherineError | OSError) else logging.ERROR,
                        "the queue cannot be looked after: %s",
                        now,
                        exc_info=not isinstance(error, KatherineError | OSError),
                    )
            if ending.wait(_RECONCILE_EVERY):
                return

    keeper = threading.Thread(target=keep, name="housekeeping", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        keeper.join(timeout=1)
