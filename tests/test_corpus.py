import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from katherine import corpus, findings, intake, lines, probesets, runs, shelf
from katherine.errors import Busy, DataError, DiskError, NotFound
from katherine.examples import Conversation, Message, Preference
from katherine.progress import Quiet, Stopped
from katherine.settings import PROJECT, Home

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey you"}]}


def sft(*texts: str, system: str | None = None) -> dict:
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + turns}


def pair(question: str, chosen: str, rejected: str, tags: tuple[str, str] | None = ("identity", "direct")) -> dict:
    line = {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return line | ({"_cat": tags[0], "_type": tags[1]} if tags else {})


def write(path: Path, *rows: dict | str | bytes) -> Path:
    """One row a line; bytes and texts as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(row + b"\n" for row in raw))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def rejected(dataset: corpus.Dataset) -> list[dict]:
    return [problem for problem in dataset.report["problems"] if problem["severity"] == "rejected"]


def warnings(dataset: corpus.Dataset) -> list[dict]:
    return [problem for problem in dataset.report["problems"] if problem["severity"] == "warning"]


def rejects_file(dataset: corpus.Dataset) -> list[dict]:
    return [json.loads(line) for line in (dataset.path / "rejects.jsonl").read_bytes().split(b"\n")[:-1]]


def prepare_alone(file: Path, home: Path) -> tuple[dict, int]:
    """What a process of its own reports of `file`, and by how many bytes its peak of memory grew. The peak is VmHWM:
    getrusage's begins at that of the process which started it, and so hides whatever is smaller than the tests."""
    script = (
        "import json, re, sys; from pathlib import Path; from katherine import corpus, settings\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "before = peak()\n"
        "report = corpus.prepare([Path(sys.argv[1])], settings.Home(Path(sys.argv[2]))).report\n"
        "grown = peak() - before\n"
        "print(json.dumps([report, grown]))"
    )
    command = [sys.executable, "-c", script, str(file), str(home)]
    return tuple(json.loads(subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout))


class WordCount:
    """Counts as a template does, one token a word."""

    def count(self, conversation: Conversation) -> int:
        return sum(len(message.content.split()) for message in conversation.messages)

    def count_pair(self, preference: Preference) -> int:
        longer = max((preference.chosen, preference.rejected), key=lambda reply: len(reply[0].content.split()))
        return self.count(Conversation(preference.prompt + longer))


# ---------------------------------------------------------------------------------------------- whole corpora


def recipe_corpus(folder: Path, seed: int) -> Path:
    """The recipe's corpus in shape: 38 files, 6,164 lines, 1,886 unique examples, 180 curated and 30 other pairs.
    The examples are the same for every seed; files, order, key order, system turns and line ends are not."""
    rng = random.Random(seed)
    unique = [sft(f"question {n}?", f"answer {n} …")["messages"] for n in range(1886)]
    talk = unique + [rng.choice(unique) for _ in range(6164 - 1886 - 180 - 30)]
    rng.shuffle(talk)
    for number in range(35):
        rows = []
        for messages in talk[number::35]:
            if rng.random() < 0.7:
                messages = [{"role": "system", "content": f"You are k{rng.randrange(3)}."}, *messages]
            if rng.random() < 0.1:
                messages = [{"content": m["content"], "role": m["role"]} for m in messages]
            rows.append(json.dumps({"messages": messages}, ensure_ascii=bool(number % 2)))
        ends = {3: "\r\n"}.get(number, "\n")
        data = (ends.join(rows) + ("" if number == 7 else ends)).encode()
        folder.mkdir(exist_ok=True)
        (folder / f"talk_{number:02d}.jsonl").write_bytes((b"\xef\xbb\xbf" if number == 5 else b"") + data)
    curated = [pair(f"who {n}?", f"me {n}", f"a model {n}") for n in range(180)]
    others = [pair(f"why {n}?", f"so {n}", f"an assistant {n}", None) for n in range(30)]
    rng.shuffle(curated)
    rng.shuffle(others)
    write(folder / "pairs.jsonl", *curated)
    write(folder / "old_1.jsonl", *others[:18])
    write(folder / "old_2.jsonl", *others[18:])
    return folder


def test_the_recipes_corpus_has_the_recipes_counts(tmp_path, home):
    report = corpus.prepare([recipe_corpus(tmp_path / "in", seed=1)], home).report
    assert (report["files"], report["lines"]) == (38, 6164)
    assert report["sft"] == {"unique": 1886, "duplicates": 4068, "rejected": 0}
    counts = {key: report["dpo"][key] for key in ("curated", "uncurated", "used", "duplicates", "rejected")}
    assert counts == {"curated": 180, "uncurated": 30, "used": 180, "duplicates": 0, "rejected": 0}
    assert sum(file["lines"] for file in report["by_file"]) == 6164
    assert report["tokens"] is None


def test_order_of_files_lines_and_keys_changes_neither_fingerprint_nor_what_is_trained_on(tmp_path, home):
    one = corpus.prepare([recipe_corpus(tmp_path / "a", seed=1)], home)
    files = list(recipe_corpus(tmp_path / "b", seed=2).iterdir())
    random.Random(3).shuffle(files)
    two = corpus.prepare(files, home)
    assert one.fingerprint == two.fingerprint
    for name in ("sft.jsonl", "dpo.jsonl"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_the_fingerprint_is_the_same_on_every_machine(tmp_path, home):
    """Made again here from its definition, and pinned: a change would make every dataset look like another one."""
    rows = [sft("hi", 'hey, café 🙂 \u2028 "q" \\ / \t\b\x01\x7f'), sft("a", "b"), pair("who?", "me", "a model", None)]
    file = write(tmp_path / "a.jsonl", *rows)
    dataset = corpus.prepare([file], home, include_uncurated=True)
    canonical = [json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() for row in rows]
    hashes = [hashlib.blake2b(line, digest_size=16).digest() for line in canonical]
    content = b"dpo 1\n" + hashes[2] + b"sft 2\n" + b"".join(sorted(hashes[:2]))
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()
    assert dataset.fingerprint == "2f76ca4f9817b31edc6c8756549891e78cc1fae95484a418c6062b01527f8c6b"


def test_a_datasets_own_files_prepare_to_the_same_dataset(tmp_path, home):
    first = corpus.prepare([write(tmp_path / "a.jsonl", GOOD, pair("who?", "me", "a model"))], home)
    again = corpus.prepare([first.path / "sft.jsonl", first.path / "dpo.jsonl"], home)
    assert again.fingerprint == first.fingerprint
    assert again.preferences()[0].curated


@pytest.mark.parametrize(
    "other",
    [
        sft("hi", "hey you", system="You are somebody."),
        sft("  hi\r\n", "\n\they you \u00a0"),
        {"messages": [{"content": "hi", "role": "user"}, {"content": "hey you", "role": "assistant"}]},
        {"id": 7, "_score": 0.5, **GOOD},
        json.dumps(GOOD, separators=("  ,\t", " : ")) + "  \r",
        '{"messages":[{"role":"user","content":"\\u0068i"},{"r\\u006fle":"assistant","content":"hey you"}]}',
    ],
    ids=["system turn", "outer space", "key order", "harmless keys", "json space", "escapes"],
)
def test_spellings_of_one_example_are_duplicates(tmp_path, home, other):
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", GOOD, other)], home)
    assert dataset.report["sft"] == {"unique": 1, "duplicates": 1, "rejected": 0}
    assert not dataset.report["problems"]
    assert dataset.conversations() == [Conversation((Message("user", "hi"), Message("assistant", "hey you")))]


@pytest.mark.parametrize("other", [sft("hi", "hey  you"), sft("hi", "Hey you"), sft("hi", "hey you", "and?", "so.")])
def test_other_words_are_another_example(tmp_path, home, other):
    alone = corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home)
    both = corpus.prepare([write(tmp_path / "b.jsonl", GOOD, other)], home)
    assert both.report["sft"]["unique"] == 2
    assert both.fingerprint != alone.fingerprint


@pytest.mark.parametrize("text", ["🙂", "\u2764\ufe0f", "\u200b.\u200b", "\ue000", "\U0001fae8"])
def test_one_character_that_shows_is_a_reply(tmp_path, home, text):
    """The last two are of private use and newer than some Pythons' tables: no reason to call them nothing."""
    (conversation,) = corpus.prepare([write(tmp_path / "a.jsonl", sft("hi", text))], home).conversations()
    assert conversation.messages[1].content == text


def test_inner_line_ends_become_lf_and_nothing_else_changes(tmp_path, home):
    text = "one\r\ntwo\u2028three\u0085 \x0bfour  \u200b<|im_end|>"
    (conversation,) = corpus.prepare([write(tmp_path / "a.jsonl", sft("hi", f" {text} "))], home).conversations()
    assert conversation.messages[1].content == text.replace("\r\n", "\n")


# ---------------------------------------------------------------------------------------------- bad lines


def deep(depth: int) -> str:
    return '{"messages": ' + "[" * depth + "]" * depth + "}"


BAD = {
    "cut off": (b'{"messages": [{"role": "user", "con', "ends before its object does"),
    "comma after": (json.dumps(GOOD).encode() + b",", "more text after the object"),
    "two objects": (json.dumps(GOOD).encode() * 2, "more text after the object"),
    "not JSON": (b"{messages: 1}", "invalid JSON at column 2"),
    "control character": (b'{"messages": "a\tb"}', "Invalid control character"),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not valid UTF-8: byte 0xff"),
    "invalid UTF-8 in a key": (b'{"\xc0\x80": 1}', "not valid UTF-8"),
    "UTF-16": ('{"messages": []}'.encode("utf-16"), "not valid UTF-8"),
    "inner BOM": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "byte-order mark inside the file"),
    "NaN": ('{"x": NaN, "messages": []}', "NaN is not JSON"),
    "infinity": ('{"x": -Infinity, "messages": []}', "-Infinity is not JSON"),
    "1e999": (json.dumps(GOOD)[:-1] + ', "x": 1e999}', "number out of range: 1e999"),
    "5,000 digits": (json.dumps(GOOD)[:-1] + ', "_x": ' + "1" * 5000 + "}", "number out of range: of 5,000 characters"),
    "lone surrogate": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "lone surrogate, \\ud83d"),
    "lone surrogate in an ignored key": (json.dumps(GOOD)[:-1] + ', "_\\udc00": 1}', "lone surrogate, \\udc00"),
    "surrogate as bytes": (b'{"messages": "\xed\xa0\x80"}', "not valid UTF-8"),
    "100,000 deep": (deep(100_000), "nested too deeply"),
    "100,000 deep in an ignored key": (f'{{"_x": {deep(100_000)}}}', "nested too deeply"),
    "100,000 open": ("[" * 100_000, "nested too deeply"),
    "duplicate key": (json.dumps(GOOD)[:-1] + ', "messages": []}', "duplicate key 'messages'"),
    "duplicate role": (json.dumps(GOOD).replace('"role"', '"role": "user", "role"', 1), "duplicate key 'role'"),
    "duplicate key, escaped": (
        json.dumps(GOOD).replace('"role"', '"r\\u006fle": "user", "role"', 1),
        "duplicate key 'role'",
    ),
    "duplicate key in an ignored key": (json.dumps(GOOD)[:-1] + ', "_x": {"a": 1, "a": 1}}', "duplicate key 'a'"),
    "duplicate tag": (json.dumps(pair("q", "a", "b"))[:-1] + ', "_cat": "x"}', "duplicate key '_cat'"),
    "an array": (json.dumps([GOOD]), "this is a JSON array"),
    "a text": ('"messages"', "must be a JSON object, found a text"),
    "a number": ("17", "must be a JSON object, found a number"),
    "another schema": ('{"conversations": [], "x": 1}', "keys: 'conversations', 'x'"),
    "no keys": ("{}", "keys: none"),
    "both kinds": (GOOD | pair("q", "a", "b"), "both `messages` and keys of a preference pair"),
    "messages is null": ({"messages": None}, "`messages` must be a list of messages, found null"),
    "messages is a text": ({"messages": "hi"}, "found a text"),
    "no messages": ({"messages": []}, "there are no messages"),
    "message is a text": ({"messages": ["hi"]}, "`messages` 1 must be an object"),
    "no content": ({"messages": [{"role": "user"}]}, "`messages` 1 has no `content`"),
    "content is a number": (sft("hi", 5), "`messages` 2 must have a text as `content`, found a number"),
    "content is null": (sft("hi", None), "found null"),
    "content is parts": (sft("hi", [{"type": "text", "text": "x"}]), "found a list"),
    "system content is a number": (sft("a", "b", system=5), "must have a text as `content`"),
    "role is a number": ({"messages": [{"role": 1, "content": "x"}]}, "a text as `role`, found a number"),
    "role is true": ({"messages": [{"role": True, "content": "x"}]}, "found true or false"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    "capital role": ({"messages": [{"role": "User", "content": "x"}]}, "unknown role 'User'"),
    "ends with the user": (sft("hi", "hey", "and?"), "does not end with the assistant"),
    "begins with the assistant": ({"messages": GOOD["messages"][1:]}, "begins with the assistant"),
    "twice the user": (
        {"messages": [GOOD["messages"][0], {"role": "system", "content": "x"}, *GOOD["messages"]]},
        "turns 1 and 2 (system turns left out) are both the user's",
    ),
    "twice the assistant": ({"messages": [*GOOD["messages"], GOOD["messages"][1]]}, "both the assistant's"),
    "only system": ({"messages": [{"role": "system", "content": "x"}]}, "nothing is left after system turns"),
    "empty turn": (sft("hi", ""), "empty turn: turn 2 (assistant)"),
    "blank turn": (sft(" \r\n\u2003", "hey"), "empty turn: turn 1 (user)"),
    "zero-width turn": (sft("hi", "\u200b\ufeff \u2060\u00ad\u200d\n"), "empty turn: turn 2 (assistant)"),
    "NUL turn": (sft("\x00\x00", "hey"), "empty turn: turn 1 (user)"),
    "think": (sft("hi", "<think>hm</think>hey"), "thoughts are never learned"),
    "think, escaped": ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
                       '"\\u003cTHINK\\u003e y"}]}', "thoughts are never learned"),
    "end of a thought": (sft("hi", "hm </think> hey", "so?", "so."), "turn 2: the assistant's text holds <think>"),
    "thoughts apart": (
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"reasoning_content": "hm"}]},
        "carries 'reasoning_content'",
    ),
    "not to be learned": (
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"weight": 0}]}, "carries 'weight'"
    ),
    "chosen equals rejected": (pair("q", "same ", "same"), "chosen equals rejected"),
    "no rejected": ({"prompt": [], "chosen": []}, "missing: rejected"),
    "prompt is a text": (pair("q", "a", "b") | {"prompt": "q"}, "`prompt` must be a list of messages, found a text"),
    "prompt ends with the assistant": (
        pair("q", "a", "b") | {"prompt": GOOD["messages"]}, "`prompt` does not end with the user"
    ),
    "empty prompt": (pair("q", "a", "b") | {"prompt": []}, "`prompt`: there are no messages"),
    "empty question": (pair(" ", "a", "b"), "`prompt`: empty turn"),
    "empty rejected": (pair("q", "a", " "), "empty turn: `rejected`"),
    "zero-width chosen": (pair("q", "\u200e\ufe0f\u3164", "b"), "empty turn: `chosen`"),
    "two replies": (pair("q", "a", "b") | {"chosen": GOOD["messages"][1:] * 2}, "found assistant, assistant"),
    "chosen by the user": (pair("q", "a", "b") | {"chosen": GOOD["messages"][:1]}, "found user"),
    "think in rejected": (pair("q", "a", "<think></think>b"), "`rejected`: the assistant's text holds <think>"),
    "tag is a number": (pair("q", "a", "b") | {"_cat": 3}, "`_cat` must be a text, found a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_kept_and_the_rest_goes_on(tmp_path, home, name):
    line, reason = BAD[name]
    before, after = sft("before", "yes"), sft("after", "yes")
    dataset = corpus.prepare([write(tmp_path / "bad.jsonl", before, "", line, after)], home)
    assert dataset.report["sft"]["unique"] == 2
    (problem,) = rejected(dataset)
    assert (problem["file"], problem["line"]) == ("bad.jsonl", 3)
    assert reason in problem["reason"]
    assert len(problem["text"]) <= intake.SHOWN_TEXT
    (entry,) = rejects_file(dataset)
    assert (entry["file"], entry["line"], entry["reason"]) == ("bad.jsonl", 3, problem["reason"])
    raw = (dataset.path / "raw" / "bad.jsonl").read_bytes()
    assert raw == (tmp_path / "bad.jsonl").read_bytes()
    assert entry["text"] == raw.split(b"\n")[2].decode(errors="backslashreplace")
    counts = dataset.report
    assert counts["sft"]["rejected"] + counts["dpo"]["rejected"] + counts["unrecognised"] == 1
    assert counts["lines"] == 3


def test_a_rejected_line_counts_with_the_kind_it_meant_to_be(tmp_path, home):
    file = write(tmp_path / "a.jsonl", GOOD, sft("hi", ""), pair("q", "x", "x"), pair("q", "x", "x"), "{")
    report = corpus.prepare([file], home).report
    assert (report["sft"]["rejected"], report["dpo"]["rejected"], report["unrecognised"]) == (1, 2, 1)


def test_a_sound_line_may_look_suspicious(tmp_path, home):
    rows = [
        sft('the key "role" and "content"', '"messages": "role"'),
        sft("role", "content", "messages", '"'),
        json.dumps(sft("\\u006f is an o", "I know")),
        json.dumps(sft("🙂", "🙂")),
        pair('"chosen"', '"rejected"', "prompt"),
    ]
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    assert not rejected(dataset)
    assert dataset.report["sft"]["unique"] == 4
    assert {c.messages[0].content for c in dataset.conversations()} == {row["messages"][0]["content"] for row in
        (rows[0], rows[1], sft("\\u006f is an o"), sft("🙂"))}  # fmt: skip


def test_the_fast_way_and_the_strict_way_agree():
    """Lines broken and twisted at random: never does the typed decoder let pass what the strict reader refuses, or
    read something else."""

    def outcome(read, raw):
        try:
            return read(raw)[0]
        except lines.Rejected:
            return None

    rng = random.Random(5)
    seeds = [
        json.dumps(line, ensure_ascii=ascii_only).encode()
        for line in (GOOD, sft("é\n🙂", 'say "hi"', system="x"), pair("q", "a\\", "b <x>"), pair("q", "a", "b", None))
        for ascii_only in (True, False)
    ]
    bits = [b'"', b"\\", b"\\u006f", b"\\ud83d", b"{", b"}", b",", b":", b'"role"', b'"content":"x",', b'"_cat":"x",']
    bits += [b'"role":"user",', b'"r\\u006fle":"user",', b"\xff", b"\xc3", b"\x00", b"1e999", b"NaN", b" ", b"null"]
    bits += [b'"messages":[],', b'"id":1,', b"user", b"assistant", b"system", b"[", b"]", b"\\n", b"\xef\xbb\xbf"]
    accepted = 0
    for _ in range(30_000):
        raw = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(raw) + 1)
            raw = raw[:at] + rng.choice(bits) * rng.randrange(2) + raw[at + rng.choice((0, 0, 1, 4)) :]
        fast = outcome(lines.read, raw)
        assert fast == outcome(lines._read_strictly, raw), raw
        accepted += fast is not None
    assert 2_000 < accepted < 28_000


