"""What verdicts amount to, against values worked out by hand or published."""

import math

import msgspec
import pytest
from verdicts import DISLIKED, LIKED, Panel, asked

from katherine import judgement, probes, reviews, runs
from katherine.examples import Message
from katherine.reviews import Mark
from katherine.settings import Home

Q4, Q5, Q6 = "q4_k_m", "q5_k_m", "q6_k"
SAID = {Q4: "I'm Katherine.", Q5: "Katherine. And you?", Q6: "As an AI, I have no name."}


@pytest.fixture
def panel(tmp_path) -> Panel:
    return asked(Home(tmp_path / "home"))


def by_quant(panel: Panel) -> dict[str, judgement.Standing]:
    return {one.quant: one for one in judgement.standings(panel.verdicts())}


def test_preferences_ties_and_thumbs_are_counted_by_quant(panel):
    panel.judge("Ann", "Who are you?", SAID, best=Q5, q6_k=DISLIKED)
    panel.judge("Ann", "Your name?", SAID, best=Q5, q5_k_m=LIKED)
    panel.judge("Ben", "Who is it?", SAID, best=Q4)
    panel.judge("Ben", "Hello?", SAID, tie=True)
    panel.judge("Ben", "Hey?", SAID, none_good=True, q4_k_m=Mark(-1, rewrite="Katherine, hi."))
    found = by_quant(panel)
    assert [(one.preferred, one.compared) for one in found.values()] == [(2, 3), (1, 3), (0, 3)]
    assert list(found) == [Q5, Q4, Q6]
    assert {(one.shown, one.ties, one.none_good) for one in found.values()} == {(5, 1, 1)}
    assert (found[Q6].down, found[Q5].up, found[Q4].down, found[Q4].rewritten) == (1, 1, 1, 1)
    assert all(one.expected == pytest.approx(1.0) for one in found.values())
    # Wilson's interval of 2 in 3 as Newcombe's method 3 gives it.
    assert (round(found[Q5].low, 3), round(found[Q5].high, 3)) == (0.208, 0.939)
    assert found[Q5].words().startswith("no clear difference yet: 2 of 3")


def test_a_quant_that_wins_more_often_than_by_chance_is_said_to(panel):
    for number in range(12):
        panel.judge("Ann", f"Who {number}?", SAID, best=Q5 if number < 10 else Q4)
    found = by_quant(panel)
    assert (found[Q5].leans, found[Q4].leans, found[Q6].leans) == (1, 0, -1)
    assert "preferred more often than by chance: 10 of 12" in found[Q5].words()
    assert "chance alone would give 33%" in found[Q5].words()


def test_quants_that_said_the_same_words_share_a_preference(panel):
    panel.judge("Ann", "Who?", SAID | {Q4: "Katherine.", Q5: "Katherine. "}, best=Q4)
    found = by_quant(panel)
    assert (found[Q4].preferred, found[Q5].preferred, found[Q6].preferred) == (1, 1, 0)
    assert (found[Q4].expected, found[Q6].expected) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    panel.judge("Ann", "You?", dict.fromkeys(SAID, "Me."), best=Q4)
    assert by_quant(panel)[Q4].compared == 1


def test_a_quant_that_was_never_compared_says_so(panel):
    panel.judge("Ann", "Who?", SAID, q4_k_m=LIKED)
    assert {one.words() for one in judgement.standings(panel.verdicts())} == {"not compared yet"}
    assert judgement.of([]).standings == ()


@pytest.mark.parametrize(("firsts", "leans"), [(4, 0), (11, 1), (0, -1)])
def test_a_preference_for_the_first_place_shows(panel, firsts, leans):
    orders = [(Q4, Q5, Q6), (Q5, Q6, Q4), (Q6, Q4, Q5)]
    for number in range(12):
        order = orders[number % 3]
        panel.judge("Ann", f"Who {number}?", SAID, order=order, best=order[0 if number < firsts else 1])
    found = judgement.position(panel.verdicts())
    assert found.places == (firsts, 12 - firsts, 0)
    assert (found.decided, found.expected, found.leans) == (12, pytest.approx(4.0), leans)
    assert ("No sign that the order decides" in found.words()) == (leans == 0)
    assert {one.first for one in judgement.standings(panel.verdicts())} == {4}


