"""One line of a corpus file: bytes in, a checked Conversation or Preference out, or the reason why not.
Which files there are, duplicates, and what is written belongs to corpus.

A line that plainly fits the schema takes a typed decoder. Any other line is read again by the strict reader here,
which alone decides: it accepts the odd but sound line, and words the reason for all others. So the fast way may be
too suspicious, never too trusting.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, get_args

import msgspec
from msgspec import UNSET, UnsetType

from katherine.errors import DataError
from katherine.examples import Conversation, Message, Preference, Role

Kind = Literal["sft", "dpo", "unrecognised"]

# Keys beside the schema's. Carrying one of these means more than its text says (a call, a thought, a weight of 0):
# leaving it away would teach something else than what was written.
_NOT_IGNORABLE = frozenset(
    {"audio", "function_call", "functions", "images", "reasoning", "reasoning_content", "thinking", "tool_calls"}
    | {"tools", "weight"}
)
_SFT_KEYS = frozenset({"messages"})
_DPO_KEYS = frozenset({"prompt", "chosen", "rejected"})
_LINE_KEYS = _SFT_KEYS | _DPO_KEYS | {"_cat", "_type"}
_MESSAGE_KEYS = frozenset({"role", "content"})

_THOUGHT = re.compile(r"</?think", re.IGNORECASE)
# Nothing that a reader would see: white space, control characters, and what Unicode calls Default_Ignorable_Code_Point
# (zero-width spaces and joiners, marks of direction, fillers, variation selectors). Spelled out, because Python's own
# tables call characters unprintable that are only newer than they are.
_NOTHING = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]*"
)
# A key may be spelled with escapes ("r\u006fle"). Letters and the underscore lie in \u005f, \u006x and \u007x (and
# capitals play no part in any key), so a line without these spells every key out.
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
SHOWN_KEYS = 6  # of a foreign line: enough to recognise where it came from
SHOWN_NAME = 40  # characters of a key, role or number: longer than any that a person chose


class Rejected(DataError):
    """A line that cannot be used; the message is the reason."""


class Problem(msgspec.Struct, frozen=True, gc=False):
    """Something a person should look at.

    file: as the report names it, "" for the dataset as a whole. line: counted from 1, None for the whole file.
    text: the offending text, shortened, or "" where too many came before it. A warning is used all the same; what is
    rejected is not.
    """

    file: str
    line: int | None
    reason: str
    severity: Literal["rejected", "warning"]
    text: str = ""


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[Message] | UnsetType = UNSET
    prompt: list[Message] | UnsetType = UNSET
    chosen: list[Message] | UnsetType = UNSET
    rejected: list[Message] | UnsetType = UNSET
    category: str | UnsetType | None = msgspec.field(default=UNSET, name="_cat")
    type: str | UnsetType | None = msgspec.field(default=UNSET, name="_type")


_decode = msgspec.json.Decoder(_Line).decode


def read(raw: bytes) -> tuple[Conversation | Preference, Sequence[str]]:
    """The example that the line holds (system turns dropped, contents stripped, CRLF as LF), and warnings about it.

    Raises Rejected.
    """
    try:
        line = _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _read_strictly(raw)
    return _example(line, []) if _each_key_once(raw, line) else _read_strictly(raw)


def kind_of(raw: bytes) -> Kind:
    """What a rejected line meant to be, judged by its keys' spelling alone: it may not be JSON at all."""
    if b'"chosen"' in raw or b'"rejected"' in raw:
        return "dpo"
    return "sft" if b'"messages"' in raw else "unrecognised"


def _each_key_once(raw: bytes, line: _Line) -> bool:
    """False where a key may occur twice, the one thing that the typed decoder lets pass. Too many quoted keys may
    also stand in a text: then it is only read again."""
    if line.messages is not UNSET:
        turns = len(line.messages)
        # Two quotes for each string that the schema has: any key more, or a quote inside a text, would show.
        if raw.count(b'"') == 2 + 8 * turns:
            return True
        once = raw.count(b'"messages"') == 1
    elif line.prompt is not UNSET and line.chosen is not UNSET and line.rejected is not UNSET:
        turns = len(line.prompt) + len(line.chosen) + len(line.rejected)
        once = raw.count(b'"prompt"') == 1 and raw.count(b'"chosen"') == 1 and raw.count(b'"rejected"') == 1
    else:
        return False
    return (
        once
        and raw.count(b'"role"') == turns
        and raw.count(b'"content"') == turns
        and (line.category is UNSET or raw.count(b'"_cat"') == 1)
        and (line.type is UNSET or raw.count(b'"_type"') == 1)
        and _ESCAPED_LETTER.search(raw) is None
    )


