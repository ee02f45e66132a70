"""A base's dimensions from its config alone, against the models that transformers builds from the same configs."""

import json

import pytest

from katherine import bases, shapes, targets
from katherine.recipe import ATTENTION_AND_MLP, GATED_DELTA
from katherine.settings import Home


@pytest.mark.parametrize("names", [ATTENTION_AND_MLP, ATTENTION_AND_MLP + GATED_DELTA])
def test_an_adapters_weights_are_those_that_peft_would_train(katherine_home, tiny_qwen, names):
    shape = shapes.of(katherine_home, str(tiny_qwen))
    assert shape.adapter(16, names) == targets.matches(tiny_qwen, names).trainable(16)


def test_a_text_model_has_the_parameters_that_transformers_counts(katherine_home, tiny_llama):
    shape = shapes.of(katherine_home, str(tiny_llama))
    counted = targets.matches(tiny_llama, ATTENTION_AND_MLP)
    assert shape.parameters == pytest.approx(counted.parameters, rel=1e-3)
    assert shape.adapter(8, ATTENTION_AND_MLP) == counted.trainable(8)


def test_what_is_known_of_the_9b_is_what_transformers_says(katherine_home):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

    # The dimensions are the text part's, the model's kind the whole's.
    assert Qwen3_5ForConditionalGeneration.config_class is Qwen3_5Config
    config = Qwen3_5TextConfig().to_dict() | {"architectures": [Qwen3_5ForConditionalGeneration.__name__]}
    known = shapes.KNOWN["Qwen/Qwen3.5-9B"]
    assert {name: config[name] for name in known} == known
    shape = shapes.of(katherine_home, "Qwen/Qwen3.5-9B")
    assert shape.parameters == pytest.approx(8_953_803_264, rel=1e-3)


def test_what_is_known_of_the_small_base_is_its_own_config(katherine_home):
    config = json.loads((bases.configuration(katherine_home, bases.SMALL) / "config.json").read_text())
    known = shapes.KNOWN[bases.SMALL]
    assert {name: config[name] for name in known} == known


def test_what_the_targets_reach_is_said_and_what_a_base_has_not_is_named(katherine_home):
    shape = shapes.of(katherine_home, "Qwen/Qwen3.5-9B")
    assert shape.reached(ATTENTION_AND_MLP)[0] == "The attention of 8 of 32 layers gets an adapter."
    assert shape.reached(ATTENTION_AND_MLP + GATED_DELTA)[0].startswith("The attention of 32 of 32")
    assert shape.reached(("q_proj", "w_proj"))[-1] == "This base has no w_proj."


def test_a_base_from_the_hubs_cache_is_known_by_its_config(tmp_path):
    home = Home(tmp_path)
    assert shapes.of(home, "some/base") is None and not shapes.fetched(home, "some/base")
    folder = home.cache / "hub" / "models--some--base" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shapes.KNOWN[bases.SMALL]))
    assert shapes.of(home, "some/base") == shapes.of(home, bases.SMALL)
    (folder / "model.safetensors").touch()
    assert shapes.fetched(home, "some/base")


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"hidden_size": "wide"}', '{"num_experts": 8}'])
def test_a_config_that_says_too_little_gives_no_shape(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert shapes.of(Home(tmp_path), str(tmp_path)) is None
