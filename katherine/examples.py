"""The two nouns everything carries: a conversation and a preference. Reading them from files is corpus's work."""

from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True):
    """One turn. `content` is plain text; control tokens inside it are text too."""

    role: Role
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """An SFT example: turns that alternate user and assistant and end with the assistant (system turns dropped)."""

    messages: tuple[Message, ...]


class Preference(msgspec.Struct, frozen=True):
    """A DPO example: the prompt's turns end with the user; chosen and rejected are one assistant turn each.

    `category` and `type` are the curator's `_cat` and `_type`; a pair that has both is curated.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    category: str | None = None
    type: str | None = None
