"""What a reviewer is shown does not tell the files apart, and leads to nobody else's talks; where they were is kept."""

import collections
import json

import msgspec
import pytest
from exported import QUANTS, ended, exported, probed

from katherine import blind, probesets, reviews, runs, talks
from katherine.blind import FREE, Session
from katherine.errors import ReviewError
from katherine.history import History
from katherine.reviews import Mark
from katherine.settings import Home
from katherine.talks import Answer, Round, Sampling, Talk

SET = """\
name = "three"
description = "Three of them."

[[probe]]
id = "who"
category = "identity"
ask = "Who are you?"
must = ['Katherine']

[[probe]]
id = "warm"
category = "facts"
turns = ["Where do you live?", "Is it warm?"]
must_not = ['feet']

[[probe]]
id = "mood"
category = "voice"
ask = "Does this sound like her?"
"""


@pytest.fixture
def home(tmp_path) -> Home:
    made = Home(tmp_path / "home")
    probesets.save(made, "three", SET)
    return made


@pytest.fixture
def export(home) -> str:
    return exported(home).id


@pytest.fixture
def session(home, export) -> Session:
    return blind.enter(home, blind.begin(home, export, "Ann", "reviewer"), "three")


def again(home: Home, session: Session) -> Session:
    return blind.load(home, session.id, session.role)


def answered(home: Home, talk: Talk, *questions: str, said: str = "", **changes) -> Talk:
    """Each file answers with its quant, or all say the same."""
    rounds = tuple(
        Round(
            asked,
            talk.sampling,
            tuple(
                Answer(each, **({"state": "done", "text": said or f"{each[-6:]} says", "finish": "end"} | changes))
                for each in talk.columns
            ),
        )
        for asked in questions
    )
    talk = msgspec.structs.replace(talk, rounds=rounds)
    talks.save(home, talk)
    return talk


def open_answered(home: Home, session: Session, at: int = 0, name: str = "three") -> Talk:
    return answered(home, blind.open_talk(home, session, name, at), "Who are you?")


# ---------------------------------------------------------------------------------------------------------- versions


def test_finished_exports_with_accepted_files_can_be_reviewed_newest_first(home, export):
    newer = exported(home, failing=("q5_k_m",))
    exported(home, failing=QUANTS)
    unfinished = runs.create(home, "export", recipe={}, who="test")
    among = History(home).runs()
    found = blind.versions(home, among)
    assert [version.export for version in found] == [newer.id, export]
    assert {column.rpartition(":")[2] for column in found[0].files} == {"q4_k_m", "q6_k"}
    assert blind.version(home, among, found[1].key).export == export
    for wrong in ("", export, unfinished.id, "0" * 16):
        with pytest.raises(ReviewError):
            blind.version(home, among, wrong)


def test_the_unquantised_file_is_not_put_to_reviewers(home):
    exported(home, quants=("q4_k_m", "bf16"))
    (version,) = blind.versions(home, History(home).runs())
    assert {column.rpartition(":")[2] for column in version.files} == {"q4_k_m"}


# ---------------------------------------------------------------------------------------------------------- sessions


def test_the_same_name_goes_on_where_it_was_and_another_begins_anew(home, export, session):
    blind.move(home, session, "three", 2)
    back = blind.begin(home, export, "  ANN ", "reviewer")
    assert (back.id, back.courses["three"].at) == (session.id, 2)
    others = [blind.begin(home, export, "Bea", "reviewer"), blind.begin(home, export, "Ann", "operator")]
    others.append(blind.begin(home, exported(home).id, "Ann", "reviewer"))
    assert len({session.id, *(each.id for each in others)}) == 4


@pytest.mark.parametrize("name", ["", " \n", "x" * 61, "\u200b"])
def test_a_name_that_is_none_is_refused_in_plain_words(home, export, name):
    with pytest.raises(ReviewError, match="name"):
        blind.begin(home, export, name, "reviewer")


def test_nothing_but_a_session_of_ones_role_can_be_named(home, export, session):
    assert blind.load(home, session.id, "reviewer") == session
    talk = blind.open_talk(home, session, "three", 0)
    for wrong in (session.id[:-1], f"{session.id}.json", "*", "?" * 32, talk.id, export, "../" + session.id, ""):
        with pytest.raises(ReviewError):
            blind.load(home, wrong, "reviewer")
    with pytest.raises(ReviewError):
        blind.load(home, session.id, "operator")


def test_a_set_that_is_changed_meanwhile_changes_nobodys_review(home, session):
    probesets.save(home, "three", SET.replace("Who are you?", "What are you?"))
    assert blind.enter(home, again(home, session), "three").courses["three"].questions[0].turns == ("Who are you?",)
    probesets.remove(home, "three")
    assert "three" in [offer.name for offer in blind.offers(home, again(home, session))]


