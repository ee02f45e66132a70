"""K-quants reckoned on the card: the bytes of the processor, which tests/test_kquants.py holds against llama.cpp's."""

import pytest
import torch
from blocks import odd_blocks

from katherine import kquants

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("kind", kquants.types())
def test_the_card_makes_the_processors_bytes(kind):
    numbers = torch.Generator().manual_seed(5)
    usual = (torch.randn(2**14, 256, generator=numbers) * 0.02).to(torch.bfloat16)
    for weights in (torch.from_numpy(odd_blocks()), usual):
        found = kquants.encode(weights.cuda(), kind).cpu()
        wrong = (found != kquants.encode(weights, kind)).any(1)
        assert not wrong.any(), f"rows {wrong.nonzero().flatten().tolist()[:20]} differ"
