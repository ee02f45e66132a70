"""What these tests share: fla launches its kernels as a job has it do. By itself it would tune them for minutes; it
reads its environment when it is imported."""

import os

from katherine import gpu, kernels, settings

if card := gpu.mine():
    os.environ |= kernels.hand_over(settings.home().cache / "kernels" / "tests", card.compute_capability) | os.environ
