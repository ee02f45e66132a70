"""The two nouns everything carries: a conversation and a preference. Reading them from files is corpus's work."""

from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One turn. `content` is plain text; control tokens inside it are text too."""

    role: Role
    content: str


class Conversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An SFT example: turns that alternate user and assistant and end with the assistant (system turns dropped)."""

    messages: tuple[Message, ...]


class Preference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A DPO example: the prompt's turns end with the user; chosen and rejected are one assistant turn each.

    `category` and `type` are the curator's `_cat` and `_type`, and are written under those names; a pair that has
    both is curated.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    category: str | None = msgspec.field(default=None, name="_cat")
    type: str | None = msgspec.field(default=None, name="_type")

    @property
    def curated(self) -> bool:
        return self.category is not None and self.type is not None
