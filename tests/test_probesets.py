"""Sets are read strictly, say what is wrong and where, and lose nothing when they are kept."""

import tomllib

import pytest

from katherine import probesets
from katherine.errors import DataError, KatherineError, NotFound
from katherine.settings import Home

MINE = """\
# mine
name = "mine"

[[probe]]
id = "who"
category = "identity"
ask = "Who are you?"
must = ['(?i)katherine']
"""


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


def wrong(text: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        probesets.read(text, "set x")
    return str(caught.value).split("\n")


def test_the_built_in_set_is_sound_and_asks_each_category_at_least_twice(home):
    found = probesets.load(home, "katherine")
    counts: dict[str, int] = {}
    for probe in found.probe:
        counts[probe.category] = counts.get(probe.category, 0) + 1
    assert counts.keys() == {"identity", "frame-break", "facts", "voice", "thinking", "language", "long-talk"}
    assert min(counts.values()) >= 2
    assert all(len(probe.turns) > 2 for probe in found.probe if probe.category == "long-talk")
    assert {"who", "ignore"} <= {probe.id for probe in found.probe if probe.compare}
    assert [probe.id for probe in found.probe if not probe.has_rule] == ["story"]


def test_the_built_in_sets_remarks_explain_every_field(home):
    remarks = probesets.text(home, "katherine").split("\nname = ")[0]
    for field in (*probesets.Probe.__struct_fields__, "name", "description"):
        assert f"\n#   {field} " in remarks, field


def test_everything_that_is_wrong_is_said_at_once_with_probe_field_and_line():
    text = (
        'name = "x"\n'
        'colour = "red"\n'
        '[[probe]]\nid = "a"\ncategory = "c"\nask = "?"\nmust = ["("]\n'  # lines 3 to 7
        '[[probe]]\nid = "a"\ncategory = "c"\nmust = ["x"]\n'  # 8 to 11
        '[[probe]]\nid = "b c"\ncategory = " "\nask = "?"\nmusst = ["x"]\nmax_words = "many"\n'  # 12 to 17
        '[[probe]]\ncategory = "c"\nask = "?"\n'
        '[[probe]]\nid = "d"\ncategory = "c"\nask = "?"\nmin_words = 9\nmax_words = 3\n'
    )
    assert wrong(text) == [
        "set x: line 2, colour is not a field of a set: it has name, description and [[probe]].",
        "set x: line 7, probe 'a', must: '(' is not a regular expression (missing ), unterminated subpattern at "
        "position 0).",
        "set x: line 8, probe 'a', ask: give either ask or turns.",
        "set x: line 9, probe 'a', id: the id is used twice, first by probe number 1.",
        "set x: line 16, probe 'b c', musst: there is no such field of a probe: the fields are id, category, why, ask, "
        "turns, must, must_not, min_words, max_words, must_end, compare.",
        "set x: line 17, probe 'b c', max_words: it is not a whole number.",
        "set x: line 18, probe number 4, id: it is missing.",
        "set x: line 25, probe 'd', min_words: it is more than max_words, which is 3.",
    ]


def test_a_header_inside_of_a_text_does_not_put_the_lines_wrong():
    text = MINE + 'why = """\n[[probe]]\n"""\n[[probe]]\nid = "b"\ncategory = "c"\n'
    assert wrong(text) == ["set x: probe 'b', ask: give either ask or turns."]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "x\n', "line 1"),
        ("", "it has no name"),
        ('name = "x"', "it has no [[probe]]"),
        ('name = "x"\nprobe = "many"', "its probes are not tables"),
        ('name = "x"\nprobe = [1, 2]', "its probes are not tables"),
        ('name = "x"\na = ' + "[" * 5000, "nested too deeply"),
        (f'{MINE}must_not = ["{"a" * 501}"]', "501 characters, more than 500"),
        (f'{MINE}must_not = ["a{{99999999999}}"]', "repetition number is too large"),
        (MINE.replace("Who are you?", "x" * 6001), "6,001 characters"),
        (f"{MINE}max_words = 0", "less than 1"),
        (MINE + "#" * 500_000, "more than 500,000 bytes"),
    ],
)
def test_what_is_no_set_or_too_large_is_refused_in_words(text, said):
    assert said in "\n".join(wrong(text))


