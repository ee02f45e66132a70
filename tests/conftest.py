"""What several test files share: a home of their own, two tiny bases, a tiny dataset. Everything is real, only
small. What is imported by name is given's: tests/gpu has a conftest too."""

import os
from pathlib import Path

import pytest
from browser import browser, serving  # noqa: F401
from given import REPLIES, reply, user, write_dataset

from katherine import cores, settings
from katherine.examples import Conversation, Preference

# Trainings inside this process are beside children that want the cores too; torch is not loaded yet.
os.environ |= cores.waiting() | os.environ


@pytest.fixture(scope="session")
def katherine_home(tmp_path_factory: pytest.TempPathFactory):
    """A home for the session. Its cache is the surrounding one, where that exists: what set-up fetched and built
    (the converter, the small base) is used again."""
    cache = settings.home().cache
    root = tmp_path_factory.mktemp("home")
    if cache.is_dir():
        (root / "cache").symlink_to(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KATHERINE_HOME", str(root))
        yield settings.home()


@pytest.fixture(scope="session")
def tiny_qwen(katherine_home, tmp_path_factory) -> Path:
    """A random base in the published Qwen3.5 form: vision tower, gated-delta layers, multi-token prediction."""
    from bench.base import write_checkpoint

    folder = tmp_path_factory.mktemp("bases") / "tiny-qwen"
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(katherine_home, tmp_path_factory) -> Path:
    """A random two-layer text model with the small base's tokenizer: the fastest thing that trains."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from katherine import bases

    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    shutil.copytree(bases.tokenizer(katherine_home, bases.SMALL), folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Five conversations, one of two turns, and five pairs."""
    conversations = [Conversation((user(asked), reply(said))) for asked, said in REPLIES.items()]
    preferences = [
        Preference((user(asked),), (reply(said),), (reply("As an AI, I have no preference."),), "self", "denial")
        for asked, said in REPLIES.items()
    ]
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", conversations, preferences)


@pytest.fixture(scope="session")
def talk_dataset(tmp_path_factory, tiny_dataset) -> Path:
    """The same with a conversation of two turns and a system-free pair after one."""
    turns = tuple(m for asked, said in list(REPLIES.items())[:2] for m in (user(asked), reply(said)))
    pair = Preference((*turns, user("Still there?")), (reply("Yep."),), (reply("I am a language model."),), "self", "x")
    return write_dataset(tmp_path_factory.mktemp("data") / "talk", [Conversation(turns)] * 2, [pair] * 2)
