"""Packed batches on an NVIDIA GPU: fla's kernels in their bounds, inductor's fused parts and captured graphs, against
transformers' own padded pass on the same tiny model. bfloat16 rounds each way differently, so a fitted gradient may be
as far from float32's as the plain one is, and a little more.

    python -m pytest tests/gpu"""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from katherine import model, packed_model, packing, recipe
from katherine.fit import Multiples
from katherine.likelihood import token_logprobs
from katherine.replay import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TARGETS = list(recipe.ATTENTION_AND_MLP + recipe.GATED_DELTA)
BUCKETS = Multiples(tokens=128, rows=8, width=64, chunks=8)


def some_rows() -> list[tuple[list[int], list[bool]]]:
    numbers = random.Random(0)
    sizes = (3, 23, 63, 64, 65, 130)
    rows = [[numbers.randrange(1000) for _ in range(size)] for size in sizes]
    return [(ids, [index > len(ids) // 3 for index in range(len(ids))]) for ids in rows]


def adapted(checkpoint, dtype):
    kind, _ = model.architecture(checkpoint)
    bare = kind.from_pretrained(checkpoint, dtype=dtype, device_map={"": 0})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, exclude_modules=".*visual.*", task_type="CAUSAL_LM")
    found = get_peft_model(bare, config)
    torch.manual_seed(1)
    for name, weight in sorted(found.named_parameters()):
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, device="cuda") * (0.02 if "lora_B" in name else 0.1)
    return found.eval()


def gradients(found) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}
    found.zero_grad(set_to_none=True)
    return taken


def plain(found, narrow: bool) -> dict[str, torch.Tensor]:
    rows = some_rows()
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device="cuda")
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device="cuda")
    learned = torch.tensor([on + [False] * (width - len(on)) for _, on in rows], device="cuda")[:, 1:]
    with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
        logits = found(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    said = logits[learned].float().log_softmax(-1).gather(1, ids[:, 1:][learned][:, None])
    (-said.mean()).backward()
    return gradients(found)


def packed(found, forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bare = found.get_base_model()
    batch = packing.pack(some_rows(), BUCKETS).to("cuda")
    said = token_logprobs(forward(batch)[batch.scored], bare.lm_head.weight, batch.labels)
    (-said.mean()).backward()
    return said.detach(), gradients(found)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return (sum((a[n] - b[n]).norm() ** 2 for n in a) / sum(b[n].norm() ** 2 for n in b)).sqrt().item()


def test_a_fitted_gradient_is_as_near_to_float32s_as_the_plain_one(tiny_qwen):
    truth = plain(adapted(tiny_qwen, torch.float32), False)
    found = adapted(tiny_qwen, torch.bfloat16)
    usual = apart(plain(found, True), truth)
    bare = found.get_base_model()
    packed_model.install(bare)

    def forward(batch):
        return packed_model.hidden_states(bare, batch)

    said, ours = packed(found, forward)
    assert apart(ours, truth) <= 1.25 * usual + 1e-3
    # A captured graph runs the very kernels: the same to the bit, and again after another batch.
    replay = Replay(forward, [p for p in found.parameters() if p.requires_grad])
    for _ in range(2):
        replayed, theirs = packed(found, replay)
        assert torch.equal(replayed, said)
        assert apart(theirs, ours) <= 1e-3
    assert len(replay.sizes) == 1
