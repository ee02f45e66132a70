"""Packed batches against the model's own padded ones: the same log-probabilities and the same gradients, for both
kinds of layers that look back, wherever boundaries, filler and empty rows fall."""

import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from katherine import fused, model, packed_model, packing, replay
from katherine.fit import CHUNK, Multiples
from katherine.likelihood import token_logprobs
from katherine.packing import Size

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "out_proj"]
# One token short of, at and past a chunk of the recurrence, and shorter than the convolution.
LENGTHS = (3, 23, CHUNK - 1, CHUNK, CHUNK + 1, 130)


def some_rows(lengths=LENGTHS) -> list[tuple[list[int], list[bool]]]:
    numbers = random.Random(0)
    rows = []
    for length in lengths:
        ids = [numbers.randrange(1000) for _ in range(length)]
        # two learned spans, as in a talk of two turns; the very first token too, which nothing predicts
        rows.append(
            (ids, [index == 0 or length // 4 < index < length // 2 or index > length - 3 for index in range(length)])
        )
    return rows


def adapted(checkpoint):
    kind, _ = model.architecture(checkpoint)
    bare = kind.from_pretrained(checkpoint, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, exclude_modules=".*visual.*", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    found = get_peft_model(bare, config)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return found.eval()


def gradients(adapted_model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in adapted_model.named_parameters() if p.grad is not None}
    adapted_model.zero_grad()
    return found


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def both(request):
    """A model that was taught to read packed batches, and what it said of the rows before, padded."""
    found = adapted(request.getfixturevalue(request.param))
    rows = some_rows()
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    learned = torch.tensor([on + [False] * (width - len(on)) for _, on in rows])[:, 1:]
    logits = found(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    said = logits[learned].log_softmax(-1).gather(1, ids[:, 1:][learned][:, None]).squeeze(1)
    (-said.mean()).backward()
    expected = said.detach(), gradients(found)
    packed_model.install(found.get_base_model())
    return found, rows, expected


WIDE = Multiples(512, 8, 64, 16)


@pytest.mark.parametrize(
    ("multiples", "known"),
    [
        (Multiples(), ()),
        (Multiples(64, 8, 32, 16), ()),
        (Multiples(width=50, tokens=7), ()),
        (WIDE, [Size(1024, 16, 320, 64)]),
    ],
)
def test_a_packed_batch_gives_the_padded_ones_log_probabilities_and_gradients(both, multiples, known):
    found, rows, (said, expected) = both
    bare = found.get_base_model()
    batch = packing.pack(rows, multiples, known)
    assert not known or batch.size in known
    hidden = packed_model.hidden_states(bare, batch)[batch.scored]
    # a chunk of two tokens: the head never holds more logits at a time
    ours = token_logprobs(hidden, bare.lm_head.weight, batch.labels, chunk=2 * len(bare.lm_head.weight))
    assert torch.allclose(ours, said, atol=1e-5)
    (-ours.mean()).backward()
    found_gradients = gradients(found)
    assert set(found_gradients) == set(expected)
    for name, gradient in found_gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_a_forward_pass_reads_nothing_of_a_batch_but_what_a_captured_graph_is_given(both):
    found, rows, _ = both
    bare = found.get_base_model()
    captured = packing.pack(rows, WIDE)
    batch = packing.pack(some_rows((9, 40, 70)), WIDE, [captured.size])
    assert batch.size == captured.size and batch.filler > captured.filler and batch.filled < captured.filled
    loaded = replace(captured, **{name: getattr(batch, name) for name in replay.READ})
    with torch.no_grad():
        expected = packed_model.hidden_states(bare, batch)[batch.scored]
        assert torch.equal(packed_model.hidden_states(bare, loaded)[batch.scored], expected)


def test_a_recomputed_layer_gives_the_same_gradients(both):
    found, rows, (_, expected) = both
    bare = found.get_base_model()
    packed_model.recompute(bare, len(packed_model.backbone(bare).layers))
    found.train()
    try:
        batch = packing.pack(rows)
        hidden = packed_model.hidden_states(bare, batch)[batch.scored]
        (-token_logprobs(hidden, bare.lm_head.weight, batch.labels).mean()).backward()
        assert all((g - expected[n]).norm() <= 1e-4 * expected[n].norm() for n, g in gradients(found).items())
    finally:
        found.eval()
        packed_model.recompute(bare, 0)


def test_sizes_are_rounded_up_and_what_is_added_belongs_to_nobody():
    rows = some_rows((5, 9))
    batch = packing.pack(rows, Multiples(tokens=32, rows=4, width=8, chunks=8))
    assert batch.size == (32, 4, 16, 8) and batch.tokens == 14 and batch.filler == 18 and batch.filled == 2
    assert batch.bounds.tolist() == [0, 5, 14, 14, 14, 32, 32]
    # the filler is a sequence of its own; chunks that are added belong to one that is empty
    assert batch.chunks.tolist() == [[0, 0], [1, 0], [4, 0], [5, 0], [5, 0], [5, 0], [5, 0], [5, 0]]
    full = packing.pack(rows, Multiples(tokens=32))
    assert full.width == 10, "filler needs a place that is nobody's"
    assert full.place[-1] == 19 and 19 not in full.place[:14].tolist()


def test_a_size_that_is_known_is_taken_where_it_holds_the_batch_and_is_little_larger():
    rows, multiples = some_rows((60, 70)), Multiples(128, 4, 64, 8)
    new = Size(256, 4, 128, 8)
    larger, wider = Size(384, 8, 192, 16), Size(256, 4, 320, 8)
    too_large, too_narrow = Size(512, 4, 128, 8), Size(256, 4, 64, 8)
    # 60 and 70 tokens and 126 or 254 of filler: 1 + 2 + 2 or 4 chunks
    too_few_rows, too_few_chunks = Size(256, 1, 128, 8), Size(256, 4, 128, 4)
    for known, taken in (
        ([], new),
        ([larger], larger),
        ([larger, wider], wider),
        ([larger, wider, new], new),
        ([too_large, too_narrow, too_few_rows, too_few_chunks], new),
    ):
        assert packing.pack(rows, multiples, known).size == taken, known
    # without a row to spare, filler needs a place beyond the longest row
    assert packing.pack(rows, Multiples(tokens=256), [Size(256, 2, 70, 8)]).width == 71
    assert packing.pack(rows, Multiples(tokens=256), [Size(256, 2, 71, 8)]).width == 71


def test_a_rows_first_token_is_never_scored_and_each_score_knows_its_row():
    rows = [([7, 8, 9], [True, True, False]), ([4, 5], [True, True])]
    batch = packing.pack(rows)
    assert batch.labels.tolist() == [8, 5] and batch.owner.tolist() == [0, 1]
    assert batch.ids[batch.scored].tolist() == [7, 4]


def test_an_empty_row_is_refused():
    with pytest.raises(ValueError, match="empty"):
        packing.pack([([], [])])


def test_the_fused_formulas_are_transformers_own():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    torch.manual_seed(0)
    x, gate = torch.randn(40, 32), torch.randn(40, 32)
    norm = theirs.Qwen3_5RMSNorm(32)
    norm.weight.data.normal_()
    assert torch.allclose(fused.rms_norm(x, 1 + norm.weight, norm.eps), norm(x), atol=1e-6)
    gated = theirs.Qwen3_5RMSNormGated(32)
    gated.weight.data.normal_()
    ours = fused.gated_rms_norm(x, gate, gated.weight, gated.variance_epsilon)
    assert torch.allclose(ours, gated(x, gate), atol=1e-6)
    assert torch.allclose(fused.swiglu(gate, x), torch.nn.functional.silu(gate) * x, atol=1e-6)


def test_the_fused_convolution_begins_anew_at_each_boundary():
    from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn

    torch.manual_seed(0)
    x, weight = torch.randn(41, 16), torch.randn(16, 4)
    positions = torch.cat([torch.arange(2), torch.arange(39)])
    ours = fused.short_convolution(x, weight, positions)
    alone = [causal_conv1d_fn(part.T[None], weight, None, "silu")[0].T for part in (x[:2], x[2:])]
    assert torch.allclose(ours, torch.cat(alone), atol=1e-6)
