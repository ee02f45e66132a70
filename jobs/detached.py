"""A process of ours that outlives whoever started it, and holds a place (slot) for exactly as long as it lives. Which
place, and what the process does, is for others to say."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

from katherine.settings import PROJECT, Home, child_environment


def start(
    home: Home, place: socket.socket, module: str, arguments: list[str], log: Path, *secrets: str, **environment: str
) -> None:
    """Starts `python -m module arguments`, in a session of its own; what it prints is added to `log`. Of secrets it
    sees those that are named, and of the rest what every child does, with `environment` added.

    The place is taken by the caller and handed over as the descriptor `--place`: there is no moment at which a live
    process could be taken for a dead one, or the other way round. The caller closes its own copy."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--place", str(place.fileno())],
            pass_fds=(place.fileno(),),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=PROJECT,
            env=child_environment(*secrets, KATHERINE_HOME=str(home.root.absolute()), **environment),
        )
    # Waited for while we live, so that it does not linger as a zombie; when we die, init does it.
    threading.Thread(target=process.wait, daemon=True).start()
