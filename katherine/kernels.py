"""How flash-linear-attention launches its kernels, measured once, in place of its own tuning: that compiles and times
every launch that might be best, 140 of them for the kernels below, minutes of it on every new machine. Of these one
alone is more than 13% behind the best, in kernels that make about a thirtieth of a step of the 9B's shape."""

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katherine.runs import write_json

# The package and version whose kernels these are: others may have kernels of other names or sizes.
PACKAGE, VERSION = "flash-linear-attention", "0.6.0"
# Hopper's: H100 and H200. Cards with less shared memory are launched otherwise, and were never timed.
CAPABILITY = "9.0"


@dataclass(frozen=True, slots=True)
class Launch:
    """warps: a thread block's; stages: of its software pipeline; sizes: the blocks that the kernel cuts its work into,
    by name."""

    warps: int
    stages: int = 3
    sizes: dict[str, int] = field(default_factory=dict)


# One H200, triton 3.6, the 9B's heads (16 and 32 of 128), bfloat16, about 3,700 tokens. Of the launches whose shared
# memory is at most 86 of the card's 227 kB, so that another triton has room, the one whose worst lag behind the best of
# all is the least, over packed rows and padded ones.
MEASURED = {
    "causal_conv1d_bwd_kernel": Launch(4, sizes={"BD": 32}),
    "causal_conv1d_fwd_kernel": Launch(4, sizes={"BD": 32}),
    "chunk_bwd_kernel_dv_local": Launch(4),
    "chunk_fwd_kernel_o": Launch(4, sizes={"BK": 64, "BV": 64}),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": Launch(2, stages=2, sizes={"BV": 32}),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": Launch(2, stages=2, sizes={"BV": 32}),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": Launch(1, sizes={"BK": 64}),
    "chunk_local_cumsum_scalar_kernel": Launch(1),
    "l2norm_bwd_kernel": Launch(1, sizes={"BT": 8}),
    "l2norm_fwd_kernel": Launch(8, sizes={"BT": 128}),
    # 4 warps took two thirds of the time. But the like kernel of fla's delta rule is kept to 2 on Hopper, where with 4
    # newer compilers made it read out of bounds and give wrong gradients (fla's issue 984); this one's launches were
    # timed, not compared. A step loses less than a millisecond.
    "prepare_wy_repr_bwd_kernel": Launch(2),
    "recompute_w_u_fwd_kernel": Launch(4),
}


def hand_over(folder: Path, capability: str) -> dict[str, str]:
    """Writes them into `folder`, as fla reads them, and returns the environment that has it do so; nothing for a card
    of another compute capability or where another version is installed: fla then tunes as ever. It reads its
    environment when it is imported."""
    try:
        if capability != CAPABILITY or importlib.metadata.version(PACKAGE) != VERSION:
            return {}
    except importlib.metadata.PackageNotFoundError:
        return {}
    for kernel, launch in MEASURED.items():
        config = {"kwargs": launch.sizes, "num_warps": launch.warps, "num_stages": launch.stages, "num_ctas": 1}
        _write(folder / f"{kernel}.json", {"kernel_name": kernel, "default_config": config})
    return {"FLA_CACHE_MODE": "default", "FLA_CONFIG_DIR": str(folder)}


def _write(path: Path, content: dict[str, Any]) -> None:
    """At every start of every process, and each writing is a round trip to a network volume."""
    try:
        if json.loads(path.read_bytes()) == content:
            return
    except (OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
