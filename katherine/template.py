"""Rendering, for training and for chat alike: from turns to token ids, and the template baked into an export.

The base's own template is read once, by probing it with marked turns, and reduced to the markup around a turn.
Everything is rendered from that markup, so that no system turn appears which the data did not have, every
assistant turn opens the way the inference prompt ends (with Qwen3.5: the empty thought), and control tokens
inside somebody's words stay words. Needs tokenizers and jinja2 only; loading models is the business of model."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from katherine.errors import TemplateError
from katherine.examples import Conversation, Message, Preference, Role

# Letters and digits only: no template trims, escapes or reacts to them.
_MARKS = {"system": "qzsysmarkqz", "user": "qzusermarkqz", "assistant": "qzrepmarkqz", "again": "qzagainmarkqz"}


@dataclass(frozen=True, slots=True)
class Markup:
    """The text around one role's words."""

    open: str
    close: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training sequence. `ids` and `learned` have equal length; learned[i] is True where token i carries loss.
    `turns` are the [start, end) spans that carry loss, one an assistant turn."""

    ids: list[int]
    learned: list[bool]
    turns: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """One preference: prompt ids, and the ids of both replies, each ending with the end-of-turn."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, slots=True)
class Parity:
    """What `prove` found. `turns` counts assistant turns compared. `reread` of them have a prompt that a program which
    tokenizes the rendered text anew would see otherwise (`reread_first` says where): a control token typed as text, or
    a tokenizer that joins the end of the markup with what follows. Chat here hands on ids and is not concerned."""

    examples: int
    turns: int
    reread: int
    reread_first: str
    mismatches: list[str]

    @property
    def holds(self) -> bool:
        return not self.mismatches


