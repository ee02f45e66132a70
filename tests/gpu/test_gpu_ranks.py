"""One SFT shared by two NVIDIA GPUs, through the real worker: its losses are those of one."""

import json

import pytest
import torch
from test_ranks import asked, carried_out, home

# ruff: noqa: F401, F811  (fixtures)

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")

# The first run compiles kernels.
PATIENCE = 540.0


@pytest.mark.parametrize("four_bit", [True, False])
def test_two_gpus_make_the_steps_of_one(home, tiny_qwen, four_bit):
    changes = {"load_in_4bit": four_bit, "num_train_epochs": 6, "held_out": 0.3, "optim": "adamw_8bit"}
    one, two = (carried_out(home, asked(home, tiny_qwen, **changes), n, patience=PATIENCE) for n in (1, 2))
    assert list(two.losses()) == list(one.losses()) and len(one.losses()) > 3
    # bfloat16 keeps three digits, and which tokens stand beside each other decides how sums are rounded.
    assert list(two.losses().values()) == pytest.approx(list(one.losses().values()), rel=1e-2)
    assert two.losses("eval_loss") == pytest.approx(one.losses("eval_loss"), rel=1e-2)
    assert json.loads((two.run.path / "hardware.json").read_bytes())["used"] == 2
