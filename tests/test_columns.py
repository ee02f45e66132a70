"""What can be talked to: only what this project made, whole and unchanged; and the bare base, made on demand."""

import json
import os

import pytest
from persona import write_adapter
from talking import QUANTS, entry, export, exported, file, home, learned, until, write_manifest

from jobs import errands
from katherine import bare_base, columns, runs
from katherine.engines import Engine
from katherine.errors import DataError, NotFound
from katherine.examples import Message
from katherine.history import History
from katherine.progress import Quiet
from katherine.runs import State
from katherine.template import ChatTemplate

# ruff: noqa: F401, F811  (fixtures)


def test_the_columns_of_an_export_are_its_accepted_files_with_the_unquantised_last(home, learned, file):
    run = exported(home, learned, {"bf16": file, "q4_k_m": file, "q5_k_m": file, "q6_k": file}, rejected=("q5_k_m",))
    found = columns.of_export(home, run)
    assert [column.quant for column in found] == ["q4_k_m", "q6_k", "bf16"]
    assert [columns.title(column) for column in found] == ["q4_k_m", "q6_k", "bf16 (unquantised)"]
    assert [columns.get(home, column.id) for column in found] == found
    assert {(column.export, column.base) for column in found} == {(run.id, str(learned.base))}
    for column in found:
        columns.verify(column)
    with pytest.raises(NotFound, match="no accepted file 'q5_k_m'"):
        columns.get(home, f"{run.id}:q5_k_m")


def test_all_exports_that_succeeded_are_offered_newest_first(home, learned, file):
    older = exported(home, learned, {"q4_k_m": file})
    newer = exported(home, learned, {"q4_k_m": file})
    failed = exported(home, learned, {"q4_k_m": file})
    failed.set_status(state=State.failed)
    among = History(home).runs()
    assert [column.export for column in columns.everyone(home, among)] == [newer.id, older.id]
    with pytest.raises(NotFound, match="no finished export"):
        columns.get(home, f"{failed.id}:q4_k_m")


def test_a_file_that_is_gone_or_cut_is_not_offered(home, export):
    gone, cut, left = columns.of_export(home, export)
    gone.path.unlink()
    os.truncate(cut.path, cut.bytes - 1)
    assert columns.of_export(home, export) == [left]
    for column in (gone, cut):
        with pytest.raises(DataError, match="not there any more"):
            columns.get(home, column.id)
        with pytest.raises(DataError, match="not the file of its manifest"):
            columns.verify(column)


def test_a_changed_byte_is_found_even_where_length_and_time_are_set_back(home, export):
    column = columns.of_export(home, export)[0]
    columns.verify(column)
    before = column.path.stat()
    with column.path.open("r+b") as out:
        out.seek(-1, os.SEEK_END)
        last = out.read(1)
        out.seek(-1, os.SEEK_END)
        out.write(bytes([last[0] ^ 1]))
    os.utime(column.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert columns.get(home, column.id) == column
    with pytest.raises(DataError, match="sha256"):
        columns.verify(column)


@pytest.mark.parametrize("name", ["", ":", "x", "x:y", "base:", "base:..", "base:../../x", "../runs:q4_k_m", "\0:q4"])
def test_an_id_that_names_nothing_is_not_found(home, export, name):
    with pytest.raises(NotFound):
        columns.get(home, name)
    with pytest.raises(NotFound):
        columns.get(home, f"{export.id}:{name}")


def test_a_damaged_manifest_hides_its_export_and_says_so_where_it_is_asked_for(home, export):
    (export.out / "gguf" / "manifest.json").write_text('{"files": [')
    assert columns.of_export(home, export) == []
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        columns.get(home, f"{export.id}:q4_k_m")


def test_a_manifest_cannot_name_a_file_elsewhere(home, learned, file, export):
    elsewhere = entry(file, "q4_k_m") | {"file": f"../../../../../..{file}"}
    write_manifest(export, learned, [elsewhere])
    assert columns.of_export(home, export) == []


def test_the_base_is_made_once_as_an_errand_and_answers_with_the_exports_template(home, learned, export):
    assert columns.base_of(home, export.id) is None
    errand = errands.start(home, "base", {"export": export.id}, "test")
    status = errands.wait(home, errand.id, 120)
    assert status.state is State.succeeded, status.reason
    column = columns.get(home, errand.result()["column"])
    assert column == columns.base_of(home, export.id)
    assert (column.export, columns.title(column), column.base) == (None, "base, q6_k", str(learned.base))
    assert columns.everyone(home, History(home).runs())[-1] == column
    columns.verify(column)
    with Engine(column.path) as engine:
        assert engine.meta()["template"] == learned.template.baked
        assert engine.complete(learned.prompt("Who are you?"), max_new_tokens=20).finish.finish == "end"
    # Asked for again, by another export of the same base, it is the same file.
    made = column.path.stat().st_ino
    assert bare_base.make(home, export.id, Quiet()).path.stat().st_ino == made
    # One that was changed is made anew.
    os.truncate(column.path, 100)
    assert columns.base_of(home, export.id) is None
    assert bare_base.make(home, export.id, Quiet()) == column


def test_the_base_of_a_published_qwen_is_made_without_its_vision_and_prediction(
    home, tiny_qwen, tmp_path, learned, file
):
    run = exported(home, learned, {"q4_k_m": file})
    adapter = write_adapter(tmp_path / "adapter", tiny_qwen, "Qwen3_5ForConditionalGeneration", strength=0.01)
    above = runs.load(home, run.record.parent)
    (above.out / "adapter").unlink()
    (above.out / "adapter").symlink_to(adapter)
    manifest = json.loads((run.out / "gguf" / "manifest.json").read_text())
    runs.write_json(run.out / "gguf" / "manifest.json", manifest | {"base": str(tiny_qwen)})
    column = bare_base.make(home, run.id, Quiet())
    template = ChatTemplate.load(tiny_qwen)
    with Engine(column.path) as engine:
        assert engine.meta()["architecture"] == "qwen35"
        assert engine.meta()["template"] == template.baked
        assert engine.complete(template.prompt([Message("user", "Hi")]), max_new_tokens=4).finish.tokens == 4


def test_what_is_left_of_a_base_that_could_not_be_made_is_nothing(home, export, monkeypatch):
    errand = errands.start(home, "base", {"export": export.id}, "test")
    folder = home.cache / "base-gguf"
    until(lambda: folder.exists() and list(folder.iterdir()))
    errands.stop(home, errand.id)
    assert errands.wait(home, errand.id, 60).state is State.cancelled
    assert list(folder.iterdir()) == []


def test_an_export_without_its_training_says_why_there_is_no_base(home, export):
    (runs.load(home, export.record.parent).out / "adapter").unlink()
    with pytest.raises(NotFound, match=r"base\.json"):
        bare_base.make(home, export.id, Quiet())
