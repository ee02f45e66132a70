"""llama.cpp built for the card: engines compute there what they compute on the processor, several beside each other.

python -m pytest tests/gpu"""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from persona import TALKS, Persona, persona, persona_gguf

from katherine import engines, gpu
from katherine.engines import Engine

pytestmark = pytest.mark.skipif(not engines.offloads(), reason="needs an NVIDIA GPU and llama.cpp built for it")

# Of what CUDA takes for a process's own use, a few hundred MB, at least this much; and what others may have let go.
CONTEXT = 100 << 20


@pytest.fixture(scope="module")
def katherine_(katherine_home, tmp_path_factory) -> Persona:
    return persona(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def file(katherine_, tmp_path_factory) -> Path:
    return persona_gguf(tmp_path_factory.getbasetemp())


def used() -> int:
    card = gpu.mine()
    assert card is not None and card.memory_used is not None
    return card.memory_used


def test_an_engine_on_the_card_computes_what_the_processor_does(katherine_, file):
    asked, said = TALKS[0][0]
    ids = [*katherine_.prompt(asked)]
    positions = range(len(ids) // 2, len(ids))
    with Engine(file) as card, Engine(file, gpu_layers=0) as processor:
        assert card.meta()["on_gpu"]
        assert card.complete(ids, max_new_tokens=60).text == said == processor.complete(ids, max_new_tokens=60).text
        # 16-bit weights, whose products each rounds in an order of its own.
        there, here = (each.score(ids, positions).logprobs for each in (card, processor))
    assert there == pytest.approx(here, abs=0.1, rel=0.02)


def test_three_stay_on_the_card_and_leave_nothing_there(katherine_, file):
    before = used()
    with ExitStack() as stack:
        three = [stack.enter_context(Engine(file)) for _ in range(3)]
        for engine, ((asked, said), *_) in zip(three, TALKS, strict=False):
            assert engine.complete(katherine_.prompt(asked), max_new_tokens=60).text == said
        assert used() - before > 3 * CONTEXT
    deadline = time.monotonic() + 10
    while used() - before > CONTEXT and time.monotonic() < deadline:
        time.sleep(0.1)
    assert used() - before < CONTEXT