def test_a_page_names_sets_and_no_paths(home, session, tmp_path):
    (tmp_path / "other.toml").write_text(SET)
    for wrong in (str(tmp_path / "other.toml"), "../three", "no-such-set"):
        with pytest.raises(ReviewError):
            blind.enter(home, session, wrong)


def test_questions_that_no_rule_decides_are_for_the_person(session):
    assert [each.for_person for each in session.courses["three"].questions] == [False, False, True]
    assert session.courses["three"].questions[1].turns == ("Where do you live?", "Is it warm?")


def test_there_is_no_place_beyond_the_last(home, session):
    for wrong in (-1, 3):
        with pytest.raises(ReviewError):
            blind.move(home, session, "three", wrong)
    free = blind.enter(home, session, FREE)
    blind.move(home, free, FREE, 0)
    with pytest.raises(ReviewError):
        blind.move(home, free, FREE, 1)
    for name, wrong in (("three", -1), ("three", 3), (FREE, -1), (FREE, 1), (FREE, 10**29)):
        for way in (blind.open_talk, blind.talk_of):
            with pytest.raises(ReviewError, match="no such question"):
                way(home, free, name, wrong)
    for way in (blind.recorded, blind.has_recorded):
        record(home, session.export)
        with pytest.raises(ReviewError, match="no such question"):
            way(home, free, "three", -1, History(home).runs())
    assert talks.everyone(home) == []


def test_more_sessions_and_words_than_people_ever_need_are_refused_in_words(home, export, session, monkeypatch):
    monkeypatch.setattr(blind, "MOST_SESSIONS", 2)
    blind.begin(home, export, "Bea", "reviewer")
    with pytest.raises(ReviewError, match="2 people"):
        blind.begin(home, export, "Cid", "reviewer")
    assert blind.begin(home, export, "ann", "reviewer").id == session.id
    assert blind.begin(home, export, "Cid", "operator")
    talk = open_answered(home, session)
    monkeypatch.setattr(blind, "MOST_LINES", 3)
    blind.judge(home, session, talk, 0, chosen="A")
    blind.judge(home, session, talk, 0, chosen="B")
    blind.recommend(home, session, True, False, "")
    for refused in (
        lambda: blind.judge(home, session, talk, 0, chosen="C"),
        lambda: blind.recommend(home, session, False, False, ""),
    ):
        with pytest.raises(ReviewError, match="3 things"):
            refused()
    blind.judge(home, session, talk, 0, chosen="B")
    assert reviews.said(home, export, session) == 3
    blind.judge(home, blind.begin(home, export, "Bea", "reviewer"), talk, 0, chosen="C")


# ------------------------------------------------------------------------------------------------------------ blinding


def test_the_order_is_another_for_each_question_and_favours_none(home, export):
    first = collections.Counter()
    for number in range(40):
        session = blind.enter(home, blind.begin(home, export, f"Person {number}", "reviewer"), "three")
        orders = [blind.open_talk(home, session, "three", at).columns for at in range(3)]
        first.update(order[0] for order in orders)
        assert all(sorted(order) == sorted(orders[0]) for order in orders)
    # 120 draws of three: each is first 40 times, and less than 15 or more than 65 in one of a million.
    assert len(first) == 3 and all(15 < count < 65 for count in first.values())


def test_who_begins_a_place_anew_gets_another_draw(home, session):
    seeds = {blind.open_talk(home, again(home, session), "three", 0).sampling.seed for _ in range(5)}
    assert len(seeds) == 5


def test_all_files_are_asked_alike(home, session):
    talk = blind.open_talk(home, session, "three", 0)
    assert (talk.system, talk.source, talk.export, talk.role) == ("", "three/who", session.export, "reviewer")
    assert msgspec.structs.replace(talk.sampling, seed=0) == Sampling()


def test_faces_hold_no_more_of_an_answer_than_what_it_says(home, session):
    talk = open_answered(home, session)
    shown = json.dumps(msgspec.to_builtins(blind.faces(answered(home, talk, "Who?", said="Me."), 0)))
    for secret in (*talk.columns, *talk.files.values(), *QUANTS, talk.id, session.export, "seconds", "tokens"):
        assert secret not in shown
    assert [face.letter for face in blind.faces(talk, 0)] == ["A", "B", "C"]


