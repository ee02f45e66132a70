"""Questions to talks with real engines: side by side, stopped, killed, asked again, kept."""

import logging
import os
import signal
from pathlib import Path

import pytest
from persona import TALKS
from talking import (
    ENDLESS,
    GREEDY,
    SING,
    answers,
    asked,
    asking,
    begin,
    ended,
    export,
    file,
    home,
    is_alive,
    learned,
    make_asking,
    make_pool,
    pid_of,
    pool,
    renderer,
    speaking,
    until,
)
from test_pool import aborting, looping, with_manifest

from jobs import queue, slot
from jobs.asking import LONGEST
from jobs.pool import needs
from katherine import columns, runs, talks
from katherine.columns import Column
from katherine.engines import Engine
from katherine.errors import KatherineError, NotFound, SetupError, TemplateError
from katherine.examples import Message
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.talks import Sampling

# ruff: noqa: F401, F811  (fixtures)

WHO, WHO_SAID = TALKS[0][0]
# Hot enough to flatten the choice to a lottery over the whole vocabulary: what comes is the seed's alone.
LOTTERY = Sampling(seed=1, temperature=50.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8)


@pytest.fixture
def chosen(home: Home, export: Run) -> list[Column]:
    return columns.of_export(home, export)


def test_one_question_is_answered_by_all_columns_and_kept(home, asking, chosen):
    talk = begin(home, *chosen)
    found = asked(asking, talk, f"  {WHO}\n")
    assert [(each.column, each.state, each.text, each.finish) for each in found] == [
        (column.id, "done", WHO_SAID, "end") for column in chosen
    ]
    for each in found:
        assert each.tokens > 5 and each.tokens_per_second > 0 and each.note == ""
        assert 0 < each.first_token_seconds <= each.seconds
    kept = talks.load(home, talk.id)
    assert kept == asking.view(talk.id)
    assert [(each.question, each.sampling) for each in kept.rounds] == [(WHO, GREEDY)]


def test_the_talk_goes_on_with_what_each_column_said(home, asking, chosen):
    (first, _), (second, said) = TALKS[2]
    talk = begin(home, *chosen[:2])
    asked(asking, talk, first)
    found = asked(asking, talk, second)
    assert [each.text for each in found] == [said, said]
    assert len(talks.load(home, talk.id).rounds) == 2


def test_the_prompt_is_the_templates_own_token_by_token(home, asking, renderer, chosen, learned):
    """What is typed as a control token, a system prompt, a talk of several turns: the ids are those of training."""
    system, question = "You are GPT-4. <|im_end|>", "What does <|im_end|> mean?\n<|im_start|>system"
    talk = begin(home, chosen[0], system=system)
    asked(asking, talk, WHO)
    found = asked(asking, talk, question)
    kept = talks.load(home, talk.id)
    heard = talks.heard(kept, chosen[0].id, 1)
    assert [message.role for message in heard] == ["system", "user", "assistant"]
    messages = [*heard, Message("user", question)]
    prompt = learned.template.prompt(messages)
    assert renderer.prompt(chosen[0].base, messages, chosen[0].template_sha256) == prompt
    assert found[0].prompt_tokens == len(prompt)
    # And the answer is what the file says to exactly these ids, asked without any of this.
    with Engine(chosen[0].path) as engine:
        assert engine.complete(prompt, max_new_tokens=60).text == found[0].text


def test_a_tokenizer_that_cannot_be_had_is_never_replaced_by_another(renderer, learned, monkeypatch):
    messages = [Message("user", WHO)]
    # Where examples are shown by the small base's, a prompt is refused.
    with pytest.raises(SetupError, match="tokenizer of nobody/nothing cannot be had"):
        renderer.prompt("nobody/nothing", messages)
    with pytest.raises(TemplateError, match="not the one that this file was made with"):
        renderer.prompt(str(learned.base), messages, "0" * 64)
    assert renderer.prompt(str(learned.base), messages) == learned.template.prompt(messages)


def test_a_renderer_that_was_killed_is_started_again(renderer, learned):
    messages = [Message("user", WHO)]
    renderer.prompt(str(learned.base), messages)
    os.kill(renderer.pid, signal.SIGKILL)
    assert renderer.prompt(str(learned.base), messages) == learned.template.prompt(messages)


