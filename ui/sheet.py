"""What a page keeps of its form, so that what a person changed is told from what the page was given, in whatever order
answers come."""

import secrets
from collections.abc import Iterable, Mapping
from typing import Any


class Sheet:
    """What a form holds on one page without a person's doing: what differs from that, a person changed. The page keeps
    it in two values, since answers overtake each other. `drawn` comes in one answer with the fields whenever all of
    them are set, so the two never part. `kept` has what single edits added, under the mark of the drawing they were
    made in: an edit that is answered after another drawing says nothing about that one.

    holds: the values as the controls have them. stands_for: as the draft has them, 1e-4 where 0.0001 was typed.
    waiting: the fields whose text was not kept. overtaken: no edit made since the drawing was answered yet, so one made
    before it may have been answered last."""

    def __init__(self, drawn: Mapping[str, Any], kept: Mapping[str, Any]):
        self._mark: str = drawn["mark"]
        self.overtaken = kept["mark"] != self._mark
        self.waiting: list[str] = list(kept["waiting"])
        self._since: dict[str, Any] = {} if self.overtaken else dict(kept["fields"])
        self.holds: dict[str, Any] = drawn["fields"] | {name: each["holds"] for name, each in self._since.items()}
        self.stands_for: dict[str, Any] = drawn["fields"] | {name: each["kept"] for name, each in self._since.items()}

    @staticmethod
    def blank(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`drawn` and `kept` of a page on which nothing was drawn yet."""
        return {"mark": "", "fields": dict(fields)}, {"mark": "", "fields": {}, "waiting": []}

    @staticmethod
    def drawn(fields: Mapping[str, Any]) -> dict[str, Any]:
        # A mark of its own even where nothing is new: what was typed before it may be gone from the page.
        return {"mark": secrets.token_hex(8), "fields": dict(fields)}

    def kept(self, holds: Mapping[str, Any], kept: Mapping[str, Any], waiting: Iterable[str]) -> dict[str, Any]:
        """With the fields named in `holds`, which stand for those in `kept`."""
        added = {name: {"holds": value, "kept": kept[name]} for name, value in holds.items()}
        return {"mark": self._mark, "fields": self._since | added, "waiting": list(waiting)}