def test_while_answers_come_none_is_shown_further_than_the_slowest(home, session):
    talk = open_answered(home, session)
    texts = {talk.columns[0]: "1234567890", talk.columns[1]: "123", talk.columns[2]: "12345"}

    def at(*states: str) -> list[tuple[str, str]]:
        answers = tuple(
            Answer(column, state, texts[column]) for column, state in zip(talk.columns, states, strict=True)
        )
        now = msgspec.structs.replace(talk, rounds=(Round("?", talk.sampling, answers),))
        return [(face.text, face.state) for face in blind.faces(now, 0)]

    assert at("answering", "answering", "done") == [("123", "coming"), ("123", "coming"), ("123", "coming")]
    assert at("answering", "done", "waiting") == [("12345", "coming"), ("123", "coming"), ("12345", "coming")]
    assert at("answering", "failed", "done") == [("1234567890", "coming"), ("123", "coming"), ("12345", "coming")]
    # Nor when it was enough: how far each had come would say how fast it is.
    assert at("done", "failed", "stopped") == [("12345", "stopped"), ("123", "silent"), ("12345", "stopped")]
    assert at("stopped", "stopped", "stopped") == [("123", "stopped")] * 3
    assert at("stopped", "done", "done") == [("1234567890", "stopped"), ("123", "done"), ("12345", "done")]
    assert at("answering", "stopped", "done") == [("123", "coming")] * 3
    assert at("done", "done", "done") == [("1234567890", "done"), ("123", "done"), ("12345", "done")]


def test_what_was_cut_to_the_shortest_stopped_one_is_kept_and_judged_whole(home, session, export):
    talk = open_answered(home, session)
    first, *others = talk.rounds[0].answers
    stopped = msgspec.structs.replace(first, state="stopped", text=first.text[:3], finish="stopped")
    talk = msgspec.structs.replace(talk, rounds=(Round("?", talk.sampling, (stopped, *others)),))
    talks.save(home, talk)
    assert {len(face.text) for face in blind.faces(talk, 0)} == {3}
    blind.judge(home, session, talk, 0, chosen="B")
    verdict = blind.verdict_of(home, session, talks.load(home, talk.id), 0)
    assert verdict is not None and verdict.answers[1].text == others[0].text


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_what_is_tapped_is_recorded_under_the_file_that_the_letter_stands_for(home, session, export):
    talk = open_answered(home, session)
    blind.judge(home, session, talk, 0, letter="B", thumb=1)
    blind.judge(home, session, talk, 0, letter="B", note=" warm ")
    blind.judge(home, session, talk, 0, letter="A", rewrite="Katherine. You?")
    blind.judge(home, session, talk, 0, chosen="C")
    (verdict,) = reviews.verdicts(home, export)
    marks = blind.marks_of(talk, 0, verdict)
    assert marks[talk.columns[1]] == Mark(1, "warm", "")
    assert marks[talk.columns[0]] == Mark(0, "", "Katherine. You?")
    assert verdict.preferred == talk.columns[2] and verdict.order == talk.columns
    faces = blind.faces(talk, 0, blind.verdict_of(home, session, talk, 0))
    assert [face.mark.thumb for face in faces] == [0, 1, 0]
    assert blind.choice(talk, verdict) == "C"


def test_what_was_said_already_is_not_recorded_again(home, session, export):
    talk = open_answered(home, session)
    for _ in range(3):
        blind.judge(home, session, talk, 0, letter="A", thumb=-1)
    lines = (home.root / "reviews" / export / "verdicts.jsonl").read_bytes().splitlines()
    assert len(lines) == 1


@pytest.mark.parametrize(("chosen", "tie", "none"), [("same", True, False), ("none", False, True), ("", False, False)])
def test_no_better_one_is_a_choice_as_well(home, session, export, chosen, tie, none):
    talk = open_answered(home, session)
    blind.judge(home, session, talk, 0, letter="A", thumb=1, chosen="B")
    blind.judge(home, session, talk, 0, chosen=chosen)
    (verdict,) = reviews.verdicts(home, export)
    assert (verdict.preferred, verdict.tie, verdict.none_good) == ("", tie, none)
    assert blind.choice(talk, verdict) == chosen


@pytest.mark.parametrize(
    "wish",
    [
        {"letter": "D", "thumb": 1},
        {"letter": "AB", "thumb": 1},
        {"letter": "a", "thumb": 1},
        {"letter": "A", "thumb": 5},
        {"letter": "A", "note": "x" * 2001},
        {"chosen": "everyone"},
        {"chosen": "Z"},
    ],
)
def test_a_wish_that_cannot_be_is_refused_in_words_that_name_no_file(home, session, export, wish):
    talk = open_answered(home, session)
    with pytest.raises(ReviewError) as refused:
        blind.judge(home, session, talk, 0, **wish)
    assert not any(part in str(refused.value) for part in (export, "q4", "q5", "q6", str(home.root)))
    assert reviews.verdicts(home, export) == []