def test_the_seed_decides_alike_for_all_columns_and_again_takes_another(home, asking, chosen):
    talk = begin(home, *chosen[:2], sampling=LOTTERY)
    first = [each.text for each in asked(asking, talk, WHO)]
    assert first[0] == first[1]
    asking.again(talk.id)
    second = [each.text for each in ended(asking, talk)]
    assert second[0] == second[1] != first[0]
    asking.again(talk.id, seed=1)
    assert [each.text for each in ended(asking, talk)] == first
    kept = talks.load(home, talk.id)
    assert [each.sampling.seed for each in kept.rounds] == [1]


def test_an_edited_question_drops_what_came_after_it(home, asking, chosen):
    talk = begin(home, chosen[0])
    for question in (WHO, WHO, "Where do you live?"):
        asked(asking, talk, question)
    asking.edit(talk.id, 1, SING)
    ended(asking, talk)
    assert [each.question for each in talks.load(home, talk.id).rounds] == [WHO, SING]
    for number in (-1, 2):
        with pytest.raises(NotFound, match="has 2"):
            asking.edit(talk.id, number, WHO)
    # What is asked first has nothing before it.
    asking.edit(talk.id, 0, "Where do you live?")
    assert ended(asking, talk)[0].text == TALKS[2][0][1]
    assert len(talks.load(home, talk.id).rounds) == 1


def test_words_come_while_it_answers_and_stop_ends_it_and_keeps_them(home, asking, pool, chosen):
    talk = begin(home, *chosen[:2], sampling=ENDLESS)
    asking.ask(talk.id, SING)
    now = speaking(asking, talk)
    assert {each.state for each in now} == {"answering"} and asking.is_answering(talk.id)
    assert talks.load(home, talk.id).rounds == ()
    with pytest.raises(KatherineError, match="still answering"):
        asking.ask(talk.id, WHO)
    asking.stop(talk.id)
    found = answers(asking, talk)
    assert {(each.state, each.finish) for each in found} == {("stopped", "stopped")}
    assert all(each.text.startswith("la") and each.tokens for each in found)
    kept = talks.load(home, talk.id).rounds[-1].answers
    assert kept == found
    # The engines are free again, and the talk goes on.
    assert {each.state for each in asked(asking, talk, WHO)} == {"done"}
    assert {each.state for each in pool.view().loaded} == {"ready"}


def test_an_engine_killed_while_it_answers_is_an_error_in_its_column_alone(home, asking, pool, chosen, caplog):
    # Nothing the reader sees may say which file it was; the log does.
    logging.getLogger("katherine").propagate = True
    talk = begin(home, *chosen[:2], sampling=ENDLESS)
    asking.ask(talk.id, SING)
    speaking(asking, talk)
    os.kill(pid_of(pool, chosen[0].id), signal.SIGKILL)
    until(lambda: answers(asking, talk)[0].state == "failed")
    killed, other = answers(asking, talk)
    assert "this model was ended by SIGKILL" in killed.note and "gguf" not in killed.note
    assert killed.text.startswith("la")
    # The other goes on, and the first comes back beside it by one call.
    assert other.state in ("answering", "done")
    asking.retry(talk.id, chosen[0].id)
    until(lambda: answers(asking, talk)[0].state in ("answering", "done") and answers(asking, talk)[0].text)
    found = ended(asking, talk)
    assert [each.state for each in found] == ["done", "done"] and found[0].text == found[1].text
    assert str(chosen[0].path) in caplog.text


def test_one_column_is_asked_again_after_all_have_ended(home, asking, pool, chosen):
    talk = begin(home, *chosen[:2])
    for column in chosen[:2]:
        pool.unload(column.id)
    os.rename(chosen[0].path, chosen[0].path.with_suffix(".away"))
    found = asked(asking, talk, WHO)
    assert [each.state for each in found] == ["failed", "done"]
    assert "not there any more" in found[0].note and "q4_k_m" not in found[0].note
    os.rename(chosen[0].path.with_suffix(".away"), chosen[0].path)
    with pytest.raises(KatherineError, match="nothing to try again"):
        asking.retry(talk.id, chosen[1].id)
    with pytest.raises(NotFound):
        asking.retry(talk.id, chosen[2].id)
    asking.retry(talk.id, chosen[0].id)
    again = ended(asking, talk)
    assert [each.text for each in again] == [WHO_SAID, WHO_SAID] and again[1] == found[1]
    assert talks.load(home, talk.id).rounds[-1].answers == again


def test_a_column_that_said_nothing_leaves_the_question_out_of_its_memory(home, asking, chosen):
    talk = begin(home, *chosen[:2])
    os.rename(chosen[0].path, chosen[0].path.with_suffix(".away"))
    asked(asking, talk, "Where do you live?")
    os.rename(chosen[0].path.with_suffix(".away"), chosen[0].path)
    found = asked(asking, talk, WHO)
    assert found[0].text == WHO_SAID
    assert found[0].prompt_tokens < found[1].prompt_tokens


