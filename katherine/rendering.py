"""Examples as training sees them, for looking at: the rendered text in pieces, the learned ones marked; and prompts, as
ids. A tokenizer of a quarter of a million words takes hundreds of MB and seconds to read, so `Renderer` keeps it in a
child process, which ends when it has not been asked for a while. What becomes of an example is template's."""

import hashlib
import itertools
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from katherine import bases
from katherine.errors import KatherineError, SetupError, TemplateError
from katherine.examples import Conversation, Message, Preference
from katherine.settings import PROJECT, Home, child_environment
from katherine.template import ChatTemplate

# Characters of an example that are tokenized for the page. At 1 MB a second, more would take too long; training takes
# whatever fits its max length, which is far less.
LONGEST = 50_000
# Seconds without a request after which the child gives its memory back.
IDLE = 300.0
# Twice what the longest page of examples takes on a busy machine; a child that is slower hangs.
ANSWERS_WITHIN = 20.0
# A prompt may first need its tokenizer fetched: 20 MB, over a network that would be too slow for a base's 19 GB anyway.
PROMPT_WITHIN = 120.0


class Piece(msgspec.Struct, frozen=True):
    """A stretch of rendered text. learned: carries loss. control: a control token, not the same letters as text."""

    text: str
    learned: bool
    control: bool


class Rendered(msgspec.Struct, frozen=True):
    """parts: name → its pieces; one part "conversation", or "prompt", "chosen" and "rejected". tokens: as training
    counts them (of a pair: the prompt with the longer reply); None where the text is too long for the page, or no
    tokenizer is at hand: then the pieces are the plain texts."""

    parts: dict[str, list[Piece]]
    tokens: int | None


class Answer(msgspec.Struct, frozen=True):
    """base: whose template rendered; "" where there is none, and `remark` says why. remark: also why it is not the one
    asked for."""

    rendered: list[Rendered]
    base: str
    remark: str


class _Request(msgspec.Struct, frozen=True):
    base: str
    conversations: list[Conversation] = []
    preferences: list[Preference] = []
    prompt: list[Message] | None = None


class _Prompt(msgspec.Struct, frozen=True):
    """problem: why there are no ids, in words."""

    ids: list[int] = []
    template_sha256: str = ""
    problem: str = ""


Example = Conversation | Preference


def render(example: Example, template: ChatTemplate | None) -> Rendered:
    """The example as the base's tokenizer gives it to training. Without a template: its texts alone."""
    if template is None or _length(example) > LONGEST:
        return plain(example)
    if isinstance(example, Conversation):
        training = template.training(example)
        return Rendered({"conversation": _pieces(template, training.ids, training.learned)}, len(training.ids))
    pair = template.pair(example)
    parts = {
        "prompt": _pieces(template, pair.prompt, [False] * len(pair.prompt)),
        "chosen": _pieces(template, pair.chosen, [True] * len(pair.chosen)),
        "rejected": _pieces(template, pair.rejected, [True] * len(pair.rejected)),
    }
    return Rendered(parts, len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))


def plain(example: Example) -> Rendered:
    """The example's texts, without a tokenizer."""

    def turns(messages: Sequence[Message], learned: bool = True) -> list[Piece]:
        return [
            Piece(f"{message.role}: {message.content}\n", learned and message.role == "assistant", False)
            for message in messages
        ]

    if isinstance(example, Conversation):
        return Rendered({"conversation": turns(example.messages)}, None)
    parts = {
        "prompt": turns(example.prompt, False),
        "chosen": turns(example.chosen),
        "rejected": turns(example.rejected),
    }
    return Rendered(parts, None)


def _length(example: Example) -> int:
    messages = example.messages if isinstance(example, Conversation) else (
        *example.prompt, *example.chosen, *example.rejected
    )  # fmt: skip
    return sum(len(message.content) for message in messages)


