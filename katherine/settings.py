"""Where things live, and which secrets exist. KATHERINE_HOME is the one variable that redirects all state."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from katherine import cores

PROJECT = Path(__file__).resolve().parent.parent

# Everything shaped like a secret is kept from child processes, not only the names known today: a pod's
# environment carries credentials of its host that this program has never heard of.
_SECRET_SHAPED = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|SESSION_KEY", re.I
)
_NOT_SECRET = frozenset({"TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN"})
# HF_TOKEN may write, and is the push's alone. What only fetches (a gated base, a private dataset) is given
# HF_READ_TOKEN: trainings run a great deal of other people's code.
SECRETS = ("HF_TOKEN", "HF_READ_TOKEN", "KATHERINE_OPERATOR_PASSWORD", "KATHERINE_REVIEWER_PASSWORD", "RUNPOD_API_KEY")
# Where `hide_secrets` finds them again; the number of a descriptor, which is closed once it is read.
_HIDDEN_IN = "KATHERINE_HIDDEN_IN"
_hidden: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Home:
    """The folder that holds everything that must last (a network volume on a pod)."""

    root: Path

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def inbox(self) -> Path:
        """Files that came in and are not a dataset yet: from the page, from the hub, or put here by hand."""
        return self.root / "inbox"

    @property
    def errands(self) -> Path:
        return self.root / "errands"

    @property
    def cache(self) -> Path:
        """Bases, wheels, converters and compiled kernels: all of it can be made again."""
        return self.root / "cache"


def home() -> Home:
    """The home folder: $KATHERINE_HOME, else `home/` in the project. Made when something is first written."""
    return Home(Path(os.environ.get("KATHERINE_HOME") or PROJECT / "home").expanduser().absolute())


def secret(name: str) -> str | None:
    """A secret from the environment, or None where it is absent or blank."""
    return _hidden.get(name, os.environ.get(name, "")).strip() or None


def hide_secrets() -> None:
    """Take everything secret-shaped out of this process's environment for good, and keep it in memory alone.

    /proc/<pid>/environ shows what a process was started with, whatever it removes later, to every other process of the
    same user, trainings and engines among them. So this starts the process anew, in its place and with its number, and
    hands the secrets over in memory. Call it before anything else is done."""
    if (handle := os.environ.pop(_HIDDEN_IN, None)) is not None:
        with open(int(handle), "rb") as held:
            _hidden.update(json.loads(held.read()))
        return
    found = {name: value for name, value in os.environ.items() if _is_secret(name)}
    if not found:
        return
    memory = os.memfd_create("secrets", 0)
    os.write(memory, json.dumps(found).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    kept = {name: value for name, value in os.environ.items() if name not in found}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept | {_HIDDEN_IN: str(memory)})


def child_environment(*keep: str, **extra: str) -> dict[str, str]:
    """This process's environment without anything secret-shaped, except the names in `keep`; `extra` on top. How
    threads wait on few cores is added where it is not set."""
    known = cores.waiting() | dict(os.environ) | _hidden
    return {name: value for name, value in known.items() if name in keep or not _is_secret(name)} | extra


def _is_secret(name: str) -> bool:
    return name not in _NOT_SECRET and bool(_SECRET_SHAPED.search(name))
