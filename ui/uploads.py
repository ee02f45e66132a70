"""The folder in which Gradio keeps uploads, and an empty one to work in, for Gradio may serve what lies in the working
directory. Both are this process's alone, and gone with it. Uploads lie beside the inbox, so that keeping one is giving
it another name: copied to a network volume, 100 MB would hold up the page that dropped it."""

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from katherine.settings import home

_PREFIX = "katherine-uploads-"


def _make() -> Path:
    """A new folder, which only this user may enter; it is removed when the process ends. Those whose process was
    killed are removed now. A process holds a lock on its folder: that tells the living from the dead, and needs no
    process ids, which come again."""
    place = Path(tempfile.gettempdir()).resolve()
    for stale in place.glob(f"{_PREFIX}*"):
        _remove_if_dead(stale)
    # Under its real name only once it is locked: until then another process would take it for a dead one's.
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))
    fcntl.flock(os.open(draft, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    (draft / "nothing").mkdir(mode=0o700)
    folder = draft.rename(place / draft.name.removeprefix("."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_if_dead(folder: Path) -> None:
    with suppress(OSError):
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _beside_the_inbox(own: Path) -> Path:
    """A hidden folder in the inbox, named after this process's own; those whose process is gone are removed. In our own
    where the home cannot be written to: the panel then says so, and starts."""
    inbox = home().inbox
    folder = inbox / f".{own.name}"
    try:
        for stale in inbox.glob(f".{_PREFIX}*"):
            if not (own.parent / stale.name.removeprefix(".")).is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
    except OSError:
        folder = own / "files"
        folder.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Made once, when this is first imported: before Gradio, which wants to know of it then.
_OWN = _make()
FOLDER = _beside_the_inbox(_OWN)
NOTHING = _OWN / "nothing"