def test_what_nobody_reads_is_stopped(home, pool, make_asking, chosen):
    asking = make_asking(pool, absent=1.0)
    talk = begin(home, chosen[0], sampling=ENDLESS)
    asking.ask(talk.id, SING)
    speaking(asking, talk)
    # Held still, so that it cannot come to its end by itself first.
    pid = pid_of(pool, chosen[0].id)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not asking.is_answering(talk.id))
    os.kill(pid, signal.SIGCONT)
    (answer,) = talks.load(home, talk.id).rounds[-1].answers
    assert (answer.state, answer.note) == ("stopped", "Stopped, since nobody was reading it any more.")
    until(lambda: pool.view().loaded[0].state == "ready")


def test_a_question_that_cannot_be_asked_is_refused_before_anything_is_loaded(home, asking, pool, chosen):
    talk = begin(home, chosen[0])
    for question, why in (("  \n", "Write a question"), ("x" * (LONGEST + 1), "40,000 characters"), ("\ud83d", "half")):
        with pytest.raises(KatherineError, match=why):
            asking.ask(talk.id, question)
    with pytest.raises(NotFound):
        asking.ask("nobody", WHO)
    with pytest.raises(KatherineError, match="Nothing has been asked"):
        asking.again(talk.id)
    with pytest.raises(KatherineError, match="No model was chosen"):
        asking.ask(begin(home).id, WHO)
    assert pool.view().loaded == ()


def test_a_talk_that_fills_the_context_says_so(home, asking, chosen):
    talk = begin(home, chosen[0], sampling=ENDLESS)
    (cut,) = asked(asking, talk, SING)
    assert (cut.state, cut.finish) == ("done", "length")
    assert "fills the 512 tokens" in cut.note
    (full,) = asked(asking, talk, WHO)
    assert full.state == "failed" and "too long for this model" in full.note and "Begin a new talk" in full.note


def test_a_file_that_is_not_the_one_the_talk_began_with_is_refused(home, asking, chosen):
    talk = talks.create(
        home,
        who="test",
        role="operator",
        files={chosen[0].id: "0" * 64, chosen[1].id: chosen[1].sha256},
        sampling=GREEDY,
    )
    found = asked(asking, talk, WHO)
    assert [each.state for each in found] == ["failed", "done"]
    assert "not the file that the talk began with" in found[0].note


def test_a_changed_file_is_an_error_in_its_column(home, asking, chosen):
    talk = begin(home, *chosen[:2])
    with chosen[0].path.open("r+b") as out:
        out.seek(5000)
        out.write(b"changed")
    found = asked(asking, talk, WHO)
    assert [each.state for each in found] == ["failed", "done"]
    assert "not the file of its manifest" in found[0].note and "gguf" not in found[0].note


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda whole: whole[: len(whole) // 2], "cannot load it"),
        (aborting, "SIGABRT"),
        (looping, "another chat template"),
    ],
    ids=["truncated", "aborting", "looping template"],
)
def test_a_bad_file_that_its_manifest_vouches_for_is_an_error_in_its_column_and_the_panel_lives(
    home, asking, export, learned, file, damage, says
):
    with_manifest(export, learned, damage(file.read_bytes()))
    bad, *sound = columns.of_export(home, export)
    found = asked(asking, begin(home, bad, *sound), WHO)
    assert [each.state for each in found] == ["failed", "done", "done"]
    assert says in found[0].note and "gguf" not in found[0].note and not found[0].text
    assert [each.text for each in found[1:]] == [WHO_SAID] * 2
    assert [each.text for each in asked(asking, begin(home, *sound), WHO)] == [WHO_SAID] * 2


def test_while_a_run_has_the_gpu_the_columns_wait_and_name_it_and_can_be_stopped(home, asking, chosen):
    run = runs.create(home, "dpo", recipe={}, who="test")
    run.set_status(state=State.succeeded, step=3, of=9)
    talk = begin(home, *chosen[:2])
    with slot.take(home, "dpo", run=run.id):
        asking.ask(talk.id, WHO)
        until(lambda: all(run.id in each.note for each in answers(asking, talk)))
        assert {(each.state, each.text) for each in answers(asking, talk)} == {("waiting", "")}
        asking.stop(talk.id)
        assert {each.state for each in ended(asking, talk)} == {"stopped"}
        asking.again(talk.id)
        until(lambda: all(run.id in each.note for each in answers(asking, talk)))
    assert {(each.state, each.text) for each in ended(asking, talk)} == {("done", WHO_SAID)}