def test_ignored_keys_are_warned_about_once_a_file(tmp_path, home):
    named = {"messages": [GOOD["messages"][0] | {"name": "Ann"}, GOOD["messages"][1]], "score": 3}
    (problem,) = warnings(corpus.prepare([write(tmp_path / "a.jsonl", GOOD, named, named)], home))
    assert (problem["line"], problem["file"]) == (2, "a.jsonl")
    assert problem["reason"] == "ignored keys: 'name', 'score' (and in 1 more lines of this file)"


def test_a_users_think_tag_is_text_and_warned_about(tmp_path, home):
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", sft("what is <think>?", "no idea"))], home)
    assert dataset.report["sft"]["unique"] == 1
    assert "plain text" in warnings(dataset)[0]["reason"]


def test_many_foreign_keys_take_no_quadratic_time(tmp_path, home):
    keys = {f"k{n}": n for n in range(200_000)}
    twice = json.dumps(keys)[:-1] + ', "k199999": 0}'
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", GOOD, GOOD | keys, twice)], home)
    assert dataset.report["sft"]["duplicates"] == 1
    assert "duplicate key 'k199999'" in rejected(dataset)[0]["reason"]
    assert "…" in warnings(dataset)[0]["reason"]


# ---------------------------------------------------------------------------------------------- lines and files


