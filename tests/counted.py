"""A dataset's folder of which only the report is there: for whatever asks how many examples it has, and how long."""

import json
from typing import Any

from katherine.settings import Home

# Tokens of the corpus that the k0 recipe was derived on.
LENGTHS = {"p50": 102, "p90": 192, "p99": 246, "max": 280, "over_max_length": 0}


def write_dataset(
    home: Home,
    dataset: str,
    sft: int = 1886,
    dpo: int = 180,
    lengths: dict[str, Any] | None = LENGTHS,
    *,
    fingerprint: str = "0" * 64,
    files: int = 1,
) -> None:
    """Conversations, pairs in use, their token lengths (with `pairs` where those of pairs are others; None: not
    counted), and files of 1,000 lines and more."""
    tokens: dict[str, Any] | None = None
    if lengths is not None:
        tokens = {"pairs": lengths} | lengths | {"max_length": 1024, "base": "Qwen/Qwen3.5-9B"}
    report = {
        "options": {},
        "files": files,
        "lines": 1_000 * files,
        "sft": {"unique": sft},
        "dpo": {"used": dpo},
        "unrecognised": 0,
        "tokens": tokens,
        "fingerprint": fingerprint,
        "by_file": [{"file": f"part_{n}.jsonl", "lines": 1_000 + n} for n in range(files)],
        "problems": [],
    }
    folder = home.datasets / dataset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
