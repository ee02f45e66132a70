"""The two passwords, and the role that follows from each. Owns where they come from (the environment, else made once
and kept hashed) and the comparison; how often one may try is the throttle's."""

import hashlib
import hmac
import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from katherine.errors import SetupError
from katherine.settings import Home, secret

# RFC 7914's algorithm with the 16 MiB setting of OWASP's Password Storage Cheat Sheet: 0.2 s a try, and the web
# process stays small.
_SCRYPT = {"n": 2**14, "r": 8, "p": 5}
# NIST SP 800-63B's least length for a password that a person chose.
_LEAST = 8
# Longer input is refused unhashed.
LONGEST = 256
# Lower-case letters and digits that are not taken for one another: 31 of them, and 20 make 99 bits.
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"


class Role(StrEnum):
    operator = "operator"
    reviewer = "reviewer"


VARIABLES = {Role.operator: "KATHERINE_OPERATOR_PASSWORD", Role.reviewer: "KATHERINE_REVIEWER_PASSWORD"}


@dataclass(frozen=True, slots=True)
class Hashed:
    """A password as it is kept. What scrypt was asked is kept too, so that a later change of it voids nothing."""

    salt: bytes
    hash: bytes
    n: int
    r: int
    p: int

    @classmethod
    def of(cls, password: str) -> "Hashed":
        salt = secrets.token_bytes(16)
        return cls(salt, _scrypt(password, salt, **_SCRYPT), **_SCRYPT)

    def matches(self, password: str) -> bool:
        return hmac.compare_digest(_scrypt(password, self.salt, self.n, self.r, self.p), self.hash)


@dataclass(frozen=True, slots=True)
class Given:
    """A password of the environment: its text is in this process as it is, so hashing would protect nothing."""

    text: str

    def matches(self, password: str) -> bool:
        return hmac.compare_digest(self.text.encode(), password.encode(errors="surrogatepass"))


class Passwords:
    """One a role. `made` holds the passwords that were made just now, to be shown once and kept nowhere."""

    def __init__(self, each: dict[Role, Hashed | Given], made: dict[Role, str], generations: dict[Role, str]):
        self._each = each
        self.made = made
        self.generations = generations

    @classmethod
    def of(cls, home: Home, *, anew: bool = False) -> "Passwords":
        """Those of the environment; for a role without one, that of KATHERINE_HOME/passwords.json, made where it is
        missing or `anew`. Raises SetupError for passwords that are too short or alike, or a damaged file."""
        given = {role: text for role, name in VARIABLES.items() if (text := secret(name))}
        for role, text in given.items():
            if not _LEAST <= len(text) <= LONGEST:
                raise SetupError(
                    f"{VARIABLES[role]} has {len(text)} characters. Set one of {_LEAST} to {LONGEST}, or unset it: one "
                    "is then made."
                )
        if len(set(given.values())) < len(given):
            raise SetupError(f"{' and '.join(VARIABLES.values())} are the same. Who logs in is told apart by them.")
        file = home.root / "passwords.json"
        kept = {} if anew else _read(file)
        made = {role: _made() for role in Role if role not in given and role not in kept}
        if made:
            # Side by side: each is 0.2 s of a core.
            with ThreadPoolExecutor() as pool:
                kept |= dict(zip(made, pool.map(Hashed.of, made.values()), strict=True))
            _write(file, kept)
        each = {role: Given(given[role]) if role in given else kept[role] for role in Role}
        # What a cookie is signed with besides the key, so that it is void with its password.
        generations = {role: given.get(role) or kept[role].hash.hex() for role in Role}
        return cls(each, made, generations)

    def role(self, password: str) -> Role | None:
        """Whose password it is; None where it is nobody's. Takes 0.2 s of a core a kept password."""
        password = password.strip()  # what is pasted on a phone often ends with a space
        matching = [role for role, one in self._each.items() if one.matches(password)]
        return matching[0] if matching else None


def _made() -> str:
    letters = "".join(secrets.choice(_LETTERS) for _ in range(20))
    return "-".join(letters[at : at + 5] for at in range(0, 20, 5))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # OpenSSL's own limit is 32 MiB; the setting takes 128 * n * r bytes.
    return hashlib.scrypt(password.encode(errors="surrogatepass"), salt=salt, n=n, r=r, p=p, maxmem=2**26, dklen=32)


def _read(file: Path) -> dict[Role, Hashed]:
    try:
        kept: dict[str, Any] = json.loads(file.read_bytes())
        return {
            Role(role): Hashed(
                bytes.fromhex(row["salt"]), bytes.fromhex(row["hash"]), int(row["n"]), int(row["r"]), int(row["p"])
            )
            for role, row in kept.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SetupError(
            f"{file} cannot be read ({error}). `python app.py serve --new-passwords` makes new ones."
        ) from None


def _write(file: Path, hashed: dict[Role, Hashed]) -> None:
    rows = {
        role: {"salt": one.salt.hex(), "hash": one.hash.hex(), "n": one.n, "r": one.r, "p": one.p}
        for role, one in hashed.items()
    }
    write_private(file, json.dumps(rows, indent=2))


def write_private(file: Path, text: str) -> None:
    """Replace a file by one that its owner alone may read; a reader sees the old or the new."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(file)
    except OSError as error:
        raise SetupError(
            f"{file} cannot be written ({error.strerror}). Give KATHERINE_HOME a folder that can."
        ) from None