@dataclass(frozen=True)
class ChatTemplate:
    """A base's markup and tokenizer. `remarks` say in words what is rendered otherwise than by the base itself."""

    system: Markup
    user: Markup
    assistant: Markup
    begin: str
    end_of_turn: str
    tokenizer: Tokenizer = field(repr=False)
    remarks: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Reads tokenizer.json and the chat template of a checkpoint folder.

        Raises TemplateError where a file is missing or the template cannot be reduced to turns.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TemplateError(f"{folder} has no tokenizer.json: give a checkpoint folder with a fast tokenizer.")
        return cls.read(Tokenizer.from_file(str(path)), *_template_source(folder))

    @classmethod
    def read(cls, tokenizer: Tokenizer, source: str, begin_token: str = "") -> "ChatTemplate":
        """Reduces a template's `source` to markup. `begin_token` is the tokenizer's bos token, as text."""
        base = _BaseTemplate(source, begin_token)
        mark = _MARKS
        _, closes_reply = _around(base.render(["user", "assistant"]), mark["user"], mark["assistant"])
        _, closes_user = _around(base.render(["user"]), mark["user"])
        _, after_user = _around(base.render(["user"], generate=True), mark["user"])
        opens_reply = _without_prefix(after_user, closes_user, "the generation prompt")
        between = _between(base.render(["user", "assistant", "again"]), mark["assistant"], mark["again"])
        opens_user = _without_prefix(between, closes_reply, "a user's turn after a reply")

        start, _ = _around(base.render(["system", "user"]), mark["system"])
        # A bos token may be the very token that opens every turn (SmolLM2): then one of it begins a turn, not the text.
        at_start = begin_token * (2 if begin_token and opens_user.startswith(begin_token) else 1)
        begin = begin_token if begin_token and start.startswith(at_start) else ""
        closes_system = _between(base.render(["system", "user"]), mark["system"], mark["user"])
        if not closes_system.endswith(opens_user):
            raise TemplateError("The base's template renders a first user turn otherwise than later ones.")
        system = Markup(start.removeprefix(begin), closes_system.removesuffix(opens_user))

        remarks = []
        own, _ = _around(base.render(["user"]), mark["user"])
        if added := own.removeprefix(begin).removesuffix(opens_user):
            remarks.append(f"The base's template adds a system turn of its own, left out here: {added.strip()!r}.")
        earlier = _between(base.render(["user", "assistant", "again"]), mark["user"], mark["assistant"])
        if earlier != closes_user + opens_reply:
            remarks.append(
                "The base renders earlier replies otherwise than the reply it asks for; here every reply opens as the "
                f"inference prompt ends: {opens_reply!r}."
            )
        added_tokens = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        found = re.match("|".join(map(re.escape, sorted(added_tokens, key=len, reverse=True))) or "(?!)", closes_reply)
        if not found:
            raise TemplateError(
                f"The base's template ends a reply with {closes_reply!r}, which begins with no control token of its "
                "tokenizer: replies could not be told to end. Use a chat (instruct) model as the base."
            )
        return cls(
            system=system,
            user=Markup(opens_user, closes_user),
            assistant=Markup(opens_reply, closes_reply),
            begin=begin,
            end_of_turn=found.group(),
            tokenizer=tokenizer,
            remarks=tuple(remarks),
        )

    # ------------------------------------------------------------------ ids

    @cached_property
    def _controls(self) -> dict[str, int]:
        return {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)")

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer without its added tokens: to it, `<|im_end|>` is a word like any other."""
        parts = json.loads(self.tokenizer.to_str())
        parts["added_tokens"] = []
        parts["post_processor"] = None
        return Tokenizer.from_str(json.dumps(parts))

    @property
    def end_of_turn_id(self) -> int:
        return self._controls[self.end_of_turn]

    def _encode(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of a row of control ids and texts. Neighbouring texts are encoded as one, as any tokenizer does."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                ids += self._plain.encode(text, add_special_tokens=False).ids
                text = ""
            ids.append(piece)
        return ids + (self._plain.encode(text, add_special_tokens=False).ids if text else [])

    def _split(self, markup: str) -> list[str | int]:
        """Markup as control ids and the text between them."""
        return [self._controls.get(part, part) for part in self._control_pattern.split(markup) if part]

    def _markup(self, role: Role) -> Markup:
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The inference prompt: ids up to the point where the reply begins. Thinking is off."""
        ids: list[int] = []
        pending: list[str | int] = self._split(self.begin)
        for message in messages:
            around = self._markup(message.role)
            pending += self._split(around.open)
            if message.role == "assistant":
                # A reply is encoded on its own, because at inference it follows a finished prompt.
                ids += self._encode(pending)
                pending = []
            pending += [message.content.strip(), *self._split(around.close)]
        return ids + self._encode([*pending, *self._split(self.assistant.open)])

    def reply(self, content: str) -> list[int]:
        """Ids of a reply's words and its end-of-turn: what is learned."""
        return [*self._encode([content.strip()]), self.end_of_turn_id]

    def training(self, conversation: Conversation) -> Rendered:
        """One sequence for the whole conversation; the assistant's words and end-of-turn are learned."""
        ids: list[int] = []
        turns: list[tuple[int, int]] = []
        pending: list[str | int] = self._split(self.begin)
        for message in conversation.messages:
            around = self._markup(message.role)
            pending += self._split(around.open)
            if message.role == "assistant":
                ids += self._encode(pending)
                words = self.reply(message.content)
                turns.append((len(ids), len(ids) + len(words)))
                ids += words
                pending = self._split(around.close)[1:]
            else:
                pending += [message.content.strip(), *self._split(around.close)]
        # What follows the last end-of-turn is never learned and never seen: it is left off.
        learned = [False] * len(ids)
        for start, end in turns:
            learned[start:end] = [True] * (end - start)
        return Rendered(ids, learned, turns)

    def pair(self, preference: Preference) -> RenderedPair:
        """Raises TemplateError where chosen or rejected is not one assistant turn."""
        for name, messages in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            if [m.role for m in messages] != ["assistant"]:
                raise TemplateError(f"{name} holds {len(messages)} turns; a preference compares one reply each.")
        return RenderedPair(
            self.prompt(preference.prompt),
            self.reply(preference.chosen[0].content),
            self.reply(preference.rejected[0].content),
        )

    def count(self, conversation: Conversation) -> int:
        """Length in tokens of the training sequence."""
        return len(self.training(conversation).ids)

    def count_pair(self, preference: Preference) -> int:
        """Length in tokens of the longer of prompt + chosen and prompt + rejected."""
        pair = self.pair(preference)
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    # ------------------------------------------------------------------ text

    def text(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The rendered text, exactly as the baked template renders it. For people and for other programs; ids come
        from `prompt` and `training`."""
        turns = [self._markup(m.role).open + m.content.strip() + self._markup(m.role).close for m in messages]
        return self.begin + "".join(turns) + (self.assistant.open if generate else "")

    @cached_property
    def baked(self) -> str:
        """A Jinja template that renders as `text` does, with no argument to set: for the export, so that every
        program that reads it gets thinking off and no system turn by default."""

        def literal(text: str) -> str:
            return "{{- " + json.dumps(text, ensure_ascii=False) + " -}}" if text else ""

        def turn(markup: Markup) -> str:
            return literal(markup.open) + "{{- ns.content | trim -}}" + literal(markup.close)

        return (
            literal(self.begin)
            + "{%- for message in messages -%}"
            + "{%- set ns = namespace(content='') -%}"
            + "{%- if message['content'] is string -%}{%- set ns.content = message['content'] -%}"
            + "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
            + "{%- if part['type'] == 'text' -%}{%- set ns.content = ns.content + part['text'] -%}{%- endif -%}"
            + "{%- endfor -%}{%- endif -%}"
            + "{%- if message['role'] == 'user' -%}"
            + turn(self.user)
            + "{%- elif message['role'] == 'assistant' -%}"
            + turn(self.assistant)
            + "{%- else -%}"
            + turn(self.system)
            + "{%- endif -%}{%- endfor -%}"
            + "{%- if add_generation_prompt -%}"
            + literal(self.assistant.open)
            + "{%- endif -%}"
        )

    def prove(self, conversations: Iterable[Conversation]) -> Parity:
        """Compares, at every assistant turn that carries loss, the training prefix with the inference prompt, token by
        token, and the baked template's text with this module's."""
        baked = _environment().from_string(self.baked)
        examples = turns = reread = 0
        reread_first = ""
        mismatches: list[str] = []
        for conversation in conversations:
            examples += 1
            rendered = self.training(conversation)
            replies = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
            for index, (start, _) in zip(replies, rendered.turns, strict=True):
                turns += 1
                where = f"example {examples}, turn {index + 1}"
                before = conversation.messages[:index]
                prefix, prompt = rendered.ids[:start], self.prompt(before)
                if prefix != prompt:
                    mismatches.append(f"{where}: {_first_difference(prefix, prompt)}")
                as_json = [{"role": m.role, "content": m.content} for m in before]
                text = baked.render(messages=as_json, add_generation_prompt=True)
                if text != self.text(before, generate=True):
                    mismatches.append(f"{where}: the baked template renders it otherwise")
                read = self.tokenizer.encode(text, add_special_tokens=False).ids
                if read != prompt:
                    reread += 1
                    reread_first = reread_first or f"{where}: {_first_difference(prompt, read)}"
        return Parity(examples, turns, reread, reread_first, mismatches)


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"token {at} differs: {ours[at : at + 3]} against {theirs[at : at + 3]}"


def _template_source(folder: Path) -> tuple[str, str]:
    """The chat template's Jinja source and the bos token's text, from a checkpoint folder."""
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    alone = folder / "chat_template.jinja"
    source = alone.read_text(encoding="utf-8") if alone.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not source:
        raise TemplateError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json). "
            "Use a chat (instruct) model as the base."
        )
    begin = config.get("bos_token") or ""
    return source, begin["content"] if isinstance(begin, dict) else begin


def _environment() -> jinja2.Environment:
    """As transformers renders templates (utils/chat_template_utils.py): the same trimming and names."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    # A date in a prompt would change between training and chat; none is needed to find the markup.
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: ""}
    return environment


