"""The papers that go out with a push: true to the runs, and nothing in them that was not measured."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import yaml
from exported import exported, probed

from katherine import approval, manifests, modelcard, recipe, reviews, runs
from katherine.examples import Message
from katherine.reviews import Judged, Recommendation, Verdict
from katherine.runs import Run
from katherine.settings import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def export(home: Home) -> Run:
    return exported(home)


def facts(home: Home, export: Run) -> modelcard.Facts:
    return modelcard.gather(home, export, manifests.read(export).files)


def card(home: Home, export: Run, approved: approval.Approval | None = None) -> str:
    return modelcard.card(facts(home, export), approved)


def front_matter(text: str) -> dict:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def say(home: Home, export: Run, name: str, *lines: msgspec.Struct) -> None:
    folder = home.root / "reviews" / export.id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_front_matter_is_yaml_and_names_only_a_base_that_the_hub_can_know(home, export):
    matter = front_matter(card(home, export))
    assert matter["base_model"] == "invented/base"
    assert matter["tags"] == ["gguf", "lora", "conversational", "sft", "dpo"]
    edit(export.out / "gguf" / "manifest.json", base="/root/some where/base: x")
    text = card(home, export)
    assert "base_model" not in front_matter(text) and "/root" not in text and "base: x" in text


def test_what_was_not_measured_is_not_mentioned(home, export):
    text = card(home, export)
    for title in ("## Probes", "## What people said", "## Approval", "## Data"):
        assert title not in text
    assert "thinking off" not in text, "no check of that name was made"
    assert "The chat template is inside each file." in text
    assert "1 step." in text and "Loss from 2 in the first step to 1 in the last." in text and "margin" not in text


def test_a_check_that_failed_is_no_claim(home, export):
    manifest = export.out / "gguf" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    for file in files:
        file["checks"].append({"name": "no_thought", "passed": file["quant"] != "q6_k", "finding": "x"})
    edit(manifest, files=files)
    assert "thinking off" not in card(home, export)
    for file in files:
        file["checks"][-1]["passed"] = True
    edit(manifest, files=files)
    assert "It has thinking off" in card(home, export)


def test_probes_are_told_with_their_interval_and_only_the_exports_own(home, export):
    probed(home, export, {"q4_k_m": (10, 10)})
    probed(home, export, {"base": (5, 0), "q4_k_m": (26, 23), "20260101-000000-export-abcdef:q4_k_m": (26, 1)})
    text = card(home, export)
    assert "| q4\\_k\\_m | 23 of 26 | 88% \\(71% to 96%\\) |" in text
    assert "10 of 10" not in text and "1 of 26" not in text
    (one,) = json.loads(modelcard.documents(facts(home, export), None)["probes.json"])
    assert one["models"][1] == {"model": "q4_k_m", "asked": 26, "passed": 23, "interval": [0.7102, 0.96]}


def test_what_people_said_is_counted_without_their_names(home, export):
    def verdict(number: int, who: str, **said: object) -> Verdict:
        answers = tuple(
            Judged(f"{export.id}:{quant}", quant, "0" * 64, (Message("user", "Hi"),), "Hey.", thumb)
            for quant, thumb in (("q4_k_m", -1), ("q6_k", 1))
        )
        order = tuple(answer.column for answer in answers)
        return Verdict(str(number), runs.now(), who, "reviewer", export.id, f"t{number}", 0, "", "Hi", order, answers,
                       **said)  # fmt: skip

    say(
        home, export, "verdicts.jsonl",
        verdict(1, "Rea", preferred=f"{export.id}:q6_k"), verdict(2, "Rea", tie=True),
        verdict(3, "Ulf", preferred=f"{export.id}:q6_k"),
    )  # fmt: skip
    say(
        home, export, "recommendations.jsonl",
        Recommendation("a", runs.now(), "Rea", "reviewer", export.id, True),
        Recommendation("b", runs.now(), "Ulf", "reviewer", export.id, False),
    )  # fmt: skip
    assert len(reviews.verdicts(home, export.id)) == 3
    text = card(home, export)
    assert "2 reviewers gave 3 verdicts" in text and "1 of 2 final words said that it may go out." in text
    assert "| q4\\_k\\_m | 0 | 0 | 3 |" in text and "| q6\\_k | 2 | 3 | 0 |" in text
    assert "Rea" not in text and "Ulf" not in text


def test_a_recipe_is_told_by_what_differs_from_its_preset(home):
    export = exported(home)
    sft = modelcard.line(home, export)[0]
    values = recipe.preset("k0", recipe.SftRecipe).model_dump(mode="json") | {"learning_rate": 0.00007}
    edit(sft.path / "run.json", recipe=values | {"base": "/home/of/nobody/base"})
    text = card(home, export)
    assert "Where the recipe is not the preset k0:" in text and "| learning\\_rate | 0.00007 |" in text
    papers = modelcard.documents(facts(home, export), None)
    told = json.loads(papers["recipe.json"])["stages"][0]
    assert told["recipe"]["learning_rate"] == 0.00007 and told["recipe"]["base"] == "base"
    assert not any(b"/home/of/nobody" in content for content in papers.values())


def test_no_text_becomes_markup(home, export):
    nasty = "a | b\n# <script>alert(1)</script> [x](http://y) `c` *d* _e_ ![f](g) &amp; ~h~\u2028i"
    given = approval.approve(home, export.id, who="<b>Ann</b>", role="operator", note=nasty)
    text = card(home, export, given)
    line = next(line for line in text.split("\n") if line.startswith("Approved by"))
    assert "<" not in text.split("---\n", 2)[2] and "&lt;script\\>" in line
    assert "\\[x\\]\\(http://y\\)" in line and "\\`c\\` \\*d\\* \\_e\\_ \\!\\[f\\]" in line
    assert "a \\| b \\# &lt;" in line and "&amp;amp; \\~h\\~ i" in line


def test_the_same_facts_give_the_same_bytes(home, export):
    given = approval.approve(home, export.id, who="Ann", role="operator", note="Fine.")
    papers = modelcard.documents(facts(home, export), given)
    assert papers == modelcard.documents(facts(Home(home.root), export), given)
    assert set(papers) == {"README.md", "recipe.json", "acceptance.json", "probes.json", "approval.json"}
    assert json.loads(papers["approval.json"]) == json.loads(
        (home.root / "reviews" / export.id / "approval.json").read_text()
    )
    assert "Approved by Ann \\(operator\\)" not in papers["README.md"].decode()
    assert "Approved by Ann (operator) on" in papers["README.md"].decode()


def test_a_lineage_that_is_gone_leaves_its_parts_out(home, export):
    for stage in modelcard.line(home, export):
        shutil.rmtree(stage.path)
    text = card(home, export)
    assert "## Supervised" not in text and "## Files" in text