def test_a_100_mb_line_is_rejected_by_size_in_little_memory(tmp_path):
    file = tmp_path / "big.jsonl"
    with file.open("wb") as out:
        out.write(json.dumps(sft("before", "yes")).encode() + b'\n{"messages": "')
        for _ in range(100):
            out.write(b"x" * 2**20)
        out.write(b'"}\n' + json.dumps(sft("after", "yes")).encode())
    report, grown = prepare_alone(file, tmp_path / "home")
    assert report["sft"] == {"unique": 2, "duplicates": 0, "rejected": 1}
    assert report["problems"][0]["line"] == 2
    assert report["problems"][0]["reason"] == "the line has 104,857,616 bytes; the limit is 8,388,608"
    assert grown < 8 * intake.MAX_LINE
    folder = Path(report["path"])
    (entry,) = (json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines())
    assert entry["shortened"] is True
    assert len(entry["text"]) == intake.MAX_REJECT
    assert (folder / "raw" / "big.jsonl").stat().st_size == file.stat().st_size


def test_a_line_of_just_the_limit_is_read(tmp_path, home):
    empty = len(json.dumps(sft("q", "")))
    fits, too_long = sft("q", "x" * (intake.MAX_LINE - empty)), sft("q", "y" * (intake.MAX_LINE - empty + 1))
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", fits, too_long, GOOD)], home)
    assert dataset.report["sft"] == {"unique": 2, "duplicates": 0, "rejected": 1}
    assert rejected(dataset)[0]["line"] == 2


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path, home):
    first, last = json.dumps(sft("one", "1")).encode(), json.dumps(sft("two", "2\u2028\u0085"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n \r\n" + last.encode())
    dataset = corpus.prepare([tmp_path / "a.jsonl"], home)
    assert not dataset.report["problems"]
    assert (dataset.report["lines"], dataset.report["sft"]["unique"]) == (2, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"\n\n \r\n", "the file is empty"),
        (b"{}\n{\n", "nothing usable: all 2 lines are rejected"),
        (json.dumps([GOOD]).encode(), "this is one JSON array; write one object a line"),
        (json.dumps([GOOD, GOOD], indent=2).encode(), "this is one JSON array"),
        (b"\xef\xbb\xbf[\n" + b",\n".join([json.dumps(GOOD).encode()] * 3) + b"\n]\n", "this is one JSON array"),
        (b"[]", "this is one JSON array"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json"])
def test_a_file_with_nothing_usable_says_so(tmp_path, home, name, content, reason):
    (tmp_path / name).write_bytes(content)
    good = write(tmp_path / "good.jsonl", GOOD)
    dataset = corpus.prepare([tmp_path / name, good], home)
    (problem,) = [problem for problem in rejected(dataset) if problem["line"] is None]
    assert problem["file"] == name
    assert reason in problem["reason"]
    assert dataset.report["sft"]["unique"] == 1
    lines_there = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))
    assert dataset.report["lines"] == lines_there + 1
    assert [entry["line"] for entry in rejects_file(dataset)] == list(range(1, lines_there + 1))
    with pytest.raises(DataError, match=reason.split(";")[0].split(":")[0]):
        corpus.prepare([tmp_path / name], home)


@pytest.mark.parametrize("first", ["[1, 2]", json.dumps([GOOD]), "[" * 1000, "[oops"])
def test_a_line_that_is_an_array_does_not_condemn_its_file(tmp_path, home, first):
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", first, GOOD, json.dumps([GOOD]))], home)
    assert dataset.report["sft"]["unique"] == 1
    assert [problem["line"] for problem in rejected(dataset)] == [1, 3]


def test_nothing_usable_at_all_gives_the_top_reasons_and_leaves_nothing(tmp_path, home):
    file = write(tmp_path / "a.jsonl", *[sft("hi", "")] * 3, "{")
    with pytest.raises(DataError) as error:
        corpus.prepare([file, write(tmp_path / "b.jsonl")], home)
    assert "- a.jsonl, line 1: empty turn: turn 2 (assistant) has no text (3 times)" in str(error.value)
    assert "b.jsonl: nothing usable: the file is empty" in str(error.value)
    assert not list(home.datasets.iterdir())


def test_only_uncurated_pairs_are_an_error_unless_asked_for(tmp_path, home):
    file = write(tmp_path / "a.jsonl", pair("q", "a", "b", None))
    with pytest.raises(DataError, match="nothing here but 1 uncurated"):
        corpus.prepare([file], home)
    assert corpus.prepare([file], home, include_uncurated=True).report["dpo"]["used"] == 1


def test_wrong_paths_are_all_named(tmp_path, home):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        corpus.prepare([write(tmp_path / "a.jsonl", GOOD), tmp_path / "empty", tmp_path / "gone.jsonl"], home)
    assert "empty is a folder without any .jsonl file" in str(error.value)
    assert "gone.jsonl does not exist" in str(error.value)
    with pytest.raises(DataError, match="No files were named"):
        corpus.prepare([], home)


def test_folders_are_read_to_the_bottom_and_names_stay_apart(tmp_path, home):
    write(tmp_path / "in" / "x.jsonl", sft("1", "x"))
    write(tmp_path / "in" / "deep" / "er" / "x.jsonl", sft("2", "x"))
    write(tmp_path / "in" / "notes.txt", "not data")
    write(tmp_path / "in" / "folder.jsonl" / "y.jsonl", sft("4", "x"))
    other = write(tmp_path / "other" / "x.jsonl", sft("3", "x"), "{")
    dataset = corpus.prepare([tmp_path / "in", other, tmp_path / "in" / "x.jsonl"], home)
    files = {file["file"]: file["raw"] for file in dataset.report["by_file"]}
    assert set(files) == {"in/x.jsonl", "deep/er/x.jsonl", "other/x.jsonl", "folder.jsonl/y.jsonl"}
    assert len(set(files.values())) == 4
    assert (dataset.path / "raw" / files["other/x.jsonl"]).read_bytes() == other.read_bytes()
    assert rejected(dataset)[0]["file"] == "other/x.jsonl"
    assert dataset.report["sft"]["unique"] == 4


def test_a_folders_jsonl_files_are_read_whatever_their_case_and_its_json_files_are_named(tmp_path, home):
    folder = tmp_path / "in"
    write(folder / "a.jsonl", sft("1", "x"))
    write(folder / "B.JSONL", sft("2", "x"))
    write(folder / "b.Jsonl", sft("3", "x"))
    (folder / "c.json").write_text(json.dumps([GOOD]))
    write(folder / "deep" / "D.JSON", GOOD)
    for other in ("probes.toml", "notes.txt", "read.md", "jsonl", "e.json.bak"):
        (folder / other).write_text("not data")
    dataset = corpus.prepare([folder], home)
    assert [file["file"] for file in dataset.report["by_file"]] == ["B.JSONL", "a.jsonl", "b.Jsonl"]
    assert dataset.report["sft"]["unique"] == 3
    assert [(p["file"], p["line"]) for p in dataset.report["problems"]] == [("c.json", None), ("deep/D.JSON", None)]
    for problem in warnings(dataset):
        assert problem["reason"].startswith("not read: ")
        assert "put one object a line into a .jsonl file" in problem["reason"]
    assert all((dataset.path / "raw" / file["raw"]).match("*.jsonl") for file in dataset.report["by_file"])


@pytest.mark.parametrize("folder_first", [True, False])
def test_a_json_file_that_is_named_itself_is_read(tmp_path, home, folder_first):
    paths = [tmp_path / "in", write(tmp_path / "in" / "c.json", sft("1", "x"))]
    write(tmp_path / "in" / "a.jsonl", GOOD)
    dataset = corpus.prepare(paths if folder_first else paths[::-1], home)
    assert dataset.report["sft"]["unique"] == 2
    assert not dataset.report["problems"]


def test_a_folder_of_json_files_alone_is_refused_and_they_are_named(tmp_path, home):
    write(tmp_path / "in" / "c.json", GOOD)
    with pytest.raises(DataError, match=r"(?s)without any \.jsonl file.*c\.json.*put one object a line"):
        corpus.prepare([tmp_path / "in"], home)


@pytest.mark.parametrize(
    "name",
    ["x" * 250, "x" * 249 + ".jsonl", "é" * 125, os.fsdecode(b"\xe9" * 90)],
    ids=["no suffix", "with suffix", "two bytes a letter", "not UTF-8"],
)
def test_a_name_as_long_as_file_systems_take_is_shortened_in_raw(tmp_path, home, name):
    one, two = write(tmp_path / "1" / name, GOOD, "{"), write(tmp_path / "2" / name, sft("2", "x"))
    dataset = corpus.prepare([one, two], home)
    assert dataset.report["sft"]["unique"] == 2
    label = os.fsencode(f"1/{name}").decode(errors="backslashreplace")
    assert rejected(dataset)[0]["file"] == label
    raw = {file["file"]: dataset.path / "raw" / file["raw"] for file in dataset.report["by_file"]}
    assert raw[label].read_bytes() == one.read_bytes()
    assert len(set(raw.values())) == 2


def test_a_file_name_that_is_not_utf_8_is_still_named(tmp_path, home):
    write(tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl"), GOOD, "{")
    dataset = corpus.prepare([tmp_path / "in"], home)
    assert rejected(dataset)[0]["file"] == "caf\\xe9.jsonl"


# ---------------------------------------------------------------------------------------------- pairs


def test_curated_and_uncurated_pairs_are_told_apart(tmp_path, home):
    half = pair("q3", "a", "b", None) | {"_cat": "warmth"}
    blank = pair("q4", "a", "b", (" ", "direct"))
    rows = [pair("q1", "a", "b"), pair("q2", "a", "b", None), half, blank, pair("q1", "a", "b", None)]
    report = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    dpo = report.report["dpo"]
    assert (dpo["curated"], dpo["uncurated"], dpo["used"], dpo["duplicates"]) == (1, 3, 1, 1)
    assert [p.prompt[0].content for p in report.preferences()] == ["q1"]
    assert (report.preferences()[0].category, report.preferences()[0].type) == ("identity", "direct")
    everything = corpus.prepare([tmp_path / "a.jsonl"], home, include_uncurated=True)
    assert everything.report["dpo"]["used"] == len(everything.preferences()) == 4
    assert everything.fingerprint != report.fingerprint


def test_a_pair_that_is_curated_anywhere_is_curated_whatever_the_order(tmp_path, home):
    rows = [pair("q", "a", "b", None), pair("q", "a", "b", ("z", "y")), pair("q", "a", "b", ("c", "d"))]
    forwards = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    backwards = corpus.prepare([write(tmp_path / "b.jsonl", *reversed(rows))], home)
    assert forwards.report["dpo"]["curated"] == backwards.report["dpo"]["curated"] == 1
    assert forwards.preferences() == backwards.preferences()
    assert forwards.preferences()[0].category == "c"


def test_swapped_pairs_are_both_left_out(tmp_path, home):
    one = write(tmp_path / "a.jsonl", pair("q", "yes", "no"), pair("r", "yes", "no"))
    two = write(tmp_path / "b.jsonl", "", pair("q", "no", "yes"), pair("q", "no", "yes"))
    dataset = corpus.prepare([one, two], home)
    dpo = dataset.report["dpo"]
    assert (dpo["curated"], dpo["used"], dpo["rejected"], dpo["duplicates"]) == (1, 1, 2, 1)
    assert [(p["file"], p["line"]) for p in rejected(dataset)] == [("a.jsonl", 1), ("b.jsonl", 2)]
    assert rejected(dataset)[0]["reason"] == "chosen and rejected are swapped in b.jsonl, line 2; both are left out"
    assert json.loads(rejects_file(dataset)[1]["text"]) == pair("q", "no", "yes")
    assert [p.prompt[0].content for p in dataset.preferences()] == ["r"]


def test_nothing_but_contradictions_is_an_error(tmp_path, home):
    rows = [pair("q", "yes", "no"), pair("q", "no", "yes"), pair("q", "no", "yes")]
    with pytest.raises(DataError, match=r"(?s)can be used.*are swapped in a.jsonl, line 2"):
        corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)


def test_a_curated_pair_stands_against_an_uncurated_swap(tmp_path, home):
    file = write(tmp_path / "a.jsonl", pair("q", "yes", "no"), pair("q", "no", "yes", None))
    dataset = corpus.prepare([file], home, include_uncurated=True)
    assert dataset.preferences()[0].chosen[0].content == "yes"
    assert dataset.report["dpo"]["used"] == 1
    assert [p["line"] for p in rejected(dataset)] == [2]
    assert [p["line"] for p in warnings(dataset)] == [1]


def test_conflicting_preferences_are_flagged_and_kept(tmp_path, home):
    rows = [pair("q", "b", "c"), pair("q", "a", "b"), pair("other", "b", "a"), pair("q", "d", "e")]
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    assert dataset.report["dpo"]["used"] == 4
    assert [(p["line"], p["reason"]) for p in warnings(dataset)] == [
        (1, "conflicting preferences: the reply chosen here is rejected in a.jsonl, line 2"),
        (2, "conflicting preferences: the reply rejected here is chosen in a.jsonl, line 1"),
    ]


def test_a_reply_learned_in_sft_and_rejected_in_dpo_is_flagged(tmp_path, home):
    rows = [sft("hi", "I am an AI.", "oh", "really"), sft("I am an AI.", "no"), pair("q", "a", " I am an AI.")]
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    (problem,) = warnings(dataset)
    assert (problem["line"], problem["reason"]) == (
        1,
        "an assistant's turn equals the rejected reply of a.jsonl, line 3",
    )
    assert dataset.report["sft"]["unique"] == 2


@pytest.mark.parametrize(
    ("longer", "shorter", "biased"), [(20, 0, True), (0, 20, True), (14, 6, False), (110, 50, True), (8, 0, False)]
)
def test_length_bias_is_flagged_when_length_alone_would_do(tmp_path, home, longer, shorter, biased):
    rows = [pair(f"q{n}", "a much longer reply", "no") for n in range(longer)]
    rows += [pair(f"r{n}", "no", "a much longer reply") for n in range(shorter)]
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home)
    found = [p for p in warnings(dataset) if "length bias" in p["reason"]]
    assert bool(found) is biased is dataset.report["dpo"]["lengths"]["biased"]
    if biased:
        share = longer / (longer + shorter)
        assert f"longer one in {share:.0%} of {longer + shorter} pairs" in found[0]["reason"]
        assert (found[0]["file"], found[0]["line"]) == ("", None)


# ---------------------------------------------------------------------------------------------- tokens


def test_percentiles_are_by_nearest_rank():
    assert findings.spread(range(1, 101), 98) == {"p50": 50, "p90": 90, "p99": 99, "max": 100, "over_max_length": 2}
    assert findings.spread([7], 7) == {"p50": 7, "p90": 7, "p99": 7, "max": 7, "over_max_length": 0}
    assert findings.spread([], 7) is None


def test_tokens_are_counted_by_the_template(tmp_path, home):
    rows = [sft("w " * n, "w") for n in range(1, 11)] + [pair("a b", "c", "d e f"), pair("x", "y", "z", None)]
    dataset = corpus.prepare(
        [write(tmp_path / "a.jsonl", *rows)], home, template=WordCount(), base="words", max_length=10
    )
    tokens = dataset.report["tokens"]
    assert tokens | {"pairs": None} == {
        "p50": 6, "p90": 10, "p99": 11, "max": 11, "over_max_length": 1, "max_length": 10, "base": "words",
        "pairs": None,
    }  # fmt: skip
    assert tokens["pairs"] == {"p50": 5, "p90": 5, "p99": 5, "max": 5, "over_max_length": 0}
    (problem,) = warnings(dataset)
    assert (problem["line"], problem["reason"]) == (10, "11 tokens; training takes up to 10 and leaves this one out")


def test_tokens_of_pairs_alone(tmp_path, home):
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", pair("a b", "c", "d e f"))], home, template=WordCount())
    assert dataset.report["tokens"]["p50"] == dataset.report["tokens"]["pairs"]["p50"] == 5


# ---------------------------------------------------------------------------------------------- the folder


def test_the_same_input_finds_the_same_dataset(tmp_path, home):
    file = write(tmp_path / "a.jsonl", GOOD, "{")
    first = corpus.prepare([file], home, name="k0")
    again = corpus.prepare([file], home, name="k0")
    assert first.path == again.path == home.datasets / f"k0-{first.fingerprint[:8]}"
    assert first.report == again.report == corpus.load(home, first.id).report
    assert [path.name for path in home.datasets.iterdir()] == [first.id]


def test_a_report_never_speaks_of_other_input_or_options(tmp_path, home):
    plain = corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home)
    counted = corpus.prepare([tmp_path / "a.jsonl"], home, template=WordCount())
    noisy = corpus.prepare([write(tmp_path / "b.jsonl", GOOD, GOOD, "{")], home)
    assert plain.fingerprint == counted.fingerprint == noisy.fingerprint
    assert [d.id.removeprefix(plain.id) for d in (plain, counted, noisy)] == ["", "-2", "-3"]
    assert counted.report["tokens"]["max"] == 3
    assert noisy.report["sft"]["rejected"] + noisy.report["unrecognised"] == 1


