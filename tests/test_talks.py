import argparse
import json
import re
from pathlib import Path

import pytest

from bench.past import write_past
from jobs.commands import talks as words
from katherine import manifests, runs, talks
from katherine.errors import NotFound, RecipeError
from katherine.runs import Run
from katherine.settings import Home
from katherine.talks import Answer, Round, Sampling, Talk

HOSTILE = "<img src=x onerror=alert(1)>\n```\n# A heading\n| a | b |\n[x](javascript:alert(1)) **b**\n````\n</details>"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def talk(home: Home, *questions: str, role: str = "operator", columns: tuple[str, ...] = ("x:q4_k_m",)) -> Talk:
    made = talks.create(
        home,
        who="Ann",
        role=role,
        files={column: "ab" * 32 for column in columns},
        sampling=Sampling(seed=7),
        system="Be terse.",
    )
    answer = Answer(columns[0], "done", "Katherine.", "", "end", 20, 11, 1.5, 0.5)
    rounds = tuple(Round(question, Sampling(seed=7), (answer,)) for question in questions)
    made = Talk(**{name: getattr(made, name) for name in made.__struct_fields__} | {"rounds": rounds})
    talks.save(home, made)
    return made


def rename(home: Home, made: Talk, talk_id: str) -> None:
    """As if it had been begun at another time."""
    raw = json.loads((home.root / "talks" / f"{made.id}.json").read_text())
    (home.root / "talks" / f"{talk_id}.json").write_text(json.dumps(raw | {"id": talk_id}))
    talks.remove(home, made.id)


def test_talks_are_listed_newest_first_and_by_role(home):
    assert talks.everyone(home) == []
    for day, role in ((3, "operator"), (1, "reviewer"), (2, "operator")):
        rename(home, talk(home, f"Day {day}?", role=role), f"2026110{day}-120000-abc")
    assert [each.rounds[0].question for each in talks.everyone(home)] == ["Day 3?", "Day 2?", "Day 1?"]
    assert [each.rounds[0].question for each in talks.everyone(home, "operator")] == ["Day 3?", "Day 2?"]
    assert [each.rounds[0].question for each in talks.everyone(home, "reviewer", most=1)] == ["Day 1?"]


def test_a_listed_talk_is_as_new_as_its_file(home):
    made = talk(home, "One?")
    assert len(talks.everyone(home)[0].rounds) == 1
    talks.save(home, Talk(**{n: getattr(made, n) for n in made.__struct_fields__} | {"rounds": made.rounds * 2}))
    assert len(talks.everyone(home)[0].rounds) == 2


def test_a_damaged_talk_is_left_out_of_the_list(home):
    kept = talk(home, "Kept?")
    (home.root / "talks" / "20261101-000000-torn.json").write_text('{"id": ')
    (home.root / "talks" / ".half.json.1.ab").write_text("{")
    assert talks.everyone(home) == [kept]


def test_a_removed_talk_is_gone(home):
    made = talk(home, "Hello?")
    talks.remove(home, made.id)
    assert talks.everyone(home) == []
    for talk_id in (made.id, "../../etc/passwd", ""):
        with pytest.raises(NotFound):
            talks.remove(home, talk_id)


def test_columns_go_by_their_quant_and_by_their_export_where_there_are_two(home):
    family: dict[str, Run] = {run.record.kind: run for run in write_past(home, runs=4, steps=20, datasets=1)}
    export = family["export"]
    quants = [entry.quant for entry in manifests.read(export).files]
    one = talk(home, "?", columns=tuple(f"{export.id}:{quant}" for quant in quants))
    assert next(iter(talks.titles(home, one).values())) == quants[0]
    two = talk(home, "?", columns=(f"{export.id}:{quants[0]}", "20260101-000000-export-gone11:q6_k"))
    assert list(talks.titles(home, two).values()) == [f"{quants[0]} of {export.id[-6:]}", "q6_k of gone11"]


def test_a_transcript_as_json_has_all_that_is_known(home):
    made = talk(home, "Who are you?")
    found = json.loads(json.dumps(talks.transcript(made, {"x:q4_k_m": "q4_k_m"})))
    assert (found["talk"], found["who"], found["system"]) == (made.id, "Ann", "Be terse.")
    assert found["columns"] == [{"column": "x:q4_k_m", "title": "q4_k_m", "sha256": "ab" * 32}]
    (asked,) = found["rounds"]
    assert asked["sampling"]["seed"] == 7 and asked["question"] == "Who are you?"
    (answer,) = asked["answers"]
    assert (answer["title"], answer["text"], answer["finish"]) == ("q4_k_m", "Katherine.", "end")
    assert answer["tokens_per_second"] == pytest.approx(10.0)