def _pieces(template: ChatTemplate, ids: list[int], learned: list[bool]) -> list[Piece]:
    """Neighbouring tokens of one sort are decoded together: a character may be several tokens."""
    controls = template.tokenizer.get_added_tokens_decoder()
    pieces = []
    for (lossy, control), tokens in itertools.groupby(
        zip(ids, learned, strict=True), key=lambda token: (token[1], token[0] in controls)
    ):
        numbers = [number for number, _ in tokens]
        pieces.append(Piece(template.tokenizer.decode(numbers, skip_special_tokens=False), lossy, control))
    return pieces


class Renderer:
    """Renders in a child process. Safe to ask from several threads."""

    def __init__(self, home: Home, idle: float = IDLE):
        self._home = home
        self._idle = idle
        self._child: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()  # one request at a time in the child's pipes
        self._reading: dict[str, threading.Thread] = {}
        self._starting = threading.Lock()

    def render(self, base: str, examples: Sequence[Example], patience: float = 0.3) -> Answer | None:
        """The examples (conversations, or pairs) as `base` renders them, or the small base where its tokenizer cannot
        be had; None while its tokenizer, or another base's, is still being read after `patience` seconds."""
        with self._starting:
            thread = self._reading.get(base)
            if thread is None or (not thread.is_alive() and not self._is_up()):
                thread = threading.Thread(target=self._ask, args=(base, ()), daemon=True)
                self._reading[base] = thread
                thread.start()
        thread.join(patience)
        return None if thread.is_alive() else self._ask(base, examples, patience)

    def prompt(self, base: str, messages: Sequence[Message], template_sha256: str = "") -> list[int]:
        """The inference prompt: exactly the ids of ChatTemplate.prompt with the base's own tokenizer, never another's.
        Takes as long as the tokenizer takes to be read: not for a handler.

        Raises SetupError where the tokenizer cannot be had, and TemplateError where the base's template cannot be used,
        or is not the one that was baked into a file (`template_sha256`, where given)."""
        request = _Request(base, prompt=list(messages))
        if not self._asking.acquire(timeout=PROMPT_WITHIN):
            raise SetupError(f"Another base's tokenizer has been read for {PROMPT_WITHIN:.0f} s. Try again.")
        try:
            for _ in range(2):  # once more where it had just gone to sleep
                try:
                    answer = _prompt(self._exchange(request, PROMPT_WITHIN))
                    break
                except TimeoutError as error:
                    self.close()
                    raise SetupError(f"The tokenizer of {base} cannot be had: {error}. Try again.") from None
                except (OSError, msgspec.MsgspecError) as error:
                    self.close()
                    answer = _Prompt(problem=f"{type(error).__name__}: {error}")
        finally:
            self._asking.release()
        if answer.problem:
            raise SetupError(f"The tokenizer of {base} cannot be had: {answer.problem}")
        if template_sha256 and answer.template_sha256 != template_sha256:
            raise TemplateError(
                f"The chat template of {base} is not the one that this file was made with: prompts would not be those "
                "that it was trained on. Export again."
            )
        return answer.ids

    def close(self) -> None:
        """End the child; the next request starts another."""
        child, self._child = self._child, None
        if child is not None:
            with suppress(OSError):
                child.kill()
            child.wait()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def _is_up(self) -> bool:
        return self.pid is not None

    def _ask(self, base: str, examples: Sequence[Example], patience: float = -1) -> Answer | None:
        """None while the pipes are taken for longer than `patience` seconds; -1 waits however long that is."""
        request = _Request(
            base,
            [each for each in examples if isinstance(each, Conversation)],
            [each for each in examples if isinstance(each, Preference)],
        )
        # Another base's tokenizer may be on its way from the hub, which takes as long as it takes.
        if not self._asking.acquire(timeout=patience):
            return None
        try:
            for _ in range(2):  # once more where it had just gone to sleep
                try:
                    # Fetching and reading a tokenizer has no bound of its own; rendering has.
                    return _answer(self._exchange(request, ANSWERS_WITHIN if examples else None))
                except (OSError, msgspec.MsgspecError, TimeoutError) as error:
                    self.close()
                    remark = f"The examples cannot be rendered here ({type(error).__name__}: {error})."
        finally:
            self._asking.release()
        return Answer([plain(example) for example in examples], "", remark)

    def _exchange(self, request: _Request, within: float | None) -> bytes:
        """The child's answer. Raises OSError where it is gone, TimeoutError where it is silent for `within` seconds."""
        if not self._is_up():
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "katherine.rendering", str(self._home.root), str(self._idle)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=PROJECT,
                # A base that is not here yet is fetched from the hub, where some open only to a token.
                env=child_environment("HF_READ_TOKEN"),
            )
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(msgspec.json.encode(request) + b"\n")
        self._child.stdin.flush()
        ready, _, _ = select.select([self._child.stdout], [], [], within)
        if not ready:
            raise TimeoutError(f"no answer within {within:.0f} s")
        return self._child.stdout.readline()