def test_a_dataset_appears_whole_or_not_at_all(tmp_path, home):
    class Broken(WordCount):
        def count(self, conversation: Conversation) -> int:
            raise DataError("cannot be rendered")

    with pytest.raises(DataError, match="cannot be rendered"):
        corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home, template=Broken())
    assert not list(home.datasets.iterdir())
    dataset = corpus.prepare([tmp_path / "a.jsonl"], home)
    there = {path.name for path in dataset.path.iterdir()}
    assert there == {
        "raw", "sft.jsonl", "dpo.jsonl", "rejects.jsonl", "uncurated.jsonl", "problems.jsonl", "summary.json",
        "report.json",
    }  # fmt: skip
    assert [path.name for path in home.datasets.iterdir()] == [dataset.id]


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, home):
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**42)  # 4 TiB of nothing: a hole takes no room
    with pytest.raises(DiskError, match="GB free"):
        corpus.prepare([tmp_path / "huge.jsonl"], home)
    assert not home.root.exists()


def test_a_full_disk_is_an_error_that_keeps_nothing(tmp_path, home):
    """A limit on file size stands for the disk: the kernel refuses the write in the same place."""
    rows = [sft(f"question {n}", "x" * 1000) for n in range(2000)]
    script = (
        "import resource, signal, sys; from pathlib import Path; from katherine import corpus, errors, settings\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: corpus.prepare([Path(sys.argv[1])], settings.Home(Path(sys.argv[2])))\n"
        "except errors.DiskError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(write(tmp_path / "a.jsonl", *rows)), str(home.root)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert not list(home.datasets.iterdir())


def test_an_unknown_or_damaged_dataset_is_named(tmp_path, home):
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home)
    for wrong in ("nothing-00000000", "../datasets", ".", "", "a/b"):
        with pytest.raises(NotFound, match=dataset.id):
            corpus.load(home, wrong)
    (dataset.path / "report.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        corpus.load(home, dataset.id)


def test_a_name_that_is_no_file_name_is_refused(tmp_path, home):
    for wrong in ("", "../x", ".x", "a b", "x" * 65):
        with pytest.raises(DataError, match="cannot name a dataset"):
            corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home, name=wrong)


