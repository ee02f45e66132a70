"""Things that one process at a time may hold: the GPU, the queue's mutex, the supervisor's place. Owns the holding
and the naming of the holder; what is done meanwhile is the holder's affair."""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from katherine import runs
from katherine.errors import Busy
from katherine.gpu import PROCESSOR
from katherine.settings import Home
from katherine.turns import bind, is_held, turn


def mutex(home: Home, patience: float = 30.0) -> AbstractContextManager[None]:
    """Held for the moment it takes to change the queue. It does not nest. Raises Busy after `patience` seconds: a
    change takes milliseconds, so by then its holder has been frozen."""
    return turn(home, "queue", "the queue", patience)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a slot. what: "sft", "chat" and the like; run: the run's id, or None. since: ISO 8601, UTC."""

    what: str
    run: str | None
    pid: int
    since: str


class Slot:
    """One GPU of this machine, held. name: as gpu.usable gives it. Children that inherit its descriptor hold it too."""

    def __init__(self, name: str, held: socket.socket, note: Path):
        self.name = name
        self._held = held
        self._note = note

    def fileno(self) -> int:
        return self._held.fileno()

    def release(self) -> None:
        """Let go. A child that inherited the descriptor holds on until it ends."""
        if self._held.fileno() != -1:
            # In this order, so that the next holder's note is never the one removed. A volume that fails must not
            # keep the GPU.
            with suppress(OSError):
                self._note.unlink(missing_ok=True)
            self._held.close()

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def take(home: Home, what: str, *, run: str | None = None, name: str = PROCESSOR) -> Slot:
    """Take the slot of the GPU `name`. Raises Busy, naming the holder; never waits."""
    held = bind(home, _place(name))
    if held is None:
        raise Busy(f"{held_by(home, [name])}. {_REMEDY}")
    note = home.root / f"slot-{name}.json"
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        runs.write_json(note, asdict(Holder(what, run, os.getpid(), runs.now())))
    except OSError:
        # The note serves messages alone: a full disk is no reason to refuse the GPU.
        with suppress(OSError):
            note.unlink(missing_ok=True)
    return Slot(name, held, note)


def take_one(home: Home, what: str, names: Sequence[str], *, run: str | None = None) -> Slot:
    """Take the first of these GPUs that is free. Raises Busy, naming all holders; never waits."""
    if len(names) == 1:
        return take(home, what, run=run, name=names[0])
    for name in names:
        with suppress(Busy):
            return take(home, what, run=run, name=name)
    raise Busy(f"{held_by(home, names)}. {_REMEDY}")


def held_by(home: Home, names: Sequence[str]) -> str:
    """Who holds these GPUs, all of which are held, as a clause."""
    if len(names) == 1:
        return f"{_title(names[0])} is held by {_described(home, names[0])}"
    return f"Every GPU is held: {'; '.join(f'GPU {name} by {_described(home, name)}' for name in names)}"


def free(home: Home, names: Sequence[str]) -> list[str]:
    """Those of the GPUs that nobody holds."""
    return [name for name in names if not is_held(home, _place(name))]


def holder(home: Home, name: str = PROCESSOR) -> Holder | None:
    """Who holds the GPU's slot, or None while it is free or its holder has not yet said who it is."""
    if not is_held(home, _place(name)):
        return None
    try:
        return Holder(**json.loads((home.root / f"slot-{name}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


_REMEDY = "Wait, stop it, or queue behind it."


def _place(name: str) -> str:
    return f"gpu-{name}"


def _title(name: str) -> str:
    return "The machine" if name == PROCESSOR else f"GPU {name}"


def chatting(home: Home, names: Sequence[str]) -> bool:
    """Whether somebody chats on one of the GPUs."""
    holders = [holder(home, name) for name in names]
    return any(each is not None and each.what == "chat" for each in holders)


def _described(home: Home, name: str) -> str:
    """The same for as long as it holds: a run's reason to wait is written down whenever it changes."""
    who = holder(home, name)
    if who is None:
        return "another process that has not said who it is"
    since = datetime.fromisoformat(who.since).strftime("%H:%M UTC")
    if who.run is None:
        return f"{who.what} (process {who.pid}) since {since}"
    return f"run {who.run} ({who.what}) since {since}"