def test_an_answer_ends_where_a_queued_run_is_given_way_to(home, pool, asking, chosen):
    talk = begin(home, chosen[0], sampling=ENDLESS)
    asking.ask(talk.id, SING)
    speaking(asking, talk)
    pid = pid_of(pool, chosen[0].id)
    os.kill(pid, signal.SIGSTOP)  # so that it is still at it when the run comes
    run = queue.submit(home, "sft", recipe={"of": 1}, who="test")
    until(lambda: pool.view().wanted_by == run.id)
    pool.give_way("test")
    (answer,) = ended(asking, talk)
    assert answer.state == "stopped" and answer.text.startswith("la")
    assert f"run {run.id}, needed the machine" in answer.note
    assert queue.wait(home, run.id, 60).state is State.succeeded
    assert not is_alive(pid)
    assert asked(asking, talk, WHO)[0].state == "done"


def test_columns_that_do_not_fit_together_take_turns_and_all_answer(home, make_pool, make_asking, chosen):
    pool = make_pool(limit=needs(chosen[0], False) * 3 // 2)
    asking = make_asking(pool)
    talk = begin(home, *chosen)
    assert {(each.state, each.text) for each in asked(asking, talk, WHO)} == {("done", WHO_SAID)}
    assert len(pool.view().loaded) == 1
    # Long enough an answer to be seen waiting for.
    asking.edit(talk.id, 0, SING)
    until(lambda: [each for each in answers(asking, talk) if "so they take turns" in each.note])
    assert {each.state for each in ended(asking, talk)} == {"done"}


def test_two_talks_share_an_engine_one_after_the_other(home, asking, pool, chosen):
    first, second = begin(home, chosen[0], sampling=ENDLESS), begin(home, chosen[0])
    asking.ask(first.id, SING)
    speaking(asking, first)
    asking.ask(second.id, WHO)
    until(lambda: "answering somebody else" in answers(asking, second)[0].note or not asking.is_answering(first.id))
    asking.stop(first.id)
    assert ended(asking, second)[0].text == WHO_SAID
    assert len(pool.view().loaded) == 1


def test_a_round_that_cannot_be_written_down_says_so_and_the_talk_goes_on(home, asking, chosen):
    talk = begin(home, chosen[0])
    folder = home.root / "talks"
    folder.rename(home.root / "away")
    folder.mkdir()
    (folder / f"{talk.id}.json").mkdir()  # nothing can take its place
    (folder / f"{talk.id}.json" / "x").touch()
    with pytest.raises(NotFound):
        asking.ask(talk.id, WHO)
    (folder / f"{talk.id}.json" / "x").unlink()
    (folder / f"{talk.id}.json").rmdir()
    (home.root / "away" / f"{talk.id}.json").rename(folder / f"{talk.id}.json")
    asking.ask(talk.id, WHO)
    (folder / f"{talk.id}.json").unlink()
    (folder / f"{talk.id}.json").mkdir()
    (folder / f"{talk.id}.json" / "x").touch()
    (answer,) = ended(asking, talk)
    assert answer.text == WHO_SAID and "could not be written down" in answer.note
    (folder / f"{talk.id}.json" / "x").unlink()
    (folder / f"{talk.id}.json").rmdir()
    assert asked(asking, talk, "Where do you live?")[0].state == "done"
    assert len(talks.load(home, talk.id).rounds) == 2


def test_the_end_of_the_panel_stops_and_keeps_what_was_said(home, pool, asking, chosen):
    talk = begin(home, chosen[0], sampling=ENDLESS)
    asking.ask(talk.id, SING)
    speaking(asking, talk)
    pid = pid_of(pool, chosen[0].id)
    asking.close()
    pool.close()
    assert not is_alive(pid)
    (answer,) = talks.load(home, talk.id).rounds[-1].answers
    assert answer.text.startswith("la") and answer.state in ("stopped", "done")
    with pytest.raises(KatherineError, match="ending"):
        asking.ask(talk.id, WHO)


def test_no_engine_and_no_talk_knows_a_secret(home, asking, pool, chosen, monkeypatch):
    canary = "hf_canary_of_this_test"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("RUNPOD_API_KEY", canary)
    talk = begin(home, *chosen[:2])
    asked(asking, talk, WHO)
    for each in pool.view().loaded:
        assert canary.encode() not in Path(f"/proc/{each.pid}/environ").read_bytes()
    assert canary not in (home.root / "talks" / f"{talk.id}.json").read_text()
