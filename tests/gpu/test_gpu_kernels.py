"""fla launches its kernels as it was told, and would have tried each of these launches itself."""

import os
import subprocess
import sys

import pytest
import torch

from katherine import gpu, kernels
from katherine.settings import PROJECT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ASKING = """
import importlib, sys
from fla.ops.utils import cache

found = {}
for name in sys.argv[1:]:
    for each in vars(importlib.import_module(name)).values():
        while each is not None and not isinstance(each, cache.CachedAutotuner):
            each = getattr(each, "fn", None)
        if each is not None:
            each.maybe_load_cached_config(key=cache.AutotuneKey(("any",)), nargs={}, runtime_kwargs={})
            told = each.cache.get(("any",))
            if told is not None:
                own = [str(config) for config in each.configs]
                assert str(told) in own, (each.kernel_name, str(told), own)
                print(each.kernel_name)
"""
MODULES = (
    "fla.modules.causal_conv1d.ops",
    "fla.modules.norm.l2norm",
    "fla.ops.common.chunk_delta_h",
    "fla.ops.common.chunk_o",
    "fla.ops.gated_delta_rule.chunk_fwd",
    "fla.ops.gated_delta_rule.wy_fast",
    "fla.ops.utils.cumsum",
)


def test_every_launch_is_one_of_flas_own(tmp_path):
    card = gpu.mine()
    assert card is not None
    environment = kernels.hand_over(tmp_path, card.compute_capability)
    if not environment:
        pytest.skip("another card, or another version of fla: it tunes as ever")
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = subprocess.run(
        [sys.executable, "-c", ASKING, *MODULES],
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-4000:]
    assert set(told.stdout.split()) == set(kernels.MEASURED)
