"""Names that one process or thread of this machine may hold at a time. Owns the holding alone: what a name stands for
(the GPU, the queue, the audit log) is its user's."""

import errno
import hashlib
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from katherine.errors import Busy
from katherine.settings import Home


def _address(home: Home, name: str) -> bytes:
    # Abstract Unix sockets (a leading zero byte) live in the kernel, not in a file system: a network volume's locks
    # cannot be trusted, and here a second bind fails and the death of the last holder frees the name, always.
    # The names are those of one network namespace: a home is used from one machine or container at a time.
    place = f"{os.path.realpath(home.root)}\0{name}".encode(errors="surrogateescape")
    return b"\0katherine-" + hashlib.sha256(place).hexdigest().encode()


def bind(home: Home, name: str) -> socket.socket | None:
    """The socket that stands for holding `name` in this home, or None while somebody else has it. It is held until
    every copy of its descriptor is closed, those inherited by children included."""
    # Datagram, since such a socket can be asked whether it is bound (see is_held) without listening.
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(_address(home, name))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return held


def is_held(home: Home, name: str) -> bool:
    """Whether somebody holds `name`; asking never gets in a taker's way."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(_address(home, name))
        except OSError:
            return False
    return True


@contextmanager
def turn(home: Home, name: str, what: str, patience: float = 30.0) -> Iterator[None]:
    """Holds `name` for a moment, waiting for whoever has it. It does not nest. Raises Busy, in which `what` names the
    thing, after `patience` seconds: what is done in a turn takes milliseconds, so by then its holder is frozen."""
    deadline = time.monotonic() + patience
    while (held := bind(home, name)) is None:
        if time.monotonic() > deadline:
            raise Busy(f"Another process has been changing {what} in {home.root} for {patience:.0f} s. Try again.")
        time.sleep(random.uniform(0.002, 0.01))  # uneven, so that many waiters do not knock in step
    with held:
        yield