def test_preparing_takes_flat_memory_for_each_line(tmp_path):
    """The promise of a million lines in 1 GB, at a hundredth: what a line adds is hashes and places, not text."""
    rows = (sft(f"question {n}", f"{n} " * 1000) for n in range(10_000))
    file = write(tmp_path / "a.jsonl", *rows)
    assert file.stat().st_size > 40e6
    assert prepare_alone(file, tmp_path / "home")[1] < 25e6


def test_a_rejected_line_takes_memory_for_its_place_alone(tmp_path):
    """310 bytes are promised; on top come the 10,000 texts that are shown and the buffers."""
    row = json.dumps(sft("question", "")) + " " * 600
    file = write(tmp_path / "a.jsonl", GOOD, *(f"{row}{n}" for n in range(60_000)))
    report, grown = prepare_alone(file, tmp_path / "home")
    assert report["sft"]["rejected"] == len(report["problems"]) == 60_000
    assert grown < 60_000 * 310 + 8e6


def test_every_rejected_line_is_named_and_the_first_of_them_show_their_text(tmp_path, home, monkeypatch):
    monkeypatch.setattr(intake, "SHOWN_TEXTS", 3)
    rows = [sft(f"hi {n}", "") for n in range(5)] + [sft("w " * 20, "w")]
    dataset = corpus.prepare([write(tmp_path / "a.jsonl", *rows)], home, template=WordCount(), max_length=10)
    assert [p["line"] for p in rejected(dataset)] == [1, 2, 3, 4, 5]
    assert {p["reason"] for p in rejected(dataset)} == {"empty turn: turn 2 (assistant) has no text"}
    assert [bool(p["text"]) for p in dataset.report["problems"]] == [True, True, True, False, False, False]
    assert [json.loads(entry["text"]) for entry in rejects_file(dataset)] == rows[:5]