def test_rules_are_said_in_words():
    probe = probesets.read(MINE + "must_not = ['gpt']\nmin_words = 2\nmax_words = 9\nmust_end = false\n", "x").probe[0]
    assert probe.rules() == [
        "must match (?i)katherine", "must not match gpt", "at least 2 words", "at most 9 words",
        "need not end by itself",
    ]  # fmt: skip


def test_a_set_is_kept_as_it_was_written_remarks_and_all(home):
    probesets.save(home, "mine", MINE)
    assert probesets.names(home) == ["katherine", "mine"]
    assert probesets.text(home, "mine") == MINE
    assert probesets.load(home, "mine").probe[0].id == "who"
    probesets.remove(home, "mine")
    assert probesets.names(home) == ["katherine"]
    with pytest.raises(NotFound):
        probesets.load(home, "mine")


def test_saved_under_another_name_the_set_is_called_so(home):
    found = probesets.save(home, "My set-2", probesets.text(home, "katherine").replace("\n", "\r\n"))
    text = probesets.text(home, "My set-2")
    assert found.name == tomllib.loads(text)["name"] == "My set-2"
    assert text == probesets.text(home, "katherine").replace('name = "katherine"', 'name = "My set-2"')
    assert probesets.save(home, "other", MINE.replace('name = "mine"\n', "")).name == "other"


def test_a_set_that_cannot_be_read_is_not_written(home):
    probesets.save(home, "mine", MINE)
    with pytest.raises(DataError):
        probesets.save(home, "mine", MINE + "colour = 1")
    assert probesets.text(home, "mine") == MINE


def test_what_somebody_else_saved_meanwhile_is_not_written_over(home):
    probesets.save(home, "mine", MINE, over="")
    begun = probesets.sha256(probesets.text(home, "mine"))
    theirs = MINE + "max_words = 7\n"
    probesets.save(home, "mine", theirs, begun)
    with pytest.raises(KatherineError, match="somebody saved it meanwhile"):
        probesets.save(home, "mine", MINE, begun)
    with pytest.raises(KatherineError, match="the name was taken"):
        probesets.save(home, "mine", MINE, over="")
    assert probesets.text(home, "mine") == theirs


@pytest.mark.parametrize("name", ["katherine", "", "../x", "a/b", ".hidden", "x" * 61, "a\nb", "x.toml", "ä"])
def test_the_built_in_set_and_names_that_are_no_plain_file_are_refused(home, name):
    with pytest.raises(KatherineError):
        probesets.save(home, name, MINE)
    with pytest.raises(KatherineError):
        probesets.remove(home, name)
    assert probesets.names(home) == ["katherine"]


def test_a_file_is_read_by_its_path_and_a_missing_one_is_named(home, tmp_path):
    path = tmp_path / "set.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINE.encode())
    assert probesets.load(home, str(path)).name == "mine"
    for name in (str(tmp_path / "none.toml"), "nobody", "../../etc/passwd", "no/such"):
        with pytest.raises(NotFound):
            probesets.load(home, name)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        probesets.load(home, str(path))


def test_a_damaged_set_of_the_home_is_listed_and_its_text_can_be_mended(home):
    probesets.folder(home).mkdir(parents=True)
    (probesets.folder(home) / "broken.toml").write_text("name = ")
    (probesets.folder(home) / ".broken.1.ab").write_text("half written")
    assert probesets.names(home) == ["katherine", "broken"]
    assert probesets.text(home, "broken") == "name = "
    with pytest.raises(DataError, match="probe set broken"):
        probesets.load(home, "broken")