_answer = msgspec.json.Decoder(Answer).decode
_prompt = msgspec.json.Decoder(_Prompt).decode


class _Templates:
    """In the child: bases' templates, each read once."""

    def __init__(self, home: Home):
        self._home = home
        self._loaded: dict[Path, ChatTemplate] = {}
        self._read: dict[str, tuple[ChatTemplate | None, str, str]] = {}

    def get(self, base: str) -> tuple[ChatTemplate | None, str, str]:
        """(template, whose it is, remark); the small base's where the base's own cannot be had."""
        if base not in self._read:
            try:
                counted, remark = bases.counting(self._home, base)
                self._read[base] = self._load(bases.tokenizer(self._home, counted)), counted, remark
            except KatherineError as error:
                self._read[base] = None, "", str(error)
            except Exception as error:
                self._read[base] = (
                    None, "", f"The tokenizer of {base} cannot be read ({type(error).__name__}: {error})."
                )  # fmt: skip
        return self._read[base]

    def prompt(self, base: str, messages: Sequence[Message]) -> _Prompt:
        """By the base's own tokenizer or none. A failure is not kept: the hub may be back at the next question."""
        try:
            template = self._load(bases.here(self._home, base) or bases.tokenizer(self._home, base))
            baked = hashlib.sha256(template.baked.encode()).hexdigest()
            return _Prompt(template.prompt(messages), baked)
        except KatherineError as error:
            return _Prompt(problem=str(error))
        except Exception as error:
            return _Prompt(problem=f"{type(error).__name__}: {error}")

    def _load(self, folder: Path) -> ChatTemplate:
        if folder not in self._loaded:
            template = ChatTemplate.load(folder)
            template.reply("")  # makes what it makes once, here rather than with the first example
            self._loaded[folder] = template
        return self._loaded[folder]


def _serve(home: Home, idle: float) -> None:
    """Answer requests from stdin until it is closed, or nobody has asked for `idle` seconds."""
    templates = _Templates(home)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    requests: Any = os.fdopen(0, "rb", buffering=0)
    decode = msgspec.json.Decoder(_Request).decode
    pending = b""
    while True:
        ready, _, _ = select.select([requests], [], [], idle)
        data = requests.read(1 << 20) if ready else b""
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            request = decode(line)
            if request.prompt is not None:
                answers.write(msgspec.json.encode(templates.prompt(request.base, request.prompt)) + b"\n")
                answers.flush()
                continue
            template, base, remark = templates.get(request.base)
            examples: list[Example] = [*request.conversations, *request.preferences]
            rendered = [render(example, template) for example in examples]
            answers.write(msgspec.json.encode(Answer(rendered, base, remark)) + b"\n")
            answers.flush()


if __name__ == "__main__":
    _serve(Home(Path(sys.argv[1])), float(sys.argv[2]))
