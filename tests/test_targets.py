"""What a target list reaches, told without loading weights."""

import pytest

from katherine import adapters, targets
from katherine.errors import RecipeError
from katherine.recipe import ATTENTION_AND_MLP, GATED_DELTA


@pytest.fixture(scope="module")
def nine_billion(tmp_path_factory):
    """The 9B's config alone: there are no weights to load."""
    from transformers import Qwen3_5Config

    folder = tmp_path_factory.mktemp("nine")
    config = Qwen3_5Config()
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(folder)
    return folder


def test_the_usual_list_reaches_8_of_the_9bs_32_attention_layers_and_says_so(nine_billion):
    report = targets.matches(nine_billion, ATTENTION_AND_MLP)
    kinds = [layer.kind for layer in report.layers]
    assert len(kinds) == 32 and kinds.count("full_attention") == 8 and kinds[3] == "full_attention"
    assert report.layers[3].left_out == ()
    assert report.layers[0].matched == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert {name.rpartition(".")[2] for name in report.layers[0].left_out} == set(GATED_DELTA)
    assert len(report.warnings) == 1 and report.warnings[0].startswith("24 of 32 attention layers (linear_attention:")
    assert "all-linear" in report.warnings[0] and report.lines(64)[-1] == report.warnings[0]


def test_all_linear_reaches_every_attention_layer_and_no_vision_tower(nine_billion):
    report = targets.matches(nine_billion, ATTENTION_AND_MLP + GATED_DELTA)
    assert report.warnings == [] and report.outside == ()
    assert all(layer.left_out == () for layer in report.layers)
    # 24 layers of 8 linear modules and 8 of 7; the tower's qkv and proj would have made it more
    assert sum(len(layer.matched) for layer in report.layers) == 24 * 8 + 8 * 7


def test_the_adapters_size_is_the_one_peft_makes(tiny_qwen):
    from peft import LoraConfig, get_peft_model

    from katherine import model

    found, config = model.architecture(tiny_qwen)
    base = found(config)
    chosen = adapters.Lora(4, 8, 0.0, ATTENTION_AND_MLP + GATED_DELTA)
    made = get_peft_model(base, LoraConfig(**model.lora_arguments(chosen, base)))
    report = targets.matches(tiny_qwen, chosen.target_modules)
    assert report.trainable(4) == made.get_nb_trainable_parameters()[0]
    assert report.parameters == sum(p.numel() for p in found(config).parameters())


def test_names_that_match_nothing_are_refused_together(tiny_llama):
    with pytest.raises(RecipeError, match="in_proj_qkv, out_proj, which LlamaForCausalLM does not have"):
        targets.matches(tiny_llama, ("q_proj", "in_proj_qkv", "out_proj"))
    # The tower's own projection is no target: it is not the language model's.
    assert targets.matches(tiny_llama, ("q_proj",)).layers[1].matched == ("self_attn.q_proj",)
