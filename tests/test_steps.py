"""A fitted training against the same recipe as it is written: the same examples a step, the same losses, the same
adapter; and what a shortage of memory does to it."""

from types import SimpleNamespace

import pytest
import torch
from given import REPLIES, Told, reply, user, write_dataset
from safetensors.torch import load_file

from katherine import adapters, dpo, recipe, sft, steps
from katherine.examples import Conversation, Preference
from katherine.fit import Fit, Multiples
from katherine.packing import Size

TINY = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
    "save_steps": 100,
}


@pytest.fixture(scope="module")
def uneven_dataset(tmp_path_factory):
    """Forty conversations and pairs of very different lengths."""
    asked = [f"{question} {'Say more. ' * (index % 7)}" for index, question in enumerate(list(REPLIES) * 8)]
    said = [
        f"{answer} {'And so on, all day long. ' * (index % 5)}"
        for index, answer in enumerate(list(REPLIES.values()) * 8)
    ]
    conversations = [Conversation((user(a), reply(s))) for a, s in zip(asked, said, strict=True)]
    pairs = [
        Preference((user(a),), (reply(s),), (reply("As an AI, I cannot say."),), "self", "denial")
        for a, s in zip(asked, said, strict=True)
    ]
    return write_dataset(tmp_path_factory.mktemp("data") / "uneven", conversations, pairs)


def a_recipe(base, **changes):
    return recipe.preset("demo", recipe.SftRecipe, TINY | {"base": str(base)} | changes)


def tensors(folder):
    return load_file(folder / "adapter" / adapters.WEIGHTS)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen"])
def as_written(request, uneven_dataset, tmp_path_factory):
    """Without fitting: 16 × 2 on the small text model, three epochs of forty examples, an epoch's second step of eight;
    4 × 2 for one epoch on the published Qwen3.5 form, whose vocabulary makes padded logits slow."""
    base = request.getfixturevalue(request.param)
    rows, epochs = (16, 3) if request.param == "tiny_llama" else (4, 1)
    shape = {"per_device_batch_size": rows, "gradient_accumulation_steps": 2, "num_train_epochs": epochs}
    told, out = Told(), tmp_path_factory.mktemp("written")
    sft.train(uneven_dataset, a_recipe(base, fit=False, **shape), out, told)
    return base, shape, told, out


def close(found: Told, expected: Told, base) -> None:
    """The same steps, and their losses but for rounding. Of Qwen3.5 transformers takes the mean of two micro-batches'
    means, which weighs a token by its company: the same order of size, not the same number."""
    assert list(found.losses()) == list(expected.losses()) and len(found.losses()) >= 5
    for step, loss in found.losses().items():
        assert loss == pytest.approx(expected.losses()[step], rel=2e-3 if base.name == "tiny-llama" else 3e-2), step


def test_the_loss_curve_is_that_of_16_times_2(as_written, uneven_dataset, tmp_path, monkeypatch):
    base, shape, written, out = as_written
    # small parts, so that a step is cut into several
    monkeypatch.setattr("katherine.fit.CPU_TOKENS", 300)
    fitted = Told()
    sft.train(uneven_dataset, a_recipe(base, **shape), tmp_path, fitted)
    close(fitted, written, base)
    theirs, ours = tensors(out), tensors(tmp_path)
    assert set(theirs) == set(ours)
    # AdamW's first steps turn every rounding of a small gradient into a full step of its own
    apart = sum((theirs[n] - ours[n]).norm() ** 2 for n in ours) / sum(theirs[n].norm() ** 2 for n in ours)
    assert apart < (0.01 if base.name == "tiny-llama" else 0.1)


def test_dpo_starts_at_ln_2_with_rewards_of_exactly_0_and_goes_the_same_way(as_written, uneven_dataset, tmp_path):
    _, _, _, out = as_written
    shape = {"per_device_batch_size": 4, "gradient_accumulation_steps": 5, "num_train_epochs": 1, "save_steps": 100}
    told = {}
    for fitted in (True, False):
        told[fitted] = Told()
        wanted = recipe.preset("demo", recipe.DpoRecipe, shape | {"learning_rate": 1e-3, "fit": fitted})
        result = dpo.train(uneven_dataset, out / "adapter", wanted, tmp_path / str(fitted), told[fitted])
        assert result["first_loss"] == pytest.approx(0.693147, abs=1e-5) and result["first_rewards"] == [0.0, 0.0]
    assert list(told[True].losses()) == list(told[False].losses())
    for step, loss in told[True].losses().items():
        assert loss == pytest.approx(told[False].losses()[step], rel=2e-2), step
    names = {"margin", "accuracy", "reward_chosen", "reward_rejected"}
    assert all(names <= set(row) for row in told[True].rows)