def test_nothing_is_judged_before_it_is_there_or_where_nothing_came(home, session):
    talk = blind.open_talk(home, session, "three", 0)
    coming = answered(home, talk, "Who?", state="answering")
    with pytest.raises(ReviewError, match="still coming"):
        blind.judge(home, session, coming, 0, chosen="A")
    silent = answered(home, talk, "Who?", state="failed", text="")
    for wish in ({"letter": "A", "thumb": 1}, {"chosen": "A"}):
        with pytest.raises(ReviewError, match="did not come"):
            blind.judge(home, session, silent, 0, **wish)


def test_what_was_said_of_other_answers_does_not_stand_beside_new_ones(home, session):
    talk = open_answered(home, session)
    blind.judge(home, session, talk, 0, letter="A", thumb=1)
    anew = answered(home, talk, "Who are you?", said="Something else.")
    assert blind.verdict_of(home, session, anew, 0) is None


def test_progress_counts_questions_that_something_was_said_of(home, session):
    for at in (0, 2):
        blind.judge(home, again(home, session), open_answered(home, again(home, session), at), 0, chosen="same")
    (offer,) = [each for each in blind.offers(home, again(home, session)) if each.name == "three"]
    assert (offer.judged, offer.questions, offer.is_begun) == (2, 3, True)


# ---------------------------------------------------------------------------------------------------- recommendations


def test_the_favourite_is_what_the_person_chose_most_often_and_is_never_named(home, session, export):
    talk = open_answered(home, session, 0)
    column = talk.columns[1]
    blind.judge(home, session, talk, 0, chosen="B")
    other = open_answered(home, again(home, session), 2)
    blind.judge(home, session, other, 0, chosen=blind.LETTERS[other.columns.index(column)])
    # What others chose is not theirs.
    bea = blind.enter(home, blind.begin(home, export, "Bea", "reviewer"), "three")
    for at in range(3):
        theirs = open_answered(home, again(home, bea), at)
        blind.judge(home, bea, theirs, 0, chosen=blind.LETTERS[theirs.columns.index(talk.columns[0])])
    assert blind.favourite(home, session) == column
    blind.recommend(home, session, True, True, " fine ")
    word = blind.recommendation(home, session)
    assert word is not None and (word.good, word.column, word.note, word.judged) == (True, column, "fine", 2)
    blind.recommend(home, session, False, False, "")
    word = blind.recommendation(home, session)
    assert word is not None and (word.good, word.column) == (False, "")
    assert blind.recommendation(home, bea) is None
    # Where none stands out, none is noted, and that they asked for one is all that is kept.
    blind.judge(home, session, other, 0, chosen=blind.LETTERS[other.columns.index(talk.columns[0])])
    blind.recommend(home, session, True, True, "")
    word = blind.recommendation(home, session)
    assert word is not None and (word.column, word.favourite) == ("", True)


# ---------------------------------------------------------------------------------------------------- recorded answers


def record(home: Home, export: str, quants=QUANTS, question: str = "Is it warm?", ended_by_itself: bool = True):
    run = probed(home, runs.load(home, export), {quant: (1, 1) for quant in quants})
    rows = []
    for quant in (*quants, "base"):
        said = [("user", "Where do you live?"), ("assistant", f"{quant} in Austin."), ("user", question)]
        talk = [{"role": role, "content": text} for role, text in (*said, ("assistant", f"{quant}: no."))]
        row = {"model": quant, "probe": "warm", "category": "facts", "talk": talk}
        rows.append(row | {"score": {"passed": True, "reasons": []}})
    (run.out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended(run, {"models": {}, "answers": {}})
    return run


def test_recorded_answers_become_a_talk_that_is_judged_like_any_other(home, session, export):
    record(home, export)
    among = History(home).runs()
    assert [blind.has_recorded(home, session, "three", at, among) for at in range(3)] == [False, True, False]
    talk = blind.recorded(home, session, "three", 1, among)
    assert talk is not None and sorted(talk.columns) == [f"{export}:{quant}" for quant in QUANTS]
    assert [each.question for each in talk.rounds] == ["Where do you live?", "Is it warm?"]
    session = again(home, session)
    assert blind.talk_of(home, session, "three", 1) == talk
    assert blind.recorded(home, session, "three", 1, among) == talk and talks.everyone(home) == [talk]
    blind.judge(home, session, talk, 1, chosen="A")
    (verdict,) = reviews.verdicts(home, export)
    quant = talk.columns[0].rpartition(":")[2]
    first = next(each for each in verdict.answers if each.quant == quant)
    assert first.text == f"{quant}: no." and first.before[1].content == f"{quant} in Austin."


def test_what_was_recorded_of_another_question_or_export_is_not_offered(home, session, export):
    record(home, export, question="Is it cold?")
    record(home, exported(home).id)
    assert not blind.has_recorded(home, session, "three", 1, History(home).runs())
    assert blind.recorded(home, session, "three", 1, History(home).runs()) is None
