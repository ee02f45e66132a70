"""Examples as training sees them, and the child process that keeps the tokenizer."""

import os
import signal
import time
from pathlib import Path

import pytest

from katherine import bases, rendering
from katherine.examples import Conversation, Message, Preference
from katherine.rendering import Renderer
from katherine.template import ChatTemplate


@pytest.fixture(scope="module")
def template(katherine_home) -> ChatTemplate:
    return ChatTemplate.load(bases.tokenizer(katherine_home, bases.SMALL))


@pytest.fixture
def renderer(katherine_home):
    made = Renderer(katherine_home)
    yield made
    made.close()


def talk(*texts: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)))


@pytest.mark.parametrize("said", ["hey", "naïve 🙂🏽 déjà — vu", "two\n\nlines", "numbers 1234", " tabs\tand  spaces "])
def test_the_pieces_together_are_the_rendered_text_and_what_is_learned_is_each_reply_with_its_end(template, said):
    conversation = talk("hi", said, "and?", said + "!")
    rendered = rendering.render(conversation, template)
    pieces = rendered.parts["conversation"]
    whole = template.text(conversation.messages)
    assert whole.startswith("".join(piece.text for piece in pieces))
    learned = "".join(piece.text for piece in pieces if piece.learned)
    assert learned == f"{said.strip()}{template.end_of_turn}{(said + '!').strip()}{template.end_of_turn}"
    assert rendered.tokens == template.count(conversation)


def test_a_control_token_typed_as_text_is_told_from_a_real_one(template):
    pieces = rendering.render(talk("say <|im_end|>", "<|im_end|> there"), template).parts["conversation"]
    typed = [piece for piece in pieces if "<|im_end|>" in piece.text and not piece.control]
    assert [piece.learned for piece in typed] == [False, True]
    assert [piece.text for piece in pieces if piece.control and piece.learned] == ["<|im_end|>"]


def test_a_pair_is_its_prompt_and_both_replies(template):
    preference = Preference(
        (Message("user", "who?"),), (Message("assistant", "me"),), (Message("assistant", "a model"),)
    )
    rendered = rendering.render(preference, template)
    assert list(rendered.parts) == ["prompt", "chosen", "rejected"]
    assert not any(piece.learned for piece in rendered.parts["prompt"])
    assert "".join(piece.text for piece in rendered.parts["rejected"]) == f"a model{template.end_of_turn}"
    assert rendered.tokens == template.count_pair(preference)


def test_a_huge_example_is_shown_as_text_and_not_tokenized(template):
    rendered = rendering.render(talk("hi", "x" * (rendering.LONGEST + 1)), template)
    assert rendered.tokens is None
    assert [piece.learned for piece in rendered.parts["conversation"]] == [False, True]


# ------------------------------------------------------------------------------------------------ in a child process


def test_the_child_renders_what_this_process_would(renderer, template):
    examples = [talk("hi", "naïve 🙂 <|im_end|>"), talk("and?", "yes")]
    answer = renderer.render(bases.SMALL, examples, patience=60)
    assert answer.rendered == [rendering.render(each, template) for each in examples]
    assert (answer.base, answer.remark) == (bases.SMALL, "")
    pair = Preference((Message("user", "who?"),), (Message("assistant", "me"),), (Message("assistant", "it"),))
    assert renderer.render(bases.SMALL, [pair]).rendered == [rendering.render(pair, template)]


def test_nobody_waits_for_a_tokenizer_longer_than_they_want(renderer):
    assert renderer.render(bases.SMALL, [talk("hi", "hey")], patience=0) is None
    assert renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60).rendered[0].tokens


def test_a_base_that_cannot_be_had_shows_the_texts_and_says_why(renderer):
    answer = renderer.render("/nowhere/at/all", [talk("hi", "hey")], patience=60)
    assert "There is no folder" in answer.remark and answer.base == ""
    assert answer.rendered == [rendering.plain(talk("hi", "hey"))]


def test_a_child_that_is_killed_is_replaced_unasked(renderer):
    renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60)
    killed = renderer.pid
    os.kill(killed, signal.SIGKILL)
    answer = renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60)
    assert answer.rendered[0].tokens and renderer.pid not in (killed, None)


def test_a_child_nobody_asks_gives_its_memory_back_and_one_whose_asker_is_gone_ends(katherine_home):
    renderer = Renderer(katherine_home, idle=0.5)
    renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60)
    deadline = time.monotonic() + 30
    while renderer.pid is not None:
        assert time.monotonic() < deadline, "it stayed"
        time.sleep(0.1)
    assert renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60).rendered[0].tokens
    renderer.close()


def test_the_token_of_the_hub_is_the_only_secret_the_child_sees(renderer, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "canary-key")
    monkeypatch.setenv("KATHERINE_OPERATOR_PASSWORD", "canary-password")
    renderer.render(bases.SMALL, [talk("hi", "hey")], patience=60)
    assert b"canary" not in Path(f"/proc/{renderer.pid}/environ").read_bytes()
