"""The operator's tab on verdicts, as a visitor has it open: real verdicts, a real dataset, a real errand."""

import time
from collections.abc import Iterator

import gradio as gr
import pytest
from test_feedback import HOSTILE, PATIENCE, Q4, Q5, Q6, SAID, dataset, home  # noqa: F401
from verdicts import DISLIKED, Panel, asked
from visitor import Visitor

from jobs import errands
from katherine import corpus, drafts, reviews
from katherine.reviews import Mark
from katherine.runs import ENDED
from katherine.settings import Home
from ui import panel as panels
from ui import verdicts


@pytest.fixture
def panel(home: Home, dataset: str) -> Iterator[Panel]:  # noqa: F811
    yield asked(home, dataset)


@pytest.fixture
def judged(panel: Panel) -> Panel:
    panel.judge("Ann", "Who are you?", SAID, best=Q5, q6_k=Mark(-1, "A robot."), source="katherine/who")
    panel.judge("Ben", "Who are you?", SAID, best=Q5, source="katherine/who")
    panel.judge("Ben", "Tired?", SAID | {Q4: "Yes."}, none_good=True, q4_k_m=Mark(-1, rewrite="Always. You?"))
    panel.recommend("Ann", True, Q5, "Take this one.")
    return panel


def visit(home: Home) -> Visitor:  # noqa: F811
    visitor = Visitor(verdicts, panels.Panel.of(home))
    visitor.refresh()
    return visitor


def candidates(visitor: Visitor) -> list[list[str]]:
    return visitor.rows(visitor.find(column="Rejected"))


def select(visitor: Visitor, column: str, row: int) -> None:
    table = visitor.find(column=column)
    visitor.fire(table, "select", id=visitor.value(table)["ids"][row])


def made(visitor: Visitor, home: Home) -> str:  # noqa: F811
    """Waits for the errand; the dataset that came."""
    (errand,) = [each for each in errands.everyone(home) if each.kind == "prepare"]
    assert errands.wait(home, errand.id, PATIENCE).state in ENDED
    visitor.refresh()
    return errand.result()["dataset"]


def test_without_an_export_the_page_says_what_to_do(home):  # noqa: F811
    visitor = visit(home)
    assert "There is no export yet" in visitor.html()
    assert not [b for b in visitor.page.blocks.values() if isinstance(b, gr.Button) and visitor.visible(b)][1:]


def test_without_a_verdict_the_page_gives_the_reviewers_address(panel):
    visitor = visit(panel.home)
    assert 'href="/review/"' in visitor.html() and "password" in visitor.html()
    assert not visitor.visible(visitor.find(column="Recommends"))
    assert "There are none yet" in visitor.html()


def test_what_people_said_is_shown_with_the_labels_taken_off(judged):
    visitor = visit(judged.home)
    assert "3 verdicts by 2 people. 1 of 1 who recommend say that it is good to go." in visitor.html()
    people = visitor.rows(visitor.find(column="Questions of"))
    assert people[0][:5] == ["Ann", "1", "katherine: 1", "good to go, with q5_k_m", "Take this one."]
    assert people[1][:4] == ["Ben", "2", "katherine: 1, their own: 1", "not yet said"]
    html = visitor.html()
    assert "<b>q5_k_m</b>" in html and "2 of 2" in html and "1 time none was good" in html
    assert "they said the same in 1 of 1 (100%)" in html and "shown first was preferred" in html
    assert [row[2] for row in visitor.rows(visitor.find(column="When"))] == ["Take this one.", "A robot."]


def test_the_worst_answer_comes_first_and_its_conversation_is_a_click_away(judged):
    visitor = visit(judged.home)
    worst = visitor.rows(visitor.find(column="Rules broken"))
    assert worst[0][:5] == ["q4_k_m", "1", "1", "Tired?", "Yes."]
    assert worst[1][0] == "q6_k" and worst[1][6] == "A robot."
    select(visitor, "Rules broken", 1)
    html = visitor.html()
    assert "As an AI, I have no name." in html and "Katherine. And you?" in html and "katherine/who" in html
    assert "q5_k_m · preferred" in html and "q6_k · disliked" in html


def test_pairs_are_looked_over_left_out_and_reworded_and_that_lasts(judged):
    visitor = visit(judged.home)
    rows = candidates(visitor)
    assert sorted(row[4] for row in rows) == ["preferred", "preferred to a disliked one", "rewritten"]
    assert visitor.button("Make the new dataset with 3 pairs")
    robot = next(n for n, row in enumerate(rows) if "disliked" in row[4])
    select(visitor, "Rejected", robot)
    assert "q5_k_m against q6_k" in visitor.html() and "notes: A robot." in visitor.html()
    words = visitor.find(label="Chosen answer, as it goes in")
    assert visitor.value(words) == SAID[Q5]
    visitor.choose(words, "Katherine. Who's asking?", "blur")
    visitor.fire(visitor.button("Leave it out"), "click")
    again = visit(judged.home)
    row = next(row for row in candidates(again) if row[2] == "Katherine. Who's asking?")
    assert row[0] == "out" and row[6] == "reworded"
    assert again.button("Make the new dataset with 2 pairs")
    select(again, "Rejected", robot)
    again.fire(again.button("As it was given"), "click")
    assert candidates(again)[robot][2] == SAID[Q5]
    again.fire(again.button("All in"), "click")
    assert again.button("Make the new dataset with 3 pairs")
    again.fire(again.button("All out"), "click")
    assert {row[0] for row in candidates(again)} == {"out"}