def test_without_a_preference_nothing_is_said_about_places(panel):
    panel.judge("Ann", "Who?", SAID, tie=True)
    assert judgement.position(panel.verdicts()).words().startswith("Nothing was preferred yet")


def test_alpha_is_the_published_one():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: 4 observers, 12 units, 0.743.
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[unit] for row in observers if row[unit] != "."] for unit in range(12)]
    assert judgement.alpha(units) == pytest.approx(0.743, abs=0.0005)


def test_alpha_is_one_for_agreement_and_about_zero_for_chance():
    assert judgement.alpha([["a", "a"], ["b", "b"]]) == 1.0
    assert judgement.alpha([["a", "a"], ["a", "a"]]) is None
    assert judgement.alpha([["a"], ["b"]]) is None
    every = [[a, b] for a in "abc" for b in "abc"] * 50
    assert math.isclose(judgement.alpha(every) or 9, 0.0, abs_tol=0.01)


def test_agreement_counts_people_on_the_same_question_of_the_same_set(panel):
    for number in range(10):
        source = f"katherine/p{number}"
        panel.judge("Ann", f"Who {number}?", SAID, source=source, best=Q5)
        panel.judge("Ben", f"Who {number}?", SAID, source=source, best=Q5 if number < 7 else Q4)
    panel.judge("Cleo", "Who 0?", SAID | {Q4: "Other words."}, source="katherine/p0", tie=True)
    panel.judge("Ann", "A free one", SAID, best=Q4)
    panel.judge("Ben", "A free one", SAID, best=Q5)
    found = judgement.agreement(panel.verdicts())
    assert (found.questions, found.people, found.comparisons, found.agreed) == (10, 3, 12, 7)
    assert found.same_answers == 9
    assert found.alpha is not None and found.alpha < judgement.TENTATIVE
    assert "Compared two by two, they said the same in 7 of 12 (58%)" in found.words()
    assert "do not rest on one person's verdict" in found.words()


def test_few_shared_questions_give_no_alpha_and_say_why(panel):
    for who in ("Ann", "Ben"):
        panel.judge(who, "Who?", SAID, source="katherine/who", best=Q5)
    found = judgement.agreement(panel.verdicts())
    assert (found.questions, found.agreed, found.alpha) == (1, 1, None)
    assert "Too few to tell agreement from chance" in found.words()
    assert "judged by two people yet" in judgement.agreement([]).words()


def test_one_person_in_two_talks_counts_once_with_what_they_said_last(panel):
    panel.judge("Ann", "Who?", SAID, source="katherine/who", best=Q4)
    panel.judge("ann", "Who?", SAID, source="katherine/who", best=Q5)
    panel.judge("Ben", "Who?", SAID, source="katherine/who", best=Q5)
    found = judgement.agreement(panel.verdicts())
    assert (found.people, found.comparisons, found.agreed) == (2, 1, 1)


def test_worst_answers_come_first_and_gather_what_everyone_said_of_them(panel):
    panel.judge("Ann", "Who?", SAID, q6_k=Mark(-1, "Breaks character.", "Katherine. Who's asking?"))
    panel.judge("Ben", "Who?", SAID, q6_k=Mark(-1, "A robot!"), q4_k_m=DISLIKED)
    panel.judge("Cleo", "Who?", SAID, q4_k_m=LIKED)
    panel.judge("Cleo", "Hungry?", {Q4: "No.", Q5: "Nope.", Q6: "Never."}, none_good=True)
    found = judgement.worst(panel.verdicts())
    assert found[0].judged.quant == Q6 and found[0].judged.text == SAID[Q6]
    assert found[0].down == ("Ann", "Ben") and found[0].rewrites == (("Ann", "Katherine. Who's asking?"),)
    assert [note.text for note in found[0].notes] == ["Breaks character.", "A robot!"]
    assert {bad.judged.text for bad in found[1:4]} == {"No.", "Nope.", "Never."}
    # One liked, one disliked: on balance no worse than answers that nobody found good, and yet in the list.
    assert found[-1].judged.text == SAID[Q4] and (found[-1].down, found[-1].up) == (("Ben",), ("Cleo",))
    assert len({bad.id for bad in found}) == 5


