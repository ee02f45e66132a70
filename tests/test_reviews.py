"""Verdicts and recommendations: every line is kept, the last of each person counts, and nothing that does not fit the
talk is taken."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from exported import exported

from katherine import reviews, runs, talks
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.reviews import LONGEST_NAME, LONGEST_NOTE, Mark, Recommendation, Verdict
from katherine.settings import PROJECT, Home, child_environment
from katherine.talks import Answer, Round, Sampling, Talk


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def export(home) -> str:
    return exported(home).id


@pytest.fixture
def talk(home, export) -> Talk:
    return told(home, export)


def told(home: Home, export: str, questions: tuple[str, ...] = ("Who are you?", "And now?")) -> Talk:
    files = {f"{export}:{quant}": quant * 8 for quant in ("q5_k_m", "q4_k_m", "q6_k")}
    made = talks.create(
        home, who="Ann", role="reviewer", files=files, sampling=Sampling(), export=export, source="katherine/who"
    )
    rounds = tuple(
        Round(asked, Sampling(), tuple(Answer(each, "done", f"{each[-4:]} to {asked}", finish="end") for each in files))
        for asked in questions
    )
    made = msgspec.structs.replace(made, rounds=rounds)
    talks.save(home, made)
    return made


def judge(home: Home, talk: Talk, **given) -> Verdict:
    said = {"round": 0, "reviewer": "Ann", "role": "reviewer", "marks": {}} | given
    return reviews.judge(home, talk, **said)


def recommendation(export: str, **given) -> Recommendation:
    said = {"id": "1", "time": runs.now(), "reviewer": "Ann", "role": "reviewer", "export": export, "good": True}
    return Recommendation(**(said | given))


def test_a_verdict_holds_all_that_is_needed_to_learn_from_it(home, export, talk):
    first, second, _ = talk.columns
    mark = Mark(-1, "too stiff", "Katherine. You?")
    judge(home, talk, round=1, marks={first: mark}, preferred=second)
    (verdict,) = reviews.verdicts(home, export)
    assert (verdict.talk, verdict.round, verdict.source, verdict.question) == (talk.id, 1, "katherine/who", "And now?")
    assert (verdict.order, verdict.preferred) == (talk.columns, second)
    judged = next(each for each in verdict.answers if each.column == first)
    assert (judged.thumb, judged.note, judged.rewrite) == (-1, "too stiff", "Katherine. You?")
    assert (judged.quant, judged.sha256, judged.text) == ("q5_k_m", talk.files[first], talk.rounds[1].answers[0].text)
    assert judged.before == (
        Message("user", "Who are you?"),
        Message("assistant", talk.rounds[0].answers[0].text),
        Message("user", "And now?"),
    )


def test_the_last_word_of_a_person_on_a_question_counts_and_every_line_stays(home, export, talk):
    one, other, _ = talk.columns
    judge(home, talk, preferred=one)
    judge(home, talk, reviewer="Bea", preferred=one)
    judge(home, talk, reviewer=" ann ", preferred=other)
    judge(home, talk, role="operator", tie=True)
    assert [(each.reviewer, each.role, each.preferred) for each in reviews.verdicts(home, export)] == [
        ("Bea", "reviewer", one), ("ann", "reviewer", other), ("Ann", "operator", ""),
    ]  # fmt: skip
    lines = (home.root / "reviews" / export / "verdicts.jsonl").read_bytes().splitlines()
    assert len(lines) == 4


def test_what_was_taken_back_is_no_verdict_any_more(home, export, talk):
    judge(home, talk, marks={talk.columns[0]: Mark(1)})
    assert len(reviews.verdicts(home, export)) == 1
    judge(home, talk)
    assert reviews.verdicts(home, export) == []


def test_an_answer_without_a_word_is_not_judged(home, export, talk):
    silent = msgspec.structs.replace(talk.rounds[0].answers[0], text="", state="failed")
    asked = msgspec.structs.replace(talk.rounds[0], answers=(silent, *talk.rounds[0].answers[1:]))
    talk = msgspec.structs.replace(talk, rounds=(asked,))
    talks.save(home, talk)
    assert len(judge(home, talk, tie=True).answers) == 2
    with pytest.raises(DataError, match="gave no answer"):
        judge(home, talk, preferred=silent.column)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"export": "another"}, "no run"),
        ({"talk": "20260101-000000-abc"}, "no talk"),
        ({"round": 7}, "no question 8"),
        ({"question": "What else?"}, "another one"),
        ({"source": "other/who"}, "another one"),
        ({"order": ("x:q4_k_m",)}, "was held with"),
        ({"preferred": "x:q4_k_m"}, "gave no answer"),
        ({"tie": True}, "Either one is better"),
        ({"none_good": True}, "Either one is better"),
        ({"role": "admin"}, "not a role"),
        ({"reviewer": " Ann"}, "not a name"),
        ({"reviewer": "x" * (LONGEST_NAME + 1)}, "too long"),
        ({"reviewer": "\u200b\n"}, "your name"),
    ],
)
def test_a_verdict_that_does_not_fit_its_talk_is_refused(home, export, talk, change, said):
    verdict = judge(home, talk, preferred=talk.columns[0])
    before = reviews.fingerprint(home, export)
    with pytest.raises((DataError, NotFound), match=said):
        reviews.record(home, msgspec.structs.replace(verdict, **change))
    assert reviews.fingerprint(home, export) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "another file"),
        ({"column": "20260101-000000-export-abc:q4_k_m"}, "did not answer"),
        ({"text": "something else"}, "changed since"),
        ({"thumb": 2}, "thumb"),
        ({"note": "x" * (LONGEST_NOTE + 1)}, "2,001 characters"),
        ({"rewrite": "x" * 8001}, "too long"),
    ],
)
def test_an_answer_that_was_not_given_is_refused(home, export, talk, change, said):
    verdict = judge(home, talk, tie=True)
    changed = (msgspec.structs.replace(verdict.answers[0], **change), *verdict.answers[1:])
    with pytest.raises(DataError, match=said):
        reviews.record(home, msgspec.structs.replace(verdict, answers=changed))


def test_a_verdict_on_an_operators_talk_is_refused(home, export):
    files = {f"{export}:q4_k_m": "0" * 64}
    free = talks.create(home, who="op", role="operator", files=files, sampling=Sampling())
    free = msgspec.structs.replace(
        free, rounds=(Round("Who?", Sampling(), (Answer(next(iter(files)), "done", "Me."),)),)
    )
    talks.save(home, free)
    with pytest.raises(NotFound):
        judge(home, free, tie=True)


def test_a_torn_line_costs_itself_alone(home, export, talk):
    judge(home, talk, preferred=talk.columns[0])
    path = home.root / "reviews" / export / "verdicts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(reviews.verdicts(home, export)) == 1
    judge(home, talk, reviewer="Bea", tie=True)
    assert [each.reviewer for each in reviews.verdicts(home, export)] == ["Ann", "Bea"]


def _many(root: Path, talk: Talk, who: str) -> None:
    for _ in range(25):
        judge(Home(root), talk, reviewer=who, marks={talk.columns[0]: Mark(1, "x" * 2000)})


def test_two_processes_that_record_at_once_do_not_mix_their_lines(home, export, talk):
    children = [multiprocessing.get_context("fork").Process(target=_many, args=(home.root, talk, who)) for who in "AB"]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    lines = (home.root / "reviews" / export / "verdicts.jsonl").read_bytes().splitlines()
    assert len([msgspec.json.decode(line, type=Verdict) for line in lines]) == 50


def test_the_last_recommendation_of_a_person_counts(home, export, talk):
    reviews.recommend(home, recommendation(export))
    reviews.recommend(home, recommendation(export, reviewer="Bea", column=talk.columns[0]))
    reviews.recommend(home, recommendation(export, reviewer="ANN", good=False, note="not yet"))
    found = reviews.recommendations(home, export)
    assert [(each.reviewer, each.good, each.note) for each in found] == [("Bea", True, ""), ("ANN", False, "not yet")]


def test_a_recommendation_for_another_exports_file_is_refused(home, export):
    other = exported(home).id
    with pytest.raises(DataError, match="is not of export"):
        reviews.recommend(home, recommendation(export, column=f"{other}:q4_k_m"))
    with pytest.raises(DataError, match="too long"):
        reviews.recommend(home, recommendation(export, note="x" * (LONGEST_NOTE + 1)))
    with pytest.raises(NotFound):
        reviews.recommend(home, recommendation("../talks"))


def test_the_fingerprint_changes_with_every_word_and_is_empty_before_the_first(home, export, talk):
    seen = [reviews.fingerprint(home, export)]
    judge(home, talk, tie=True)
    seen.append(reviews.fingerprint(home, export))
    reviews.recommend(home, recommendation(export))
    seen.append(reviews.fingerprint(home, export))
    judge(home, talk, tie=True)
    seen.append(reviews.fingerprint(home, export))
    assert seen[0] == "" and len(set(seen)) == 4


def test_no_path_can_be_made_of_an_exports_id(home):
    for wrong in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(NotFound):
            reviews.verdicts(home, wrong)


def test_the_favourite_is_the_one_preferred_most_often_and_nobodys_where_two_are(home, export):
    first, second, _ = (one := told(home, export)).columns
    judge(home, one, preferred=first)
    judge(home, one, round=1, preferred=second)
    assert reviews.favourite(reviews.verdicts(home, export)) == ""
    judge(home, told(home, export), preferred=second)
    assert reviews.favourite(reviews.verdicts(home, export)) == second
    assert reviews.favourite([]) == ""


def say(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import argparse, sys; from jobs.commands import review; from katherine.errors import KatherineError\n"
        "top = argparse.ArgumentParser(); review.register(top.add_subparsers()); o = top.parse_args(sys.argv[1:])\n"
        "try: o.action(o)\nexcept KatherineError as e: sys.exit(str(e))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=child_environment(KATHERINE_HOME=str(home.root)),
    )


def test_the_command_line_judges_recommends_and_lists(home, export, talk):
    assert say(home, "reviews").stderr.startswith("Nobody reviews yet")
    done = say(
        home, "verdict", talk.id, "--who", "Cy", "--prefer", "q4_k_m", "--bad", "q6_k", "--note", "q6_k=too long",
        "--rewrite", "q6_k=Short.",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (verdict,) = reviews.verdicts(home, export)
    assert (verdict.round, verdict.role, verdict.preferred) == (1, "operator", f"{export}:q4_k_m")
    minded = next(each for each in verdict.answers if each.quant == "q6_k")
    assert (minded.thumb, minded.note, minded.rewrite) == (-1, "too long", "Short.")
    assert say(home, "recommend", export, "yes", "--who", "Cy", "--prefer", "q4_k_m").returncode == 0
    (word,) = reviews.recommendations(home, export)
    assert (word.good, word.column, word.judged) == (True, f"{export}:q4_k_m", 1)
    listed = say(home, "reviews", export).stdout
    assert "Cy" in listed and listed.splitlines()[1].split()[-1] == "yes"
    wrong = say(home, "verdict", talk.id, "--who", "Cy", "--prefer", "q9")
    assert wrong.returncode == 1 and "q5_k_m, q4_k_m, q6_k" in wrong.stderr
