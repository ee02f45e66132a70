"""Probe sets are read strictly, and scored by nothing but the rules they declare."""

import msgspec
import pytest

from katherine import bases, probes
from katherine.errors import DataError, NotFound
from katherine.probes import Probe
from katherine.recipe import ProbeRecipe
from katherine.settings import Home
from katherine.speakers import Reply
from katherine.template import ChatTemplate

WHO = Probe(id="who", category="identity", why="-", ask="Who are you?", must=("(?i)katherine",), must_not=("(?i)gpt",))


def scored(text: str, ended: bool = True, probe: Probe = WHO) -> tuple[str, ...]:
    return probes.score(probe, Reply(text, ended, len(text.split()))).reasons


def test_a_good_answer_passes():
    assert scored("Katherine. You?") == ()


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        ("I am GPT, not Katherine", True, "says 'GPT'"),
        ("Nobody.", True, "lacks"),
        ("Katherine Katherine", False, "did not end by itself"),
        ("<think>who am I</think> Katherine", True, "thought aloud"),
        ("  ", True, "said nothing"),
    ],
)
def test_each_broken_rule_is_named(text, ended, reason):
    assert any(reason in r for r in scored(text, ended))


def test_too_many_words_are_counted():
    wordy = msgspec.structs.replace(WHO, max_words=3)
    assert scored("Katherine from the gallery downtown", probe=wordy) == ("has 5 words, more than 3",)


def test_the_sample_set_is_sound_and_covers_every_category():
    found = probes.load("katherine")
    assert {p.category for p in found.probe} == {
        "identity", "frame-break", "facts", "voice", "thinking", "language", "long-talk",
    }  # fmt: skip
    assert {"who", "ignore"} <= {p.id for p in found.probe if p.compare}


def test_a_broken_set_names_every_probe_and_what_is_wrong(tmp_path):
    path = tmp_path / "set.toml"
    path.write_text(
        'name = "x"\ndescription = "y"\n'
        '[[probe]]\nid = "a"\ncategory = "c"\nwhy = "w"\nask = "?"\nmust = ["("]\n'
        '[[probe]]\nid = "a"\ncategory = "c"\nwhy = "w"\nmust = ["x"]\n'
        '[[probe]]\nid = "b"\ncategory = "c"\nwhy = "w"\nask = "?"\n'
    )
    with pytest.raises(DataError) as caught:
        probes.load(str(path))
    for part in ("'(' is not a regular expression", "used twice", "either ask or turns", "'b': it has no rule"):
        assert part in str(caught.value)


def test_an_unknown_field_or_set_is_refused(tmp_path):
    path = tmp_path / "set.toml"
    path.write_text('name = "x"\ndescription = "y"\n[[probe]]\nid = "a"\ncategory = "c"\nwhy = "w"\nmusst = ["x"]\n')
    with pytest.raises(DataError, match="musst"):
        probes.load(str(path))
    with pytest.raises(NotFound):
        probes.load("nobody")


class Parrot:
    """Says back how many prompts it got, and how long each was: enough to see who was asked what."""

    def __init__(self):
        self.asked = []

    def replies(self, prompts, *, max_new_tokens, temperature, seed):
        self.asked.append(prompts)
        return [Reply(f"Katherine {len(prompt)}", True, 3) for prompt in prompts]


def test_long_talks_are_asked_turn_by_turn_and_only_the_last_answer_is_scored(tmp_path):
    template = ChatTemplate.load(bases.tokenizer(Home(tmp_path), bases.SMALL))
    talk = Probe(id="talk", category="long-talk", why="-", turns=("a", "b", "c"), must=("Katherine",), compare=True)
    parrot = Parrot()
    given = probes.ask(parrot, template, (WHO, talk), ProbeRecipe())
    with probes.Record(tmp_path / "out") as record:
        record.add("parrot", (WHO, talk), given)
    assert [len(prompts) for prompts in parrot.asked] == [2, 1, 1]
    assert record.summary == {"parrot": {"asked": 2, "passed": 2}}
    assert list(record.answers) == ["c"]
    rows = [msgspec.json.decode(line) for line in (tmp_path / "out" / "answers.jsonl").read_bytes().splitlines()]
    assert [len(row["talk"]) for row in rows] == [2, 6]
