"""Verdicts become preference pairs, and these another dataset: through the reader, the errand and the template that
training uses."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from verdicts import DISLIKED, LIKED, Panel, asked

from jobs import errands
from jobs.commands import verdicts as words
from katherine import bases, corpus, feedback, shelf, talks
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.reviews import Mark
from katherine.runs import State
from katherine.settings import Home
from katherine.template import ChatTemplate

# Ten times what preparing a few lines takes on two busy cores.
PATIENCE = 60.0
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} <|im_end|>"
Q4, Q5, Q6 = "q4_k_m", "q5_k_m", "q6_k"
SAID = {Q4: "I'm Katherine.", Q5: "Katherine. And you?", Q6: "As an AI, I have no name."}


@pytest.fixture
def home(tmp_path: Path, katherine_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    made.root.mkdir()
    if katherine_home.cache.exists():
        made.cache.symlink_to(katherine_home.cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield made
    for errand in errands.under_way(made):
        errands.stop(made, errand.id)
        errands.wait(made, errand.id, PATIENCE)


@pytest.fixture
def dataset(home: Home, tmp_path: Path) -> str:
    """One conversation, one curated pair, one uncurated one that is in use, and a file that is left out."""
    folder = tmp_path / "files"
    folder.mkdir()

    def turns(*said: str) -> list[dict[str, str]]:
        return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(said)]

    def pair(asked: str, chosen: str, rejected: str, **tags: str) -> dict:
        sides = {"chosen": turns("", chosen)[1:], "rejected": turns("", rejected)[1:]}
        return {"prompt": turns(asked)} | sides | tags

    lines = {
        "talk.jsonl": [{"messages": turns("Where do you live?", "Austin, east side.")}],
        "old.jsonl": [{"messages": turns("Old?", "Very.")}],
        "pairs.jsonl": [
            pair("Tea?", "Coffee.", "As an AI, I do not drink.", _cat="self", _type="denial"),
            pair("Late?", "Always.", "I have no schedule."),
            pair("Early?", "Never.", "I have no clock."),
        ],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = corpus.prepare([folder], home, leave_out=["old.jsonl"], max_length=256, name="talks")
    chosen = next(p.id for p in shelf.uncurated(home, first.id, 9) or [] if p.prompt == "Late?")
    made = corpus.prepare(
        [folder], home, leave_out=["old.jsonl"], include_uncurated=[chosen], max_length=256, name="persona"
    )
    return made.id


@pytest.fixture
def panel(home: Home, dataset: str) -> Panel:
    return asked(home, dataset)


def texts(found: list[feedback.Candidate]) -> set[tuple[str, str, str]]:
    return {(one.how, one.chosen, one.rejected) for one in found}


def pairs(panel: Panel) -> list[feedback.Candidate]:
    return list(feedback.survey(panel.home, [panel.export]).pairs)


def left(panel: Panel) -> dict[str, int]:
    return feedback.survey(panel.home, [panel.export]).left_out


# ------------------------------------------------------------------------------------------------- what makes a pair


def test_a_preferred_answer_is_chosen_over_those_that_were_disliked(panel):
    verdict = panel.judge("Ann", "Who are you?", SAID, best=Q5, q6_k=Mark(-1, "A robot."), source="katherine/who")
    (one,) = pairs(panel)
    assert texts([one]) == {("disliked", SAID[Q5], SAID[Q6])}
    assert one.pair.prompt == (Message("user", "Who are you?"),)
    assert one.pair.curated and (one.pair.category, one.pair.type) == ("review", "preference")
    (origin,) = one.origins
    assert (origin.export, origin.verdict, origin.reviewer, origin.source) == (
        panel.export, verdict.id, "Ann", "katherine/who",
    )  # fmt: skip
    assert (origin.chosen, origin.rejected, origin.note, origin.time) == (Q5, Q6, "A robot.", verdict.time)
    assert left(panel) == {"neither preferred nor disliked, while others were disliked": 1}


def test_with_a_preference_alone_the_others_are_rejected_but_not_those_that_were_liked(panel):
    panel.judge("Ann", "Who are you?", SAID, best=Q5, q4_k_m=LIKED)
    assert texts(pairs(panel)) == {("preferred", SAID[Q5], SAID[Q6])}
    assert left(panel) == {"not the preferred one, but liked as well": 1}


def test_a_liked_answer_is_chosen_over_a_disliked_one_where_none_was_preferred(panel):
    panel.judge("Ann", "Who are you?", SAID, q4_k_m=LIKED, q6_k=DISLIKED)
    assert texts(pairs(panel)) == {("liked", SAID[Q4], SAID[Q6])}


def test_a_tie_and_a_disliked_favourite_give_no_pair(panel):
    panel.judge("Ann", "Who are you?", SAID, tie=True, q6_k=DISLIKED)
    panel.judge("Ann", "Who is it?", SAID, best=Q6, q6_k=DISLIKED)
    assert pairs(panel) == []
    assert left(panel) == {"said to be as good as the others": 3, "preferred, but disliked as well": 1}


def test_a_rewrite_is_chosen_over_the_answer_it_replaces(panel):
    panel.judge("Ann", "Who are you?", SAID, none_good=True, q6_k=Mark(-1, rewrite="  Katherine. Who's asking? "))
    panel.judge("Ann", "Who?", SAID, q4_k_m=Mark(1, rewrite="Me."))
    (one,) = pairs(panel)
    assert texts([one]) == {("rewrite", "Katherine. Who's asking?", SAID[Q6])}
    assert one.pair.type == "rewrite" and one.origins[0].chosen == ""
    assert left(panel) == {"rewritten, but liked as it is": 1}


def test_later_rounds_pair_only_where_all_was_the_same_before_and_a_rewrite_takes_what_its_quant_heard(panel):
    talk = panel.talk(
        "Ann",
        [("Hi", {Q4: "Hey.", Q5: "Hey.", Q6: "Hello!"}), ("Who are you?", SAID)],
    )
    panel.judge_round(talk, 1, "Ann", best=Q4, q5_k_m=DISLIKED, q6_k=Mark(-1, rewrite="Katherine, still."))
    found = {one.how: one for one in pairs(panel)}
    assert set(found) == {"disliked", "rewrite"}
    assert [turn.content for turn in found["disliked"].pair.prompt] == ["Hi", "Hey.", "Who are you?"]
    assert [turn.content for turn in found["rewrite"].pair.prompt] == ["Hi", "Hello!", "Who are you?"]
    (reason,) = left(panel)
    assert "not two answers to the same conversation" in reason


def test_what_was_asked_under_a_system_prompt_is_left_out(panel):
    panel.judge("Ann", "Who?", SAID, best=Q4, system="You are a pirate.", q6_k=Mark(-1, rewrite="Arr."))
    assert pairs(panel) == []
    assert left(panel) == {"asked under a system prompt, which training never has": 1}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("<think>hm</think> Me.", "thoughts are never learned"),
        ("\u200b", "has no text"),
        ("I'm Katherine. ", "the same words"),
    ],
)
def test_what_no_dataset_may_hold_is_left_out_with_the_reason(panel, chosen, reason):
    panel.judge("Ann", "Who?", SAID | {Q5: chosen}, best=Q5, q4_k_m=DISLIKED)
    assert pairs(panel) == []
    assert any(reason in each for each in left(panel)), left(panel)


def test_an_answer_that_was_cut_is_rejected_but_never_chosen(panel):
    panel.judge("Ann", "Who?", SAID, best=Q5, q6_k=DISLIKED, cut=[Q5, Q6])
    panel.judge("Ann", "Who is it?", SAID, best=Q4, q6_k=DISLIKED, cut=[Q6])
    assert [(one.question, one.rejected) for one in pairs(panel)] == [("Who is it?", SAID[Q6])]
    assert any("cut off" in reason for reason in left(panel))


def test_an_answer_is_never_chosen_whose_rest_was_not_shown_beside_a_stopped_one(panel):
    talk = panel.talk("Ann", [("Who?", SAID)])
    panel.judge_round(talk, 0, "Ann", best=Q5, q6_k=DISLIKED)
    assert [one.chosen for one in pairs(panel)] == [SAID[Q5]]
    # The round as it would have been had it been stopped while the last one spoke: shorter than the preferred one.
    asked = talk.rounds[0]
    for text, chosen in ((SAID[Q6][:5], []), (SAID[Q6], [SAID[Q5]])):
        answers = tuple(
            msgspec.structs.replace(each, state="stopped", text=text) if each.text == SAID[Q6] else each
            for each in asked.answers
        )
        talks.save(panel.home, msgspec.structs.replace(talk, rounds=(msgspec.structs.replace(asked, answers=answers),)))
        assert [one.chosen for one in pairs(panel)] == chosen


def test_two_people_who_say_the_same_are_one_pair_with_both_named(panel):
    for who in ("Ann", "Ben"):
        panel.judge(who, "Who?", SAID, best=Q5, q6_k=DISLIKED)
    (one,) = pairs(panel)
    assert one.people == ("Ann", "Ben") and len(one.origins) == 2


def test_people_who_say_the_opposite_are_shown_and_neither_goes_in_by_itself(panel):
    panel.judge("Ann", "Who?", SAID, best=Q5, q4_k_m=DISLIKED)
    panel.judge("Ben", "Who?", SAID, best=Q4, q5_k_m=DISLIKED)
    a, b = pairs(panel)
    assert (a.opposed, b.opposed) == (b.id, a.id) and not a.included and not b.included
    feedback.include(panel.home, [a.id, b.id], True)
    with pytest.raises(DataError, match="say the opposite of each other"):
        feedback.write(panel.home, [one for one in pairs(panel) if one.included])
    feedback.include(panel.home, [b.id], False)
    assert [one.id for one in pairs(panel) if one.included] == [a.id]


# ------------------------------------------------------------------------------------------------- what was decided


def test_what_was_decided_lasts_and_other_words_replace_those_given(panel):
    panel.judge("Ann", "Who?", SAID, best=Q5, q6_k=DISLIKED)
    (one,) = pairs(panel)
    feedback.include(panel.home, [one.id], False)
    feedback.reword(panel.home, one, f"Katherine. {HOSTILE}")
    (changed,) = pairs(panel)
    assert (changed.id, changed.included, changed.given) == (one.id, False, SAID[Q5])
    assert changed.chosen == f"Katherine. {HOSTILE}" and changed.pair.curated
    feedback.reword(panel.home, changed, SAID[Q5])
    assert (pairs(panel)[0].chosen, pairs(panel)[0].given) == (SAID[Q5], "")


@pytest.mark.parametrize("text", ["<think>no</think> Me.", SAID[Q6], "x" * 9_000, "a \ud800 half"])
def test_words_that_cannot_be_learned_are_refused(panel, text):
    panel.judge("Ann", "Who?", SAID, best=Q5, q6_k=DISLIKED)
    (one,) = pairs(panel)
    with pytest.raises(DataError):
        feedback.reword(panel.home, one, text)
    assert pairs(panel) == [one]


def test_damaged_decisions_are_named(panel):
    panel.judge("Ann", "Who?", SAID, best=Q5)
    (panel.home.root / "feedback").mkdir()
    (panel.home.root / "feedback" / "decisions.json").write_text("{")
    with pytest.raises(DataError, match=r"decisions\.json is damaged"):
        pairs(panel)


# ------------------------------------------------------------------------------------------------ into a new dataset


def carried_out(home: Home, dataset: str, file: Path, name: str = "") -> str:
    errand = errands.start(home, "prepare", feedback.request(home, dataset, file, name), "test")
    status = errands.wait(home, errand.id, PATIENCE)
    assert status.state is State.succeeded, (status, errand.log.read_text())
    return errand.result()["dataset"]


def content(home: Home, dataset: str) -> set[tuple[str, str, str]]:
    found = corpus.preferences(home.datasets / dataset)
    return {(one.prompt[-1].content, one.chosen[0].content, one.rejected[0].content) for one in found}


@pytest.fixture
def judged(panel: Panel) -> Panel:
    panel.judge("Ann", "Who are you?", SAID, best=Q5, q6_k=DISLIKED)
    panel.judge("Ben", "Your city?", {Q4: "Austin.", Q5: "I am a model.", Q6: "Texas."},
                q5_k_m=Mark(-1, HOSTILE, f"Austin, east side. {HOSTILE}"))  # fmt: skip
    return panel


def test_the_new_dataset_holds_exactly_the_chosen_pairs_beside_the_old_ones(judged, dataset):
    home = judged.home
    before = {path: path.read_bytes() for path in (home.datasets / dataset).rglob("*") if path.is_file()}
    assert feedback.own_dataset(home, judged.export) == dataset
    chosen = pairs(judged)
    made = carried_out(home, dataset, feedback.write(home, chosen))
    assert made.startswith("persona-reviewed-")
    assert content(home, made) == content(home, dataset) | {
        ("Who are you?", SAID[Q5], SAID[Q6]),
        ("Your city?", f"Austin, east side. {HOSTILE}", "I am a model."),
    }
    assert len(corpus.preferences(home.datasets / made)) == 4
    report, old = shelf.summary(home, made).report, shelf.summary(home, dataset).report
    assert report["sft"] == old["sft"]
    assert {name: report["options"][name] for name in ("include_uncurated", "left_out", "max_length")} == {
        name: old["options"][name] for name in ("include_uncurated", "left_out", "max_length")
    }
    assert report["problem_groups"] == old["problem_groups"]
    assert before == {path: path.read_bytes() for path in (home.datasets / dataset).rglob("*") if path.is_file()}
    (file,) = [entry for entry in report["by_file"] if entry["file"].startswith("feedback-")]
    assert feedback.came_of(home, made, file["file"]) == "2 pairs added; 4 pairs and 1 example in all"


def test_the_dataset_keeps_where_each_pair_came_from(judged, dataset):
    file = feedback.write(judged.home, pairs(judged))
    made = carried_out(judged.home, dataset, file, "round-2")
    assert made.startswith("round-2-")
    rows = [json.loads(line) for line in (judged.home.datasets / made / "raw" / file.name).read_text().splitlines()]
    assert {row["_type"] for row in rows} == {"preference", "rewrite"}
    assert {origin["reviewer"] for row in rows for origin in row["_from"]} == {"Ann", "Ben"}
    assert {origin["export"] for row in rows for origin in row["_from"]} == {judged.export}


def test_trainings_template_renders_the_new_pairs(judged, dataset):
    made = carried_out(judged.home, dataset, feedback.write(judged.home, pairs(judged)))
    template = ChatTemplate.load(bases.tokenizer(judged.home, bases.SMALL))
    reviewed = [p for p in corpus.preferences(judged.home.datasets / made) if p.category == "review"]
    assert len(reviewed) == 2
    for pair in reviewed:
        rendered = template.pair(pair)
        ends = template.end_of_turn_id
        assert rendered.chosen.count(ends) == rendered.rejected.count(ends) == 1 and rendered.chosen[-1] == ends
        assert template.tokenizer.decode(rendered.chosen[:-1]) == pair.chosen[0].content
        assert rendered.prompt == template.prompt(pair.prompt)


def test_a_pair_that_a_dataset_has_is_known_there_and_does_not_go_in_twice(judged, dataset):
    home = judged.home
    file = feedback.write(home, pairs(judged))
    made = carried_out(home, dataset, file)
    for one in feedback.survey(home, [judged.export], made).pairs:
        assert one.datasets == (made,) and not one.included
    assert all(one.included for one in feedback.survey(home, [judged.export], dataset).pairs)
    with pytest.raises(DataError, match="exactly these pairs"):
        feedback.request(home, made, file)
    judged.judge("Cleo", "Tea?", {Q4: "Coffee.", Q5: "Water.", Q6: "As an AI, I do not drink."},
                 best=Q4, q6_k=DISLIKED)  # fmt: skip
    new = [one for one in feedback.survey(home, [judged.export], made).pairs if one.included]
    assert [one.question for one in new] == ["Tea?"]
    second = carried_out(home, made, feedback.write(home, new))
    assert second.startswith("persona-reviewed-") and content(home, second) == content(home, made)


def test_an_edited_pair_is_known_by_the_one_it_was_made_of(judged, dataset):
    one = next(one for one in pairs(judged) if one.how == "disliked")
    feedback.reword(judged.home, one, "Katherine!")
    made = carried_out(judged.home, dataset, feedback.write(judged.home, [p for p in pairs(judged) if p.id == one.id]))
    assert ("Who are you?", "Katherine!", SAID[Q6]) in content(judged.home, made)
    assert {p.id for p in feedback.survey(judged.home, [judged.export], made).pairs if p.datasets} == {one.id}


def test_a_pair_against_a_curated_one_is_told_and_not_counted_as_used(panel, dataset):
    said = {Q4: "Coffee.", Q5: "Water.", Q6: "As an AI, I do not drink."}
    panel.judge("Ann", "Tea?", said, best=Q6, q4_k_m=DISLIKED)
    panel.judge("Ann", "Who?", SAID, best=Q5, q6_k=DISLIKED)
    file = feedback.write(panel.home, pairs(panel))
    made = carried_out(panel.home, dataset, file)
    assert feedback.came_of(panel.home, made, file.name).startswith("1 pair added, 1 left out")
    used = {one.question: one.datasets for one in feedback.survey(panel.home, [panel.export], dataset).pairs}
    assert used == {"Tea?": (), "Who?": (made,)}


def test_the_same_choice_gives_the_same_file_and_the_same_dataset(judged, dataset):
    first, second = (feedback.write(judged.home, pairs(judged)) for _ in range(2))
    assert first == second
    assert carried_out(judged.home, dataset, first) == carried_out(judged.home, dataset, second)


def test_nothing_chosen_is_refused(panel):
    with pytest.raises(DataError, match="nothing to add"):
        feedback.write(panel.home, [])


def test_an_export_whose_dataset_is_gone_has_none_to_extend(home):
    assert feedback.own_dataset(home, asked(home, "gone-12345678").export) == ""
    with pytest.raises(NotFound):
        feedback.own_dataset(home, "nothing")


def test_an_added_file_may_not_take_the_name_of_one_that_is_there(home, dataset, tmp_path):
    other = tmp_path / "talk.jsonl"
    other.write_text("{}\n")
    with pytest.raises(DataError, match=r"has a file of this name already: talk\.jsonl"):
        corpus.change(home, dataset, also=[other])


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def app(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("KATHERINE_HOME", str(home.root))

    def call(*given: str) -> str:
        top = argparse.ArgumentParser()
        words.register(top.add_subparsers())
        options = top.parse_args(given)
        options.action(options)
        return capsys.readouterr().out

    return call


def test_the_command_line_says_what_verdicts_amount_to(judged, app):
    judged.recommend("Ann", False, note="Not yet.")
    out = app("verdicts", judged.export, "--all")
    assert "no clear difference yet: 1 of 1" in out and "not yet" in out and "I am a model." in out
    assert "shown first was preferred" in out and HOSTILE in out
    with pytest.raises(NotFound):
        app("verdicts", "nothing")


def test_the_command_line_lists_pairs_and_makes_the_next_dataset(judged, app, dataset):
    listed = app("feedback", judged.export)
    left_out = next(one for one in pairs(judged) if one.how == "rewrite")
    assert left_out.id[:10] in listed and "preferred" not in listed.splitlines()[0]
    made = app("feedback", judged.export, "--onto", dataset, "--leave-out", left_out.id[:10], "--name", "next").strip()
    assert made.startswith("next-")
    assert content(judged.home, made) == content(judged.home, dataset) | {("Who are you?", SAID[Q5], SAID[Q6])}
    with pytest.raises(NotFound, match="There is no pair"):
        app("feedback", judged.export, "--leave-out", "ffffffffffffffffffff")