# ---------------------------------------------------------------------------------------------- what goes in


def test_a_file_that_is_left_out_is_kept_but_not_read(tmp_path, home):
    a, b = write(tmp_path / "a.jsonl", sft("a", "1"), pair("q", "x", "y")), write(tmp_path / "b.jsonl", GOOD, "{")
    without = corpus.prepare([a, b], home, leave_out=["b.jsonl"])
    assert (without.report["files"], without.report["lines"], without.report["sft"]["unique"]) == (1, 2, 1)
    assert without.report["unrecognised"] == 0 and not rejected(without)
    assert [file.get("left_out", False) for file in without.report["by_file"]] == [False, True]
    assert (without.path / "raw" / "b.jsonl").read_bytes() == b.read_bytes()
    assert without.fingerprint == corpus.prepare([a], home).fingerprint
    by_path = corpus.prepare([a, b], home, leave_out=[str(b)])
    assert by_path.path == without.path


def test_what_is_left_out_must_be_there_and_something_must_be_left(tmp_path, home):
    a, b = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no file 'c.jsonl' to leave out. There are: a.jsonl, b.jsonl"):
        corpus.prepare([a, b], home, leave_out=["c.jsonl"])
    with pytest.raises(DataError, match="Every file is left out"):
        corpus.prepare([a, b], home, leave_out=["a.jsonl", "b.jsonl"])
    assert not home.root.exists()