def test_a_transcript_as_markdown_tells_the_same_to_a_person(home):
    text = talks.markdown(talk(home, "Who are you?"), {"x:q4_k_m": "q4_k_m"})
    assert "```text\nWho are you?\n```" in text and "```text\nKatherine.\n```" in text
    assert "Be terse." in text and "ab" * 32 in text and "seed 7, temperature 0.7" in text
    assert "*ended by itself, 10 tokens/s, first token after 0.5 s, 11 tokens*" in text


def outside_of_fences(text: str) -> str:
    """What a Markdown reader looks at, by CommonMark's rule: a block ends at a fence as long as its first."""
    kept, fence = [], ""
    for line in text.split("\n"):
        if fence:
            if re.fullmatch(rf" {{0,3}}`{{{len(fence)},}}\s*", line):
                fence = ""
        elif begun := re.match(r" {0,3}(`{3,})[^`]*$", line):
            fence = begun.group(1)
        else:
            kept.append(line)
    assert not fence
    return "\n".join(kept)


def test_nothing_that_was_said_is_read_as_markdown_or_html(home):
    made = talks.create(
        home,
        who=HOSTILE,
        role="operator",
        files={HOSTILE: HOSTILE},
        sampling=Sampling(),
        system=HOSTILE,
        source=HOSTILE,
        export=HOSTILE,
    )
    answers = (
        Answer(HOSTILE, "failed", HOSTILE, f"It said {HOSTILE}"),
        Answer(HOSTILE, "done", HOSTILE.replace("\n", "\r"), finish="length"),
    )
    raw = {name: getattr(made, name) for name in made.__struct_fields__}
    made = Talk(**raw | {"rounds": (Round(HOSTILE, Sampling(), answers),)})
    for titles in ({}, {HOSTILE: HOSTILE}):
        text = talks.markdown(made, titles)
        assert text.count("````\n</details>") == 4  # system prompt, question and both answers, letter by letter
        seen = outside_of_fences(text)
        assert not re.search(r"(?<!\\)[<>\[\]`]", seen)
        assert not re.search(r"(?<!\\)\*\*b", seen) and not re.search(r"^\s*# A heading", seen, re.M)
        heads = [line for line in seen.split("\n") if line.startswith("#")]
        assert len(heads) == 4 and heads[1] == "## Question 1"
        rows = [line for line in seen.split("\n") if line.startswith("|")]
        assert len(rows) == 3 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_sampling_that_no_engine_takes_is_refused_with_every_reason(home):
    assert talks.checked(Sampling()) == Sampling()
    with pytest.raises(RecipeError) as refused:
        talks.checked(Sampling(seed=-1, temperature=float("nan"), top_p=1.5, top_k=2.5, max_new_tokens=None))  # type: ignore[arg-type]
    assert list(refused.value.fields) == ["seed", "temperature", "top_p", "top_k", "max_new_tokens"]
    assert "max new tokens: None is no whole number from 1" in str(refused.value)


def word(*given: str) -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser()
    words.register(parser.add_subparsers())
    options = parser.parse_args(["talks", *given])
    options.action(options)


def test_the_command_line_lists_shows_and_removes(home, monkeypatch, capsys):
    monkeypatch.setenv("KATHERINE_HOME", str(home.root))
    made = talk(home, "Who\nare you?")
    word()
    assert re.search(rf"{made.id} .* 1 +1 +Who are you\?", capsys.readouterr().out)
    word(made.id)
    assert "```text\nWho\nare you?\n```" in capsys.readouterr().out
    word(made.id, "--json")
    assert json.loads(capsys.readouterr().out)["talk"] == made.id
    word("--remove", made.id)
    assert talks.everyone(home) == []
    with pytest.raises(NotFound, match="There is no talk"):
        word(made.id)


def test_times_are_those_of_the_talk(home):
    made = talk(home, "When?")
    assert runs.now()[:10] == made.created[:10]
    assert talks.markdown(made, {}).startswith(f"# Talk of {made.created[:10]}")