def test_a_step_takes_a_size_that_was_captured_and_learns_the_same(as_written, uneven_dataset, tmp_path, monkeypatch):
    base, shape, written, _ = as_written
    roomy = Size(4096, 64, 256, 256)
    fit = Fit(1 << 20, 0, False, 1 << 26, Multiples(tokens=4096, rows=64, width=64, chunks=8))
    monkeypatch.setattr("katherine.fit.choose", lambda *_: fit)
    monkeypatch.setattr(steps.Packed, "_replay", SimpleNamespace(sizes={roomy}))
    taken = []
    losses = steps.PackedSft.losses
    monkeypatch.setattr(
        steps.PackedSft,
        "losses",
        lambda self, model, batch, whole: taken.append(batch.size) or losses(self, model, batch, whole),
    )
    told = Told()
    sft.train(uneven_dataset, a_recipe(base, **shape), tmp_path, told)
    close(told, written, base)
    assert taken == [roomy] * len(told.losses())


def test_a_held_out_share_is_evaluated_packed(as_written, uneven_dataset, tmp_path):
    base, shape, _, _ = as_written
    result = sft.train(
        uneven_dataset, a_recipe(base, held_out=0.2, **shape | {"num_train_epochs": 1}), tmp_path, Told()
    )
    assert result["held_out"] == 8 and 0 < result["last_eval_loss"] < 20


def test_a_shortage_of_memory_shrinks_the_layout_and_loses_no_step(as_written, uneven_dataset, tmp_path, monkeypatch):
    base, shape, written, _ = as_written
    whole = steps.Packed._attempt

    def short(self, model, laid_out):
        if self.fit.tokens > 600:
            # as far as the second batch, whose gradient of the first must not stay
            whole(self, model, laid_out)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, model, laid_out)

    monkeypatch.setattr(steps.Packed, "_attempt", short)
    told = Told()
    sft.train(uneven_dataset, a_recipe(base, **shape), tmp_path, told)
    assert [line for line in told.lines if line.startswith("Out of GPU memory")]
    close(told, written, base)


def test_a_cut_keeps_every_unit_balances_and_never_exceeds_the_limit():
    units = [((list(range(size)), [True] * size),) for size in (5, 90, 30, 31, 12, 60, 7, 45)]
    for limit in (90, 100, 150, 280, 1000):
        groups = steps.cut(units, limit)
        assert sorted(len(u[0][0]) for g in groups for u in g) == sorted(len(u[0][0]) for u in units)
        sizes = [sum(len(ids) for unit in group for ids, _ in unit) for group in groups]
        assert max(sizes) <= max(limit, 90)
    assert len(steps.cut(units, 280)) == 1
    assert len(steps.cut(units, 50)) > 4, "a unit longer than the limit stands alone"


def test_the_two_rows_of_a_pair_stay_together_and_in_turn():
    pair = (([1, 2, 3], [False, True, True]), ([1, 4], [False, True]))
    step = steps.lay_out([pair, pair], Fit(4, 0, False, 1 << 20, Multiples()), "cpu")
    assert step.units == 2 and step.tokens == 10 and step.scored == 6
    for batch in step.batches:
        assert batch.filled == 2 and batch.owner.tolist() == [0, 0, 1]
        sums = steps.sequence_logprobs(torch.tensor([1.0, 2.0, 4.0]), batch)
        assert sums.tolist() == [3.0, 4.0]


def test_the_preference_loss_is_ln_2_without_a_difference_and_falls_with_the_margin():
    same = torch.tensor([-3.0, -5.0])
    loss, rewards = steps.preference_loss(same, same, 0.1)
    assert loss.item() == pytest.approx(0.693147, abs=1e-6) and rewards.tolist() == [[0.0, 0.0]]
    better, _ = steps.preference_loss(same + torch.tensor([2.0, -2.0]), same, 0.1)
    assert better.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor(-0.4))).item(), abs=1e-6)