def test_an_answer_that_breaks_its_probes_rules_is_listed_though_nobody_minded(panel):
    panel.judge("Ann", "Who?", SAID, source="katherine/who", best=Q5)
    found = judgement.worst(panel.verdicts(), lambda verdict, judged: ("says AI",) if "AI" in judged.text else ())
    assert [(bad.judged.quant, bad.broken) for bad in found] == [(Q6, ("says AI",))]


def test_rules_are_those_that_a_probe_run_on_this_export_found_broken_in_the_very_same_words(panel):
    def answer(model: str, text: str, passed: bool) -> probes.Answer:
        score = probes.Score(passed, () if passed else ("says 'AI'",))
        return probes.Answer(model, "who", "identity", (Message("user", "Who?"), Message("assistant", text)), score)

    rows = [answer(Q6, SAID[Q6], False), answer(Q5, SAID[Q5], True), answer(Q4, "As an AI, no.", False)]
    for parent in (panel.export, "another"):
        run = runs.create(panel.home, "probe", recipe={}, who="test", parent=parent)
        lines = rows if parent == panel.export else [answer(Q5, SAID[Q5], False)]
        (run.out / probes.ANSWERS).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in lines))
    panel.judge("Ann", "Who?", SAID, best=Q5)
    found = judgement.of_export(panel.home, panel.export, runs.everyone(panel.home))
    assert [(bad.judged.quant, bad.broken) for bad in found.worst] == [(Q6, ("says 'AI'",))]


def test_notes_and_progress_are_told_by_person(panel):
    panel.judge("Ann", "Who?", SAID, source="katherine/who", q4_k_m=Mark(0, "Lovely."))
    panel.judge("Ann", "Who?", SAID, source="katherine/who")
    panel.judge("ann", "City?", SAID, source="katherine/city", best=Q4)
    panel.judge("Ben", "Free?", SAID, best=Q4)
    panel.recommend("Ann", True, Q4, "Take it.")
    panel.recommend("Cleo", False, note="Did not look yet.")
    found = judgement.of(panel.verdicts(), reviews.recommendations(panel.home, panel.export))
    assert [note.text for note in found.notes] == ["Did not look yet.", "Take it.", "Lovely."]
    assert found.notes[1].quant == Q4 and found.notes[2].answer == SAID[Q4]
    people = {one.name: one for one in found.reviewers}
    assert list(people) == ["Ann", "Ben", "Cleo"]
    assert (people["Ann"].judged, people["Ann"].sets, people["Ann"].free) == (2, {"katherine": 2}, 0)
    assert (people["Ben"].judged, people["Ben"].sets, people["Ben"].free) == (1, {}, 1)
    assert people["Ann"].recommendation is not None and people["Ann"].recommendation.good
    assert people["Cleo"].judged == 0 and found.verdicts == 3


def test_who_types_anothers_name_in_another_role_is_somebody_else(panel):
    reviewers = panel.recommend("Ann", True, Q4)
    operators = msgspec.structs.replace(reviewers, id="other", role="operator", good=False)
    reviews.recommend(panel.home, operators)
    verdict = panel.judge("Ann", "Who?", SAID, source="katherine/who", best=Q4)
    both = [verdict, msgspec.structs.replace(verdict, id="other", role="operator", tie=True, preferred="")]
    found = judgement.of(both, reviews.recommendations(panel.home, panel.export))
    told = {one.role: (one.judged, one.recommendation) for one in found.reviewers}
    assert told == {"operator": (1, operators), "reviewer": (1, reviewers)}
    assert (found.agreement.questions, found.agreement.people, found.agreement.agreed) == (1, 2, 0)
