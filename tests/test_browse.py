"""Pages, searches and renderings of datasets made from real files, with the small base's own tokenizer."""

import json
from pathlib import Path

import pytest

from katherine import browse, corpus
from katherine.browse import Cursor
from katherine.errors import DataError, NotFound
from katherine.settings import Home


def dataset(tmp_path: Path, *rows: dict) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return corpus.prepare([file], Home(tmp_path / "home"), include_uncurated=True).path


def sft(asked: str, said: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def pair(asked: str, chosen: str, rejected: str, **tags: str) -> dict:
    turns = {"chosen": chosen, "rejected": rejected}
    replies = {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}
    return {"prompt": [{"role": "user", "content": asked}]} | replies | tags


def walk(path: Path, kind="sft", search="", count=7, budget=5.0) -> list[browse.Found]:
    """Every page from the first to the last."""
    found, at = [], Cursor()
    while at is not None:
        page = browse.page(path, kind, at, search, count, budget)
        assert len(page.found) <= count
        found += page.found
        at = page.next
    assert page.searched == 1.0
    return found


def first(found: browse.Found) -> str:
    return found.example.messages[0].content


def test_pages_give_every_example_once_in_the_files_order(tmp_path):
    path = dataset(tmp_path, *(sft(f"q{n}", "a") for n in range(50)))
    found = walk(path)
    assert [one.number for one in found] == list(range(1, 51))
    assert [one.example for one in found] == corpus.conversations(path)


def test_a_page_can_be_gone_back_to_by_its_cursor(tmp_path):
    path = dataset(tmp_path, *(sft(f"q{n}", "a") for n in range(20)))
    second = browse.page(path, "sft", count=5).next
    assert second.index == 5
    assert browse.page(path, "sft", second, count=5).found == browse.page(path, "sft", second, count=5).found
    assert browse.page(path, "sft", second, count=5).found[0].number == 6


@pytest.mark.parametrize(
    "search", ["NEEDLE", "needle", "Straße", "STRASSE", 'a "quoted" word', "back\\slash", "two\nlines"]
)
def test_a_search_finds_texts_whatever_their_case_and_spelling_in_json(tmp_path, search):
    texts = ["a Needle here", "die Straße", 'A "Quoted" word', "a BACK\\slash", "Two\nLines"]
    path = dataset(
        tmp_path, *(sft(f"q{n}", "nothing " * 50) for n in range(3000)), *(sft(text, "ok") for text in texts)
    )
    assert [first(one) for one in walk(path, search=search)] == [
        text for text in sorted(texts, key=lambda t: 0) if search.casefold() in text.casefold()
    ]


def test_a_search_does_not_find_the_keys_of_the_format(tmp_path):
    path = dataset(tmp_path, sft("hi", "hey"), sft("the user said", "hm"))
    assert [first(one) for one in walk(path, search="user")] == ["the user said"]
    assert walk(path, search="messages") == []


def test_pairs_are_searched_in_prompt_replies_and_tags(tmp_path):
    rows = [
        pair("alpha", "b", "c"),
        pair("x", "Beta", "c"),
        pair("y", "b", "gamma"),
        pair("z", "b", "c", _cat="delta", _type="t"),
    ]
    path = dataset(tmp_path, *rows)
    for word, asked in (("ALPHA", "alpha"), ("beta", "x"), ("gamma", "y"), ("delta", "z")):
        assert [one.example.prompt[0].content for one in walk(path, "dpo", word)] == [asked]


def test_a_search_out_of_time_says_where_to_go_on_and_misses_nothing(tmp_path):
    path = dataset(tmp_path, *(sft(f"q{n}", "filler " * 400) for n in range(2000)), sft("the needle", "found"))
    page = browse.page(path, "sft", search="needle", budget=-1)
    assert (page.found, page.in_time, page.next) == ([], False, Cursor())
    steps, at, found = 0, Cursor(), []
    while at is not None:
        page = browse.page(path, "sft", at, "needle", budget=0.002)
        at, found, steps = page.next, found + page.found, steps + 1
        assert steps < 10_000
    assert [first(one) for one in found] == ["the needle"]
    assert steps > 1


def test_an_empty_kind_is_an_empty_page_and_what_is_gone_or_damaged_is_named(tmp_path):
    path = dataset(tmp_path, sft("hi", "hey"))
    page = browse.page(path, "dpo")
    assert (page.found, page.next) == ([], None)
    (path / "sft.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="damaged"):
        browse.page(path, "sft")
    (path / "sft.jsonl").unlink()
    with pytest.raises(NotFound, match=r"no sft\.jsonl"):
        browse.page(path, "sft")