def _example(line: _Line, notes: list[str]) -> tuple[Conversation | Preference, list[str]]:
    if line.messages is not UNSET:
        if line.prompt is not UNSET or line.chosen is not UNSET or line.rejected is not UNSET:
            raise Rejected("both `messages` and keys of a preference pair; write them as two lines")
        messages = _turns(line.messages, "", notes)
        if messages[-1].role != "assistant":
            raise Rejected(
                "does not end with the assistant: the last turn is the user's, so there is no reply to learn"
            )
        return Conversation(messages), notes
    if line.prompt is UNSET or line.chosen is UNSET or line.rejected is UNSET:
        raise Rejected("a preference pair needs `prompt`, `chosen` and `rejected`")
    prompt = _turns(line.prompt, "`prompt`: ", notes)
    if prompt[-1].role != "user":
        raise Rejected("`prompt` does not end with the user, so there is nothing to answer")
    chosen, rejected = _reply(line.chosen, "chosen"), _reply(line.rejected, "rejected")
    if chosen == rejected:
        raise Rejected("chosen equals rejected: the pair says nothing about which reply is better")
    category = (line.category or "").strip() or None
    return Preference(prompt, chosen, rejected, category, (line.type or "").strip() or None), notes


def _turns(messages: list[Message], where: str, notes: list[str]) -> tuple[Message, ...]:
    """The talk without system turns: begins with the user, alternates, no turn empty, no thought in a reply."""
    turns: list[Message] = []
    for message in messages:
        if message.role == "system":
            continue
        text = message.content
        if (cleaned := _clean(text)) is not text:
            message, text = Message(message.role, cleaned), cleaned
        if message.role != ("assistant" if len(turns) % 2 else "user"):
            if not turns:
                raise Rejected(f"{where}does not alternate: it begins with the assistant, not with the user")
            raise Rejected(
                f"{where}does not alternate: turns {len(turns)} and {len(turns) + 1} (system turns left out) are both "
                f"the {message.role}'s"
            )
        if _NOTHING.fullmatch(text):
            raise Rejected(f"{where}empty turn: turn {len(turns) + 1} ({message.role}) has no text")
        if "<" in text and _THOUGHT.search(text):
            if message.role == "assistant":
                _refuse_thought(f"{where}turn {len(turns) + 1}")
            notes.append(f"{where}<think> in a user's turn is kept as plain text")
        turns.append(message)
    if not turns:
        left = "nothing is left after system turns are dropped" if messages else "there are no messages"
        raise Rejected(f"{where}{left}")
    return tuple(turns)


def _reply(messages: list[Message], name: str) -> tuple[Message]:
    turns = [message for message in messages if message.role != "system"]
    if len(turns) != 1 or turns[0].role != "assistant":
        found = ", ".join(turn.role for turn in turns[:SHOWN_KEYS]) or "none"
        raise Rejected(f"`{name}` must be one assistant turn; found {found}")
    text = _clean(turns[0].content)
    if _NOTHING.fullmatch(text):
        raise Rejected(f"empty turn: `{name}` has no text")
    if "<" in text and _THOUGHT.search(text):
        _refuse_thought(f"`{name}`")
    return (Message("assistant", text),)


def _refuse_thought(where: str) -> NoReturn:
    raise Rejected(f"{where}: the assistant's text holds <think>; thoughts are never learned: remove them or the line")


def _clean(text: str) -> str:
    """Chat templates strip content anyhow; done here, two spellings of the same text are one example."""
    return (text.replace("\r\n", "\n") if "\r" in text else text).strip()


