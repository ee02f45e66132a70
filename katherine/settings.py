"""Where things live, and which secrets exist. KATHERINE_HOME is the one variable that redirects all state."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

# Everything shaped like a secret is kept from child processes, not only the names known today: a pod's
# environment carries credentials of its host that this program has never heard of.
_SECRET_SHAPED = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|SESSION_KEY", re.I
)
_NOT_SECRET = frozenset({"TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN"})
SECRETS = ("HF_TOKEN", "KATHERINE_OPERATOR_PASSWORD", "KATHERINE_REVIEWER_PASSWORD", "RUNPOD_API_KEY")


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
    return os.environ.get(name, "").strip() or None


def child_environment(*keep: str, **extra: str) -> dict[str, str]:
    """This process's environment without anything secret-shaped, except the names in `keep`; `extra` on top."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in keep or name in _NOT_SECRET or not _SECRET_SHAPED.search(name)
    }
    return kept | extra