def test_uncurated_pairs_are_chosen_by_their_content_hash(tmp_path, home):
    rows = [pair(f"q{n}", "yes", "no", None) for n in range(5)] + [pair("c", "yes", "no")]
    file = write(tmp_path / "a.jsonl", *rows)
    listed = shelf.uncurated(home, corpus.prepare([file], home).id, 10)
    assert sorted(pair.prompt for pair in listed) == [f"q{n}" for n in range(5)]
    assert {(pair.file, pair.used) for pair in listed} == {("a.jsonl", False)}
    chosen = [pair.id for pair in listed if pair.prompt in ("q1", "q3")]
    dataset = corpus.prepare([file], home, include_uncurated=chosen)
    assert sorted(p.prompt[0].content for p in dataset.preferences()) == ["c", "q1", "q3"]
    assert dataset.report["dpo"]["used"] == 3 and dataset.report["dpo"]["uncurated"] == 5
    assert dataset.report["options"]["include_uncurated"] == sorted(chosen)
    assert sum(pair.used for pair in shelf.uncurated(home, dataset.id, 10)) == 2


def test_a_chosen_pair_that_is_not_there_is_said_and_a_hash_that_is_none_is_refused(tmp_path, home):
    file = write(tmp_path / "a.jsonl", GOOD, pair("q", "yes", "no", None))
    dataset = corpus.prepare([file], home, include_uncurated=["00" * 16])
    assert [p["reason"] for p in warnings(dataset)] == ["1 of the 1 chosen uncurated pairs are not in these files"]
    with pytest.raises(DataError, match="content hash"):
        corpus.prepare([file], home, include_uncurated=["all"])


def test_a_change_of_what_goes_in_is_another_dataset_with_the_same_names(tmp_path, home):
    write(tmp_path / "in" / "deep" / "a.jsonl", sft("a", "1"))
    write(tmp_path / "in" / "b.jsonl", GOOD, pair("q", "yes", "no", None))
    first = corpus.prepare([tmp_path / "in"], home, name="k0")
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    less = corpus.change(home, first.id, leave_out=["deep/a.jsonl"], include_uncurated=True, name="k0")
    assert [file["file"] for file in less.report["by_file"]] == ["b.jsonl", "deep/a.jsonl"]
    assert (less.report["sft"]["unique"], less.report["dpo"]["used"]) == (1, 1)
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before
    # What was left out is put back in from the dataset's own files.
    back = corpus.change(home, less.id, name="k0")
    assert back.fingerprint == first.fingerprint and back.id == first.id
    with pytest.raises(NotFound):
        corpus.change(home, "nothing-0000")


def test_preparing_says_where_it_is_and_stops_when_told(tmp_path, home, monkeypatch):
    monkeypatch.setattr(intake, "OFTEN", 10)
    file = write(tmp_path / "a.jsonl", *(sft(f"q{n}", "x" * 2000) for n in range(1000)))

    class Told(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[int, int]] = []
            self.stop_at: int | None = None

        def step(self, step: int, of: int) -> None:
            self.steps.append((step, of))

        def stop_requested(self) -> bool:
            return self.stop_at is not None and self.steps[-1][0] >= self.stop_at

    told = Told()
    corpus.prepare([file], home, progress=told)
    assert told.phases == ["read", "count"]
    assert told.steps == sorted(told.steps, key=lambda step: step[0]) and told.steps[-1] == (2, 2)
    told.stop_at = 1
    told.steps.clear()
    with pytest.raises(Stopped):
        corpus.prepare([file], home, progress=told, name="other")
    assert [path.name[:8] for path in home.datasets.iterdir()] == ["dataset-"]


def test_a_draft_left_by_a_killed_process_goes_and_a_fresh_one_stays(tmp_path, home):
    for name, age in (("old", 2 * corpus.ABANDONED), ("new", 0)):
        raw = home.datasets / f".draft-{name}" / "raw"
        raw.mkdir(parents=True)
        (raw / "a.jsonl").write_text("x")
        for path in (raw / "a.jsonl", raw, raw.parent):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home)
    assert [path.name for path in home.datasets.glob(".*")] == [".draft-new"]


# ---------------------------------------------------------------------------------------------- the shelf


def everything(home: Home, dataset_id: str) -> list[dict]:
    """Every problem, through the pages of every group."""
    found = []
    for group in range(len(shelf.summary(home, dataset_id).report["problem_groups"])):
        start = 0
        while start is not None:
            page = shelf.problems(home, dataset_id, group, start, count=2)
            found += page.problems
            start = page.next
    return [{name: getattr(problem, name) for name in problem.__struct_fields__} for problem in found]


