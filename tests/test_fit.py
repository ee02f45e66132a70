"""How a training is laid out: everything at once where memory allows, less at once and more recomputed where it does
not, and never another step."""

import dataclasses
import json
from itertools import pairwise

import pytest
from given import Told

from katherine import fit, recipe, shapes
from katherine.adapters import Lora
from katherine.gpu import GpuReading
from katherine.settings import home

GIB = 2**30
LORA = Lora(64, 128, 0.05, recipe.ATTENTION_AND_MLP)
# The k0 corpus: 1,886 examples, 25 to 280 tokens, 115 on average.
UNITS = [30 + index * 170 // 1885 for index in range(1886)]


def card(gib: float, capability: str = "9.0", used: float = 0.5) -> GpuReading:
    return GpuReading(0, "Test Card", "580", "13.0", capability, int(gib * GIB), int(used * GIB), 0, 100.0, 700.0)


def chosen(gib: float, four_bit: bool = True, processes: int = 1, **changes) -> fit.Fit:
    wanted = recipe.preset("k0", recipe.SftRecipe, changes)
    shape = shapes.of(home(), "Qwen/Qwen3.5-9B")
    return fit.choose(wanted, shape, card(gib), UNITS, LORA, four_bit, processes)


def test_an_h200_keeps_a_whole_step_in_captured_graphs():
    found = chosen(139)
    assert found.captured and not found.recomputed and found.tokens >= 32 * 115
    assert "captured" in found.lines[0] and "16 × 2" in found.lines[1]
    assert chosen(139, four_bit=False).captured


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("gib", [80, 48, 24, 16])
def test_a_smaller_card_gets_what_its_memory_allows(gib, processes):
    found = chosen(gib, processes=processes)
    shape = shapes.of(home(), "Qwen/Qwen3.5-9B")
    layer, kept = fit.layer_bytes(shape), 2 * shape.width
    batch = found.tokens * (
        layer * (shape.layers - found.recomputed + bool(found.recomputed)) + kept * found.recomputed
    )
    fixed = fit.static_bytes(recipe.preset("k0", recipe.SftRecipe), shape, LORA, True)
    # Several add their gradients up: in a copy, beside what NCCL keeps.
    summed = fit.NCCL + shape.adapter(LORA.r, LORA.target_modules) * 4 if processes > 1 else 0
    assert batch + fixed + found.logits * fit.HEAD_BYTES + fit.BESIDE + summed <= gib * GIB
    assert found.tokens >= max(UNITS)


def test_less_memory_never_means_more_at_once():
    layouts = [chosen(gib) for gib in (139, 80, 48, 32, 24, 16)]
    work = [(found.captured, found.tokens, -found.recomputed) for found in layouts]
    assert work[0][0] and not work[-1][0] and layouts[-1].recomputed > 0
    assert all(a.tokens >= b.tokens for a, b in pairwise(layouts))


def test_without_a_gpu_the_recipe_says_whether_to_recompute():
    wanted = recipe.preset("demo", recipe.SftRecipe)
    shape = shapes.of(home(), "smollm2-135m")
    assert fit.choose(wanted, shape, None, UNITS, LORA, False).recomputed == 0
    again = recipe.preset("demo", recipe.SftRecipe, {"gradient_checkpointing": True})
    assert fit.choose(again, shape, None, UNITS, LORA, False).recomputed == 30


def test_a_step_in_tokens_covers_nearly_every_step_and_the_longest_unit():
    assert fit.step_tokens([100] * 50, 32) == 3200
    assert fit.step_tokens([10, 10, 900], 2) == 910
    assert fit.step_tokens([7], 32) == 7


def test_after_a_shortage_each_layout_is_smaller_until_there_is_none():
    found, seen = chosen(139), []
    while found is not None:
        seen.append((found.captured, found.recomputed, found.tokens))
        found = fit.tighter(found, 32)
    assert seen[1][0] is False and seen[2][1] == 32 and seen[-1][2] == fit.LEAST
    assert all(a != b for a, b in pairwise(seen))


@pytest.mark.parametrize(
    ("config", "reading", "reason"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, None, "Gemma3ForCausalLM was never proven"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, None, "looks back through a window"),
        ({"architectures": ["LlamaForCausalLM"]}, card(16, "7.5"), "has no arithmetic for bfloat16"),
        ({}, None, "none was never proven"),
    ],
)
def test_what_cannot_be_fitted_is_trained_as_written_and_said(config, reading, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = Told()
    assert not fit.wanted(recipe.preset("k0", recipe.SftRecipe), tmp_path, reading, told)
    assert reason in told.lines[-1] and "trained as the recipe is written" in told.lines[-1]


def test_a_recipe_that_declines_is_left_alone(tmp_path):
    wanted = recipe.preset("k0", recipe.SftRecipe, {"fit": False})
    assert not fit.wanted(wanted, tmp_path, None, Told())


def test_the_card_that_is_used_counts_what_others_hold():
    shape = shapes.of(home(), "Qwen/Qwen3.5-9B")
    wanted = recipe.preset("k0", recipe.SftRecipe)
    busy = dataclasses.replace(card(139), memory_used=100 * GIB)
    assert fit.choose(wanted, shape, busy, UNITS, LORA, True).captured is False
