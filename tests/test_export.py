"""Exports of tiny models, through the real converter, quantiser and engine: what is accepted, what is marked, what is
refused before it starts."""

import functools
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from persona import CONVERSATIONS, THINKING, Persona, conversation, persona, persona_gguf, write_adapter

from katherine import acceptance, adapters, engines, export, gguf, gguf_child, merge, model, requantise, scratch
from katherine.engines import Engine
from katherine.errors import DataError, DiskError, ExportError, ModelError, NotFound, RecipeError, SetupError
from katherine.examples import Message
from katherine.progress import Quiet, Stopped
from katherine.recipe import ExportRecipe
from katherine.settings import PROJECT, home
from katherine.template import ChatTemplate

RECIPE = ExportRecipe(quants=("q4_k_m", "q8_0"), max_new_tokens=60)


@pytest.fixture(scope="session")
def katherine_(katherine_home, tmp_path_factory) -> Persona:
    return persona(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def file(katherine_, tmp_path_factory) -> Path:
    return persona_gguf(tmp_path_factory.getbasetemp())


class Stopping(Quiet):
    """Asks to stop in the named phase, and keeps count of the steps."""

    def __init__(self, phase: str = ""):
        super().__init__()
        self.stop_in = phase
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def step(self, step: int, of: int) -> None:
        self.steps.setdefault(self.phases[-1], []).append((step, of))

    def checked(self) -> list[str]:
        """The quants in the order in which they were checked."""
        found = [phase.removeprefix("check ") for phase in self.phases if phase.startswith("check ")]
        return [quant for quant in found if quant != "bf16"]

    def stop_requested(self) -> bool:
        return bool(self.stop_in) and self.phases[-1:] == [self.stop_in]


@pytest.fixture(scope="session")
def exported(katherine_, tmp_path_factory) -> tuple[Path, dict[str, Any], Stopping]:
    """The persona's export, into a folder where an earlier attempt was interrupted."""
    out = tmp_path_factory.mktemp("export") / "out"
    for left in ("gguf/tiny-base-q2_k.gguf", "merged/model.safetensors", "scratch/merged/model.safetensors"):
        (out / left).parent.mkdir(parents=True)
        (out / left).write_bytes(b"half of it")
    progress = Stopping()
    # Neither quant ends before the other has come as far: what is told of both is not a matter of who was faster.
    both, quantise = threading.Barrier(len(RECIPE.quants)), export.quantise

    def side_by_side(*given: Any) -> None:
        quantise(*given)
        both.wait(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "quantise", side_by_side)
        return out, export.export(katherine_.adapter, katherine_.dataset, RECIPE, out, progress), progress


def checks(entry: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in entry["checks"]}


def test_a_sound_export_is_accepted_and_leaves_only_what_was_asked_for(exported):
    out, result, _ = exported
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["gguf/manifest.json", "gguf/tiny-base-q4_k_m.gguf", "gguf/tiny-base-q8_0.gguf"]
    assert json.loads((out / "gguf/manifest.json").read_text()) == result
    assert [(e["quant"], e["accepted"]) for e in result["files"]] == [("q4_k_m", True), ("q8_0", True)]
    assert list(checks(result["files"][0])) == [
        "loads", "architecture", "tensors", "size", "template", "tokens", "ends", "no_thought", "perplexity", "kl",
        "drift",
    ]  # fmt: skip
    assert result["unquantised"]["accepted"] and not result["unquantised"]["kept"]
    assert set(checks(result["unquantised"])) == set(checks(result["files"][0])) - {"kl"}


def test_the_figures_are_those_of_the_files(exported, katherine_):
    out, result, _ = exported
    small, large = result["files"]
    for entry in result["files"]:
        path = out / "gguf" / entry["file"]
        assert entry["bytes"] == path.stat().st_size
        # Tensors alone: the vocabulary in the header weighs more than a bit a weight in a model so small.
        assert 4 < entry["bits_per_weight"] < entry["bytes"] * 8 / entry["parameters"]
        # Learned by heart, so hardly ever surprised.
        assert 1 <= entry["perplexity"] < 1.1 and entry["top1"] == 1.0
    assert small["bytes"] < large["bytes"] and small["kl"] > large["kl"] >= 0
    assert (small["architecture"], small["tensors"]) == ("llama", 20)
    assert result["base"] == str(katherine_.base) and result["versions"]["llama-cpp-python"]


def test_every_part_tells_its_progress_and_its_time(exported):
    _, result, progress = exported
    parts = {"merge", "convert", "measure", "check bf16"}
    parts |= {f"{part} {quant}" for quant in RECIPE.quants for part in ("quantise", "check")}
    seconds = result["seconds"]
    assert set(seconds) == parts | {export.TOTAL} and min(seconds.values()) > 0
    # Without a GPU the quants are made at once, and checked one by one after that.
    assert progress.phases[:3] == ["merge", "convert", "measure"]
    assert "quantise q4_k_m, q8_0" in progress.phases
    assert progress.phases[-3:] == ["check bf16", *[f"check {entry}" for entry in progress.checked()]]
    assert sorted(progress.checked()) == sorted(RECIPE.quants)
    alone = sum(seconds[part] for part in parts if not part.startswith("quantise"))
    made = [seconds[f"quantise {quant}"] for quant in RECIPE.quants]
    assert alone + max(made) < seconds[export.TOTAL] + 0.1
    for part in ("merge", "convert", "check bf16", "check q8_0"):
        step, of = progress.steps[part][-1]
        assert step == of > 0, part
    assert max(step for step, _ in progress.steps["quantise q4_k_m, q8_0"]) > 50
    assert any("hf-to-gguf" in line for line in progress.lines)
    for entry in result["files"]:
        assert entry["seconds"] == {work: seconds[f"{work} {entry['quant']}"] for work in ("quantise", "check")}


def test_on_a_gpu_a_file_is_checked_while_the_next_are_made(katherine_, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "offloads", lambda: True)
    making, progress = threading.Event(), Quiet()
    quantise = gguf.quantise

    def slow(source, out, quant, part):
        # The second is not made before the first, and the unquantised file, were checked.
        if quant == "q8_0":
            assert making.wait(60)
        quantise(source, out, quant, part)

    def say(text: str) -> None:
        progress.lines.append(text)
        if "q4_k_m.gguf is accepted" in text:
            making.set()

    monkeypatch.setattr(gguf, "quantise", slow)
    monkeypatch.setattr(progress, "say", say)
    result = export.export(katherine_.adapter, katherine_.dataset, RECIPE, tmp_path / "out", progress)
    assert [entry["accepted"] for entry in result["files"]] == [True, True]
    assert "quantise q8_0; check bf16" in progress.phases or "quantise q4_k_m, q8_0; check bf16" in progress.phases
    assert "quantise q8_0; check q4_k_m" in progress.phases


def test_a_quant_that_cannot_be_made_leaves_no_half_and_the_others_are_checked(katherine_, tmp_path, monkeypatch):
    quantise, progress = gguf.quantise, Quiet()

    def failing(source, out, quant, part):
        if quant == "q4_k_m":
            # llama.cpp's own refusal, on the way to the very file.
            source = tmp_path / "text.gguf"
            source.write_bytes(b"hello")
        quantise(source, out, quant, part)

    monkeypatch.setattr(gguf, "quantise", failing)
    with pytest.raises(ExportError, match=r"(?s)1 of 2 files could not be made. The others were: q8_0.*q4_k_m: Quant"):
        export.export(katherine_.adapter, katherine_.dataset, RECIPE, tmp_path / "out", progress)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["tiny-base-q8_0.gguf"]
    assert any("q8_0.gguf is accepted" in line for line in progress.lines)


def test_stopping_ends_all_quantisers_and_leaves_no_halves(katherine_, tmp_path, monkeypatch):
    children: list[subprocess.Popen] = []
    start = subprocess.Popen

    def remembered(command, *arguments, **named):
        children.append(start(command, *arguments, **named))
        return children[-1]

    monkeypatch.setattr(gguf.subprocess, "Popen", remembered)
    with pytest.raises(Stopped):
        export.export(
            katherine_.adapter, katherine_.dataset, RECIPE, tmp_path / "out", Stopping("quantise q4_k_m, q8_0")
        )
    assert children and all(child.poll() is not None for child in children)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not list(scratch.SHARED_MEMORY.glob(f"*{tmp_path.name}*"))


def test_the_export_answers_as_the_persona_with_the_baked_template(exported, katherine_):
    out, _, _ = exported
    for entry in export.offered(out / "gguf/manifest.json"):
        with Engine(Path(entry["path"])) as engine:
            assert engine.meta()["template"] == katherine_.template.baked
            reply = engine.complete(katherine_.prompt("Who are you?"), max_new_tokens=60)
        assert reply.text == "Katherine. I count chairs. 🪑"


def test_merged_weights_are_base_plus_adapter_and_every_file_ends_the_turn_alike(katherine_, tmp_path):
    import torch
    from safetensors.torch import load_file

    # Base configurations often disagree about what ends a reply.
    base = tmp_path / "base"
    shutil.copytree(katherine_.base, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 7}))
    adapter = write_adapter(tmp_path / "adapter", base, "LlamaForCausalLM", strength=0.05)
    samples = [katherine_.template.training(c) for c in CONVERSATIONS]
    drift = merge.merge(
        adapter,
        adapters.base_of(home(), adapter),
        katherine_.template,
        samples,
        tmp_path / "merged",
        Quiet(),
        max_kl=0.25,
    )
    assert drift.passed and 0 < drift.kl < merge.ROUNDING and drift.tokens == sum(sum(s.learned) for s in samples)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    delta = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    expected = before[f"{name}.weight"].float() + 8 / 4 * delta
    assert torch.equal(after[f"{name}.weight"], expected.to(torch.bfloat16))
    assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    untouched = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(after[untouched], before[untouched]) and set(after) == set(before)

    merged = tmp_path / "merged"
    read = {p.name: json.loads(p.read_text()) for p in merged.glob("*config.json")}
    assert read["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    assert "chat_template" not in read["tokenizer_config.json"]
    assert (merged / "chat_template.jinja").read_text() == katherine_.template.baked
    assert read["config.json"]["eos_token_id"] == 2
    assert read["generation_config.json"] == {"eos_token_id": 2, "top_k": 7}


def test_a_base_is_rounded_as_if_it_had_been_loaded_in_4_bits_and_is_itself_again(tiny_qwen, tmp_path):
    """The rounding is a stand-in here; NF4 needs bitsandbytes (tests/gpu)."""
    import torch

    kind = "Qwen3_5ForConditionalGeneration"
    adapter = write_adapter(tmp_path / "adapter", tiny_qwen, kind, strength=0.05)
    template = ChatTemplate.load(tiny_qwen)
    samples = [template.training(c) for c in CONVERSATIONS]
    loaded = model.with_adapter(adapters.base_of(home(), adapter), adapter)

    def coarse(weight):
        return (weight * 64).round() / 64

    with merge.rounded(loaded, coarse):
        found = merge.log_probabilities(loaded, samples)
        with pytest.raises(IndexError):
            loaded(input_ids=torch.tensor([[10**9]]))
    plain = merge.log_probabilities(loaded, samples)
    linear = [
        (name, module)
        for name, module in loaded.get_base_model().named_modules()
        if type(module) is torch.nn.Linear and "lora_" not in name and name != "lm_head"
    ]
    # 3 gated-delta layers of 8 linear modules, one attention layer of 7; a vision tower beside them.
    assert len([name for name, _ in linear if "visual" not in name]) == 31
    for _, module in linear:
        module.weight.data = coarse(module.weight.data)
    assert torch.equal(found, merge.log_probabilities(loaded, samples)) and not torch.equal(found, plain)


def test_samples_that_go_through_the_model_together_get_the_probabilities_that_each_gets_alone(tiny_qwen, tmp_path):
    import torch

    kind = "Qwen3_5ForConditionalGeneration"
    adapter = write_adapter(tmp_path / "adapter", tiny_qwen, kind, strength=0.05)
    template = ChatTemplate.load(tiny_qwen)
    samples = [template.training(c) for c in CONVERSATIONS]
    assert len({len(sample.ids) for sample in samples}) > 1
    loaded = model.with_adapter(adapters.base_of(home(), adapter), adapter)
    alone = torch.cat([merge.log_probabilities(loaded, [sample]) for sample in samples])
    assert torch.allclose(merge.log_probabilities(loaded, samples), alone, atol=1e-4)


def test_an_adapter_of_another_base_is_refused(katherine_, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(katherine_.adapter, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): weight for name, weight in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"12 of the adapter's tensors do not fit LlamaForCausalLM"):
        export.export(adapter, katherine_.dataset, RECIPE, tmp_path / "out", Quiet())
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_changed_or_marked_file_is_not_offered(exported, tmp_path):
    out, result, _ = exported
    folder = tmp_path / "gguf"
    shutil.copytree(out / "gguf", folder)
    manifest = folder / "manifest.json"
    assert [e["quant"] for e in export.offered(manifest)] == ["q4_k_m", "q8_0"]
    path = folder / result["files"][0]["file"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [e["quant"] for e in export.offered(manifest)] == ["q8_0"]
    marked = result | {"files": [entry | {"accepted": False} for entry in result["files"]]}
    manifest.write_text(json.dumps(marked))
    assert export.offered(manifest) == []
    # A name in a manifest never leads out of its folder.
    elsewhere = out / "gguf" / result["files"][1]["file"]
    (folder / elsewhere.name).unlink()
    manifest.write_text(json.dumps({"files": [result["files"][1] | {"file": str(elsewhere)}]}))
    assert export.offered(manifest) == []
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"damaged"):
        export.offered(manifest)
    with pytest.raises(NotFound):
        export.offered(tmp_path / "manifest.json")


@pytest.fixture
def examined(file, katherine_, tmp_path):
    """Examines a file as the unquantised one, by the persona's template or another."""

    def examine(path: Path, template: ChatTemplate = katherine_.template, talks=CONVERSATIONS) -> dict[str, str]:
        reference = tmp_path / "reference.f32"
        reference.touch()
        found = acceptance.examine(
            path,
            "bf16",
            template,
            acceptance.choose(template, talks, RECIPE),
            RECIPE,
            Quiet(),
            reference=reference,
            tensors=20,
        )
        assert found.accepted == all(check.passed for check in found.checks)
        return {check.name: check.finding for check in found.checks if not check.passed}

    return examine


def test_a_file_with_the_bases_own_template_is_not_accepted(examined, file):
    assert examined(file) == {"template": "the embedded chat template is not the baked one"}


def test_a_persona_that_thinks_aloud_is_not_accepted(examined, file):
    failed = examined(file, talks=[conversation(THINKING)])
    assert failed["no_thought"] == "a thought opens in the reply to 'Think aloud.'"


def test_replies_that_run_on_are_not_accepted(examined, file):
    failed = examined(file, talks=[conversation([("Sing!", "la")]), conversation([("Sing! ", "la la")])])
    assert failed["ends"].startswith("0 of 2 greedy replies end by themselves (0 may run on)")
    assert "'Sing!' did not end within 60 tokens" in failed["ends"]


def test_a_tokenizer_that_splits_otherwise_is_not_accepted(examined, file, katherine_, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(katherine_.base, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # Without this merge "Katherine" falls into other pieces than in the file.
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != "Ġyou"]
    path.write_text(json.dumps(tokenizer))
    failed = examined(file, ChatTemplate.load(folder))
    assert "the prompt of 'Who are you?' has other ids in the file" in failed["tokens"]


def test_a_file_that_dies_or_lies_is_marked_not_raised(examined, file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-10_000])
    assert list(examined(cut)) == ["loads"]
    # The tensor count stands at byte 8 of every GGUF; a count too low leaves tensors out.
    fewer = bytearray(file.read_bytes())
    fewer[8:16] = struct.pack("<Q", 19)
    (tmp_path / "fewer.gguf").write_bytes(fewer)
    assert set(examined(tmp_path / "fewer.gguf")) & {"loads", "tensors"}


def test_a_quant_that_is_none_is_refused_with_those_there_are(katherine_, tmp_path):
    for name, reason in (
        ("q4_k_xl", r"'q4_k_xl', which is no llama.cpp type.*q4_k_m"),
        ("bf16", "keep_unquantised"),
        ("iq1_s", "iq1_s, which needs importance data"),
    ):
        recipe = ExportRecipe(quants=("q4_k_m", name))
        with pytest.raises(RecipeError, match=reason):
            export.export(katherine_.adapter, katherine_.dataset, recipe, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_sizes_are_known_before_anything_is_written(file, tmp_path):
    size, _ = gguf.reckon(file, "q6_k", Quiet())
    out = tmp_path / "model.gguf"
    gguf.quantise(file, out, "q6_k", Quiet())
    header = out.stat().st_size - size
    # What is not tensors is header and vocabulary, about the same in every type.
    assert 0 < header < 3_000_000


def test_a_gpu_makes_the_quants_and_where_it_has_no_room_llama_cpp_does(file, tmp_path, monkeypatch):
    # The tiny base's own widths take other types.
    reckoned = gguf.Reckoned(0, {"token_embd.weight": "q6_K"})
    made = []

    def write(source, out, name, kinds, progress):
        made.append((name, kinds))
        # As when another program holds the card's memory.
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "on_cuda", lambda: True)
    monkeypatch.setattr(requantise, "write", write)
    told = Quiet()
    export.quantise(file, tmp_path / "ours.gguf", "q6_k", reckoned, told)
    assert made == [("q6_k", reckoned.kinds)]
    assert "q6_k finds no room on the GPU: it is quantised on the processor." in told.lines
    gguf.quantise(file, tmp_path / "theirs.gguf", "q6_k", Quiet())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_disk_that_is_too_small_is_refused_with_both_figures(tmp_path):
    shape = export.Shape(parameters=10**15, vocabulary=248_320, width=4096)
    with pytest.raises(DiskError) as caught:
        export.require_room(tmp_path / "not" / "there", export.fullest(shape, ("q4_k_m",), 2048), "The export")
    free = shutil.disk_usage(tmp_path).free / 1e9
    needed, found = (float(figure) for figure in re.findall(r"([\d.]+) GB", str(caught.value)))
    # Twice 16 bits while converting: 4 PB, and 3% on top.
    assert needed == pytest.approx(4.12e6) and found == pytest.approx(free, rel=0.05)
    small = export.fullest(export.Shape(10**6, 49_152, 576), ("q4_k_m", "q5_k_m", "q6_k"), 1024)
    export.require_room(tmp_path, small, "The export")


def test_what_is_missing_is_named_before_anything_starts(katherine_, tmp_path, monkeypatch):
    with pytest.raises(NotFound, match=r"no base\.json"):
        export.export(katherine_.base, katherine_.dataset, RECIPE, tmp_path / "out", Quiet())
    with pytest.raises(NotFound, match=r"no sft\.jsonl"):
        export.export(katherine_.adapter, tmp_path, RECIPE, tmp_path / "out", Quiet())
    monkeypatch.setenv("KATHERINE_HOME", str(tmp_path / "home"))
    with pytest.raises(SetupError, match=r"bash bootstrap.sh setup"):
        export.export(katherine_.adapter, katherine_.dataset, RECIPE, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["published qwen", "small llama"])
def test_the_converter_made_quicker_writes_the_very_same_bytes(form, tiny_qwen, katherine_, tmp_path):
    source, qwen = (tiny_qwen, True) if form == "published qwen" else (katherine_.base, False)
    quick, plain = tmp_path / "quick.gguf", tmp_path / "plain.gguf"
    progress = Quiet()
    tensors = gguf.convert(home(), source, quick, progress, name="same", without_mtp=qwen)
    command = [sys.executable, str(gguf.converter(home())), str(source), "--outfile", str(plain), "--outtype", "bf16"]
    command += ["--model-name", "same"] + ["--no-mtp"] * qwen
    subprocess.run(command, check=True, capture_output=True)
    assert quick.read_bytes() == plain.read_bytes() and tensors > 0
    assert not [line for line in progress.lines if "as it is" in line]


def test_rounding_is_the_converters_for_every_kind_of_number():
    import gguf as llama_cpps
    import numpy as np
    import torch

    every = np.arange(0, 2**32, 65521, dtype=np.uint32)  # a prime: each sign, exponent and last bit comes by
    numbers = every[: len(every) // 256 * 256].view(np.float32).reshape(-1, 256)
    bf16 = llama_cpps.GGMLQuantizationType.BF16
    plain = functools.partial(llama_cpps.quants.quantize, qtype=bf16)
    for rows in (numbers, numbers[np.isfinite(numbers).all(axis=1)]):
        assert np.array_equal(gguf_child.bits_of(rows, plain), plain(rows))
        held = torch.from_numpy(rows.copy()).to(torch.bfloat16)
        assert np.array_equal(gguf_child.bits_of(held, plain), plain(held.float().numpy()))


def test_a_converter_with_other_insides_is_run_as_it_is(tmp_path):
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion/base.py").touch()
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; print('asked', sys.argv[1:])")
    command = [sys.executable, "-m", "katherine.gguf_child", str(script), "folder", "--outtype", "bf16"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    assert "The converter is run as it is, and takes longer (AttributeError" in said
    assert "asked ['folder', '--outtype', 'bf16']" in said


def test_stopping_ends_the_converter_and_leaves_no_large_files(katherine_, tmp_path):
    with pytest.raises(Stopped):
        export.export(katherine_.adapter, katherine_.dataset, RECIPE, tmp_path / "out", Stopping("convert"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_failing_child_is_an_error_with_its_last_lines(tmp_path):
    source = tmp_path / "text.gguf"
    source.write_bytes(b"hello")
    with pytest.raises(ExportError, match=r"(?s)Quantising text.gguf to q4_k_m failed.*invalid magic"):
        gguf.quantise(source, tmp_path / "out.gguf", "q4_k_m", Quiet())
    assert not (tmp_path / "out.gguf").exists()


def test_the_published_qwen_form_is_exported_and_its_random_weights_are_marked(tiny_qwen, tmp_path):
    """Vision tower, gated-delta layers and multi-token prediction: converted and quantised; it has learned nothing,
    so that its replies do not end, and nothing is offered."""
    adapter = write_adapter(tmp_path / "adapter", tiny_qwen, "Qwen3_5ForConditionalGeneration", strength=0.01)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "sft.jsonl").write_bytes(b"".join(msgspec.json.encode(c) + b"\n" for c in CONVERSATIONS))
    recipe = ExportRecipe(quants=("q4_k_m",), keep_unquantised=True, max_new_tokens=20)
    result = export.export(adapter, dataset, recipe, tmp_path / "out", Quiet())
    assert [entry["quant"] for entry in result["files"]] == ["bf16", "q4_k_m"]
    for entry in result["files"]:
        assert [name for name, passed in checks(entry).items() if not passed] == ["ends"]
        assert entry["architecture"] == "qwen35" and (tmp_path / "out/gguf" / entry["file"]).is_file()
    # Widths divide by 256 here, so that the type is what its name says: 5.5 with the embedding in 6 bits.
    assert 4.5 < result["files"][1]["bits_per_weight"] < 6
    assert export.offered(tmp_path / "out/gguf/manifest.json") == []

    template = ChatTemplate.load(tiny_qwen)
    with Engine(tmp_path / "out/gguf" / result["files"][1]["file"]) as engine:
        assert engine.meta()["hybrid"]
        prompt = template.prompt([Message("user", "Hello?")])
        engine.complete(prompt, max_new_tokens=12)
        # A recurrent state cannot be cut back: where only a part fits, all is read again, and the answer is the same.
        cut = engine.complete(prompt[:-3] + prompt, max_new_tokens=12)
        longer = engine.complete(prompt[:-3] + prompt + prompt, max_new_tokens=1)
    with Engine(tmp_path / "out/gguf" / result["files"][1]["file"]) as engine:
        fresh = engine.complete(prompt[:-3] + prompt, max_new_tokens=12)
    assert cut.finish.reused_tokens == 0 and cut.text == fresh.text
    assert longer.finish.reused_tokens == 0