def bad_files(tmp_path: Path) -> list[Path]:
    rows = [sft("q", ""), sft("q"), "{", "[]", pair("q", "a", "a"), GOOD, GOOD | {"x": 1}, sft("q", "w " * 30)]
    return [write(tmp_path / "a.jsonl", *rows, sft("r", "")), write(tmp_path / "b.jsonl", sft("s", ""))]


def old(home: Home, dataset: corpus.Dataset) -> None:
    """As datasets were before there were summaries."""
    for name in ("summary.json", "problems.jsonl", "uncurated.jsonl"):
        (dataset.path / name).unlink()
    report = json.loads((dataset.path / "report.json").read_bytes())
    del report["histograms"], report["options"]["left_out"]
    (dataset.path / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("age", ["new", "old"])
def test_problems_of_one_kind_stand_together_and_none_is_lost(tmp_path, home, age):
    dataset = corpus.prepare(bad_files(tmp_path), home, template=WordCount(), max_length=20)
    if age == "old":
        old(home, dataset)
    groups = shelf.summary(home, dataset.id).report["problem_groups"]
    assert groups[0] | {"start": 0, "end": 0} == {
        "group": "empty turn", "severity": "rejected", "count": 3, "files": 2, "start": 0, "end": 0,
        "reason": "empty turn: turn 2 (assistant) has no text",
    }  # fmt: skip
    assert [group["severity"] for group in groups] == sorted(group["severity"] for group in groups)
    assert "longer than the max length" in {group["group"] for group in groups}
    there = everything(home, dataset.id)
    assert sorted(map(str, there)) == sorted(map(str, dataset.report["problems"]))
    rows = list(csv.reader(io.StringIO("".join(shelf.problems_csv(home, dataset.id)))))
    assert rows[0] == ["severity", "file", "line", "reason", "text"] and len(rows) == len(there) + 1
    with pytest.raises(NotFound):
        shelf.problems(home, dataset.id, len(groups))


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("`prompt`: empty turn: turn 3 (user) has no text", "empty turn"),
        ("turn 2: the assistant's text holds <think>; thoughts", "the assistant's text holds <think>"),
        ("1,234 tokens; training takes up to 1,024 and leaves this one out", "longer than the max length"),
        ("chosen and rejected are swapped in a; b.jsonl, line 3 (uncurated); both are left out",
         "chosen and rejected are swapped in another line"),
        ("unknown role 'it\\'s: me' in `messages` 12; known are", "unknown role … in `messages` …"),
        ("ignored keys: 'a', 'b' (and in 3 more lines of this file)", "ignored keys"),
    ],
)  # fmt: skip
def test_a_problems_group_leaves_out_what_differs_from_line_to_line(reason, group):
    assert findings.group(reason) == group


def test_a_cell_of_the_csv_never_begins_a_formula(tmp_path, home):
    dataset = corpus.prepare([write(tmp_path / "=cmd.jsonl", GOOD, "=HYPERLINK(1)", "@x", "plain")], home)
    rows = list(csv.reader(io.StringIO("".join(shelf.problems_csv(home, dataset.id)))))[1:]
    assert {row[1] for row in rows} == {"'=cmd.jsonl"}
    assert sorted(row[4] for row in rows) == ["'=HYPERLINK(1)", "'@x", "plain"]


def test_a_list_of_datasets_reads_no_problems_and_shows_old_and_damaged_ones(tmp_path, home):
    first = corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home, name="first")
    second = corpus.prepare([write(tmp_path / "b.jsonl", sft("x", "y"), "{")], home, name="second")
    old(home, first)
    os.utime(first.path / "report.json", (0, 0))
    (home.datasets / "broken-1").mkdir()
    (home.datasets / "broken-1" / "report.json").write_text("{")
    # What is summed up is not read again from the report.
    (second.path / "report.json").write_text("{")
    assert [one.id for one in shelf.everyone(home)] == [second.id, first.id]
    assert shelf.summary(home, first.id).report["sft"] == first.report["sft"]
    assert shelf.summary(home, first.id).report["histograms"] is None
    assert shelf.uncurated(home, first.id, 5) is None
    with pytest.raises(DataError, match="damaged"):
        shelf.summary(home, "broken-1")


def test_two_datasets_are_compared_by_content_whatever_their_files_and_tags(tmp_path, home):
    rows = [sft(f"q{n}", f"a{n}") for n in range(300)]
    one = corpus.prepare([write(tmp_path / "a.jsonl", *rows[:200], pair("p", "x", "y"), pair("r", "x", "y"))], home)
    more = [*rows[150:][::-1], pair("p", "x", "y", ("other", "tags")), pair("s", "x", "y")]
    two = corpus.prepare([write(tmp_path / "b.jsonl", *more)], home, max_length=512)
    found = shelf.compare(home, one.id, two.id)
    assert (found.sft.only_first, found.sft.only_second, found.sft.both) == (150, 100, 50)
    assert (found.dpo.only_first, found.dpo.only_second, found.dpo.both) == (1, 1, 1)
    assert found.options == {"max_length": (1024, 512)}


def test_a_dataset_that_a_run_learned_from_stays_and_others_can_go(tmp_path, home):
    used = corpus.prepare([write(tmp_path / "a.jsonl", GOOD)], home)
    other = corpus.prepare([write(tmp_path / "b.jsonl", sft("x", "y"))], home)
    run = runs.create(home, "sft", recipe={}, who="test", dataset=used.id)
    with pytest.raises(Busy, match=run.id):
        shelf.remove(home, used.id)
    shelf.remove(home, other.id)
    assert [path.name for path in home.datasets.iterdir()] == [used.id]
    with pytest.raises(NotFound):
        shelf.remove(home, other.id)


@pytest.mark.parametrize(
    ("counts", "width", "bars", "beyond"),
    [
        ([7], 1, 8, 0),
        ([1] * 10 + [3], 1, 4, 0),
        ([*range(30, 250)] * 10, 5, 50, 0),
        ([*range(1, 10_000)], 200, 50, 0),
        ([100] * 200 + [1_000_000], 2, 100, 1),
        ([0], 1, 1, 0),
    ],
)
def test_a_histogram_has_bars_of_a_round_width_and_counts_every_row(counts, width, bars, beyond):
    found = findings.histogram(counts)
    assert (found["width"], len(found["counts"]), found["beyond"]) == (width, bars, beyond)
    assert sum(found["counts"]) + found["beyond"] == len(counts)
    assert found["counts"][counts[0] // width] >= 1


def test_there_is_no_histogram_of_nothing():
    assert findings.histogram([]) is None


# ---------------------------------------------------------------------------------------------- the sample


def test_the_sample_is_a_whole_corpus_without_a_rejected_line(home):
    report = corpus.prepare([probesets.SAMPLE], home).report
    assert report["sft"]["unique"] >= 80
    assert report["dpo"]["curated"] >= 24
    assert report["sft"]["rejected"] + report["dpo"]["rejected"] + report["unrecognised"] == 0
    assert not [problem for problem in report["problems"] if problem["severity"] == "rejected"]