class _BaseTemplate:
    """The base's own template, rendered with marked turns and thinking off."""

    def __init__(self, source: str, begin_token: str):
        self.begin_token = begin_token
        try:
            self.template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"The base's chat template is not valid Jinja: {error}.") from error

    def render(self, turns: Iterable[str], *, generate: bool = False) -> str:
        messages = [{"role": "user" if t == "again" else t, "content": _MARKS[t]} for t in turns]
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=generate,
                enable_thinking=False,
                bos_token=self.begin_token,
                eos_token="",
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise TemplateError(f"The base's chat template cannot render the turns {roles}: {error}.") from error


def _pieces(text: str, *marks: str) -> Iterator[str]:
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise TemplateError("The base's chat template leaves out or alters what a turn says; it cannot be used.")
        yield before
    yield text


def _around(text: str, *marks: str) -> tuple[str, str]:
    """What stands before the first mark and after the last."""
    pieces = list(_pieces(text, *marks))
    return pieces[0], pieces[-1]


def _between(text: str, first: str, second: str) -> str:
    return _pieces_after(text, first).partition(second)[0]


def _pieces_after(text: str, mark: str) -> str:
    return list(_pieces(text, mark))[-1]


def _without_prefix(text: str, prefix: str, what: str) -> str:
    if not text.startswith(prefix):
        raise TemplateError(f"The base's chat template does not close turns alike: {what} is rendered as {text!r}.")
    return text.removeprefix(prefix)
