"""Who is logged in: signed cookies that expire. A log-out or a changed password ends them, a restart does not."""

import hashlib
import json
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from itsdangerous import BadData, URLSafeTimedSerializer

from katherine.errors import SetupError
from katherine.settings import Home
from ui.passwords import Passwords, Role, write_private

# A working day. It does not slide: an open page asks for news by itself and would keep a session alive for ever.
LIFETIME = 12 * 3600
# How long a browser that has logged in is told apart from strangers: see ui/throttle.py.
KNOWN_FOR = 90 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Session:
    """id: of this log-in. begun: Unix time, seconds."""

    id: str
    role: Role
    begun: int


class Sessions:
    """Cookie texts in, sessions out. Cookies are signed with a key of KATHERINE_HOME/session.key and with the role's
    password, so that a new password voids them."""

    def __init__(self, home: Home, passwords: Passwords):
        key = _key(home.root / "session.key")
        self._signers = {
            role: {
                purpose: URLSafeTimedSerializer(
                    [f"{key}.{passwords.generations[role]}"],
                    salt=f"katherine.{purpose}.{role}",
                    signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
                )
                for purpose in ("session", "browser")
            }
            for role in Role
        }
        self._file = home.root / "logged-out.json"
        self._ended = _ended(self._file)
        self._writing = threading.Lock()

    def begin(self, role: Role) -> str:
        """The cookie of a new session."""
        return str(self._signers[role]["session"].dumps(secrets.token_urlsafe(16)))

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie, unless it is forged, too old or was ended."""
        for role, signers in self._signers.items():
            try:
                name, begun = signers["session"].loads(cookie, max_age=LIFETIME, return_timestamp=True)
            except BadData:
                continue
            return None if name in self._ended else Session(name, role, int(begun.timestamp()))
        return None

    def end(self, session: Session) -> None:
        """Log out: the cookie is worth nothing from now on, wherever a copy of it is."""
        now = time.time()
        with self._writing:
            # Those that have expired need no mention: so the list is as long as the log-outs of half a day.
            ended = {name: until for name, until in self._ended.items() if until > now}
            self._ended = ended | {session.id: session.begun + LIFETIME}
            write_private(self._file, json.dumps(self._ended))

    def known_browser(self, role: Role) -> str:
        """The cookie by which a browser that has logged in is known again. It opens nothing."""
        return str(self._signers[role]["browser"].dumps(secrets.token_urlsafe(16)))

    def browser(self, cookie: str) -> str | None:
        """The browser's own name, where it has logged in before."""
        for signers in self._signers.values():
            try:
                return str(signers["browser"].loads(cookie, max_age=KNOWN_FOR))
            except BadData:
                continue
        return None


def _key(file: Path) -> str:
    try:
        key = file.read_text().strip()
    except FileNotFoundError:
        key = secrets.token_hex(32)
        write_private(file, key)
    except (OSError, ValueError) as error:
        raise SetupError(f"{file} cannot be read ({error}). Remove it: everybody then logs in anew.") from None
    if len(key) < 64:
        raise SetupError(f"{file} is too short for a key. Remove it: everybody then logs in anew.")
    return key


def _ended(file: Path) -> dict[str, float]:
    try:
        return {str(name): float(until) for name, until in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SetupError(
            f"{file} cannot be read ({error}). Remove it together with session.key: everybody then logs in anew."
        ) from None