def _read_strictly(raw: bytes) -> tuple[Conversation | Preference, Sequence[str]]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise Rejected(f"not valid UTF-8: {found}; save the file as UTF-8") from None
    try:
        value = _JSON.decode(text)
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Rejected(_syntax(text, error)) from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise Rejected(f"a lone surrogate, {half}: half a character, which no tokenizer can read") from None
    except RecursionError:
        raise Rejected("nested too deeply to be read") from None
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise Rejected("this is a JSON array; write one object a line, without brackets around them")
        raise Rejected(f"the line must be a JSON object, found {_named(value)}")
    ignored = _extra(value, _LINE_KEYS, "the line")
    line = _Line(category=_tag(value, "_cat"), type=_tag(value, "_type"))
    for key in ("messages", "prompt", "chosen", "rejected"):
        if key in value:
            setattr(line, key, _messages(value[key], key, ignored))
    if not value.keys() & (_SFT_KEYS | _DPO_KEYS):
        raise Rejected(
            "neither an SFT line (`messages`) nor a preference pair (`prompt`, `chosen`, `rejected`); "
            f"keys: {_listed(value)}"
        )
    if line.messages is UNSET and (missing := sorted(_DPO_KEYS - value.keys())):
        raise Rejected(f"a preference pair needs `prompt`, `chosen` and `rejected`; missing: {', '.join(missing)}")
    return _example(line, [f"ignored keys: {_listed(sorted(ignored))}"] if ignored else [])


def _listed(keys: Iterable[str]) -> str:
    shown = [ascii(key[:SHOWN_NAME]) for key in itertools.islice(keys, SHOWN_KEYS + 1)]
    return ", ".join(shown[:SHOWN_KEYS] + ["…"] * (len(shown) > SHOWN_KEYS)) or "none"


def _messages(value: Any, key: str, ignored: set[str]) -> list[Message]:
    if not isinstance(value, list):
        raise Rejected(f"wrong type: `{key}` must be a list of messages, found {_named(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"`{key}` {number}"
        if not isinstance(message, dict):
            raise Rejected(f"wrong type: {where} must be an object with `role` and `content`, found {_named(message)}")
        if missing := sorted(_MESSAGE_KEYS - message.keys()):
            raise Rejected(f"{where} has no {' and no '.join(f'`{name}`' for name in missing)}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str):
            raise Rejected(f"wrong type: {where} must have a text as `role`, found {_named(role)}")
        if role not in get_args(Role):
            raise Rejected(f"unknown role {role[:SHOWN_NAME]!a} in {where}; known are {', '.join(get_args(Role))}")
        if not isinstance(content, str):
            raise Rejected(f"wrong type: {where} must have a text as `content`, found {_named(content)}")
        ignored |= _extra(message, _MESSAGE_KEYS, where)
        messages.append(Message(role, content))  # type: ignore[arg-type]
    return messages


def _extra(value: dict[str, Any], known: frozenset[str], where: str) -> set[str]:
    """Keys that are left away. `id` and keys that begin with an underscore are notes to oneself and need no warning;
    what would change the meaning is refused."""
    extra = value.keys() - known
    for key in sorted(extra & _NOT_IGNORABLE):
        if value[key] not in (None, "", [], {}):
            raise Rejected(f"{where} carries {key!a}, which cannot be learned here; remove it or the line")
    return {key for key in extra if key != "id" and not key.startswith("_")}


def _tag(value: dict[str, Any], key: str) -> str | UnsetType | None:
    tag = value.get(key, UNSET)
    if tag is UNSET or tag is None or isinstance(tag, str):
        return tag
    raise Rejected(f"wrong type: `{key}` must be a text, found {_named(tag)}")


def _named(value: Any) -> str:
    for kind, name in ((bool, "true or false"), (str, "a text"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "a number"


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    if text.startswith("\ufeff"):
        return "a byte-order mark inside the file (joined from several files?); remove it"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "invalid JSON: the line ends before its object does; write each object whole on one line"
    if error.msg == "Extra data":
        return f"invalid JSON: more text after the object, at column {error.colno}; write one object a line, no commas"
    return f"invalid JSON at column {error.colno}: {error.msg}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise Rejected(f"duplicate key {twice[:SHOWN_NAME]!a}: which of the two counts is anyone's guess")
    return value


def _finite(digits: str) -> float:
    """Numbers are never used, only passed over; but one that a 64-bit float cannot hold is not JSON that others
    can read."""
    value = float(digits)
    if math.isinf(value):
        shown = digits if len(digits) <= SHOWN_NAME else f"of {len(digits):,} characters"
        raise Rejected(f"number out of range: {shown}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise Rejected(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=_finite, parse_constant=_no_constant)
