"""What a process prints, with its secrets left out: the last net under whatever a library says, natively or in a
traceback. What counts as a secret is audit's."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from katherine import audit

# A library may print without ever ending a line; nothing longer is waited for.
_LONGEST = 2**20
# For what is still on its way when the process ends; a child of its own may hold the other end open for ever.
_PATIENCE = 5.0


@contextmanager
def without_secrets() -> Iterator[None]:
    """Inside, what this process and its children write to descriptors 1 and 2 goes through a thread that leaves secrets
    out, line by line."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading, out), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        thread.join(_PATIENCE)


def _pass_on(reading: int, out: int) -> None:
    waiting = b""
    while piece := os.read(reading, 65_536):
        waiting += piece
        whole, end, rest = waiting.rpartition(b"\n")
        if not end and len(waiting) < _LONGEST:
            continue
        _write(out, whole + end if end else waiting)
        waiting = rest if end else b""
    _write(out, waiting)


def _write(out: int, text: bytes) -> None:
    if text:
        shown = str(audit.without_secrets(text.decode(errors="backslashreplace")))
        os.write(out, shown.encode(errors="backslashreplace"))
