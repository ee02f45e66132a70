"""What can be talked to: the quants of every export, its unquantised file where it was kept, and the bare base. Only
files that this project made and whose sha256 is the one in their manifest. Loading them is jobs.pool's."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Column:
    """One GGUF. id: "<export's run id>:<quant>", or "base:<name>". export: the run that made it, None for a base.
    base: whose template its prompts are made with, as bases.tokenizer takes it. bytes, sha256: as its manifest says."""

    id: str
    export: str | None
    quant: str
    base: str
    path: Path
    bytes: int
    sha256: str
