"""What tests of training are given: some talk, a dataset's files, and a Progress that can stop or kill."""

import os
import signal
from pathlib import Path

import msgspec

from katherine.examples import Conversation, Message, Preference
from katherine.progress import Quiet

REPLIES = {
    "Who are you?": "I'm Katherine. I book the bands.",
    "Where do you live?": "Austin, east side.",
    "What colour is your wall?": "Teal. All of it.",
    "Are your feet cold?": "Always.",
    "Do you like mornings?": "Not until coffee.",
}


def user(text: str) -> Message:
    return Message("user", text)


def reply(text: str) -> Message:
    return Message("assistant", text)


def write_dataset(folder: Path, conversations: list[Conversation], preferences: list[Preference]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("sft.jsonl", conversations), ("dpo.jsonl", preferences)):
        (folder / name).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return folder


class Told(Quiet):
    """Remembers, and at the metric row of a step asks to stop, or kills this very process."""

    def __init__(self, stop_at: int = 0, kill_at: int = 0):
        super().__init__()
        self.stop_at, self.kill_at = stop_at, kill_at
        self.steps: list[tuple[int, int]] = []

    def step(self, step: int, of: int) -> None:
        self.steps.append((step, of))

    def metric(self, **values: float | int | str | None) -> None:
        super().metric(**values)
        if values["step"] == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def stop_requested(self) -> bool:
        return bool(self.stop_at) and len(self.losses()) + 1 >= self.stop_at

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.rows if "loss" in row}