def test_words_that_cannot_be_learned_are_refused_in_words(judged):
    visitor = visit(judged.home)
    select(visitor, "Rejected", 0)
    with pytest.raises(gr.Error, match="thoughts are never learned"):
        visitor.choose(visitor.find(label="Chosen answer, as it goes in"), "<think>x</think> Me.", "blur")


def test_people_who_disagree_are_pointed_out(panel):
    panel.judge("Ann", "Who?", SAID, best=Q5, q4_k_m=DISLIKED)
    panel.judge("Ben", "Who?", SAID, best=Q4, q5_k_m=DISLIKED)
    visitor = visit(panel.home)
    assert "2 say the opposite of each other" in visitor.html()
    assert [row[0] for row in candidates(visitor)] == ["out", "out"]
    visitor.fire(visitor.button("All in"), "click")
    assert [row[0] for row in candidates(visitor)] == ["out", "out"]
    select(visitor, "Rejected", 0)
    assert "Ann said the opposite." in visitor.html() or "Ben said the opposite." in visitor.html()


def test_the_new_dataset_is_made_shown_after_a_reload_and_used_for_the_next_run(judged, dataset):  # noqa: F811
    visitor = visit(judged.home)
    assert visitor.value(visitor.find(label="Add to the pairs of")) == dataset
    visitor.shows[visitor.find(label="Name of the new dataset")._id]["value"] = "round-2"
    select(visitor, "Rejected", 0)
    visitor.shows[visitor.find(label="Chosen answer, as it goes in")._id]["value"] = (
        "Changed without leaving the field."
    )
    visitor.fire(visitor.button("Make the new dataset"), "click")
    name = made(visitor, judged.home)
    assert name.startswith("round-2-")
    chosen = {pair.chosen[0].content for pair in corpus.preferences(judged.home.datasets / name)}
    assert "Changed without leaving the field." in chosen and len(chosen) == len(set(chosen))
    again = visit(judged.home)
    assert f"<b>{name}</b>: 3 pairs added" in again.html()
    again.fire(again.button("Use it for the next run"), "click")
    assert drafts.load(judged.home).dataset == name
    assert "The next run uses it" in again.html()
    again.choose(again.find(label="Add to the pairs of"), name, "input")
    assert {row[0] for row in candidates(again)} == {"out"}
    assert all(f"in {name}" in row[6] for row in candidates(again))


def test_nothing_is_sent_again_while_nothing_changes(judged):
    assert visit(judged.home).refresh() == set()


def test_verdicts_on_other_exports_can_be_taken_too(judged, dataset):  # noqa: F811
    time.sleep(1.1)  # a run's place in the list is told by its second
    other = asked(judged.home, dataset)
    other.judge("Cleo", "Other?", SAID, best=Q4, q6_k=DISLIKED)
    visitor = visit(judged.home)
    assert [row[1] for row in candidates(visitor)] == ["Other?"]
    visitor.choose(visitor.find(label="Verdicts on"), verdicts.ALL, "input")
    assert len(candidates(visitor)) == 4
    visitor.choose(visitor.find(label="Verdicts on"), verdicts.THIS, "input")
    visitor.choose(visitor.find(label="Export"), judged.export, "input")
    assert len(candidates(visitor)) == 3


def test_text_from_people_and_models_stays_text(panel):
    said = dict.fromkeys(SAID, HOSTILE) | {Q5: f"Better. {HOSTILE}"}
    panel.judge("<b>Eve</b>", HOSTILE, said, best=Q5, q6_k=Mark(-1, HOSTILE, f"Rewritten. {HOSTILE}"))
    panel.recommend("<b>Eve</b>", False, note=HOSTILE)
    visitor = visit(panel.home)
    select(visitor, "Rules broken", 0)
    for row in range(len(candidates(visitor))):
        select(visitor, "Rejected", row)
        assert "<img" not in visitor.html() and "<b>Eve" not in visitor.html()
    assert visitor.html().count("&lt;img") >= 5
    assert any(HOSTILE in row[2] for row in candidates(visitor))


def test_made_up_ids_are_refused(judged):
    visitor = visit(judged.home)
    with pytest.raises(gr.Error, match="not there any more"):
        visitor.fire(visitor.find(column="Rejected"), "select", id="../../etc")
    visitor.fire(visitor.find(column="Rules broken"), "select", id="../../etc")
    visitor.choose(visitor.find(label="Export"), "../../etc", "input")
    visitor.choose(visitor.find(label="Add to the pairs of"), "../../etc", "input")
    assert len(candidates(visitor)) == 3
    with pytest.raises(gr.Error, match="There is no dataset"):
        visitor.fire(visitor.button("Make the new dataset"), "click")
    assert errands.everyone(judged.home) == []


def test_damaged_decisions_are_a_message_and_not_a_bug(judged):
    (judged.home.root / "feedback").mkdir()
    (judged.home.root / "feedback" / "decisions.json").write_text("[")
    with pytest.raises(gr.Error, match=r"decisions\.json is damaged"):
        visit(judged.home)
    assert reviews.verdicts(judged.home, judged.export)


def test_a_page_that_was_not_told_yet_keeps_its_field_while_others_judge(judged):
    visitor = visit(judged.home)
    select(visitor, "Rejected", 0)
    field = visitor.find(label="Chosen answer, as it goes in")
    visitor.shows[field._id]["value"] = "half a word"
    judged.judge("Cleo", "New?", SAID, best=Q4)
    assert field not in visitor.refresh()
    assert visitor.value(field) == "half a word"
