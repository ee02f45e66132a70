"""What a machine is, as far as a run's speed and cost depend on it: its GPU, cores and memory; and the data sheets of
the cards that are rented most. What a card is doing now is gpu's business."""

import json
import os
from dataclasses import asdict, dataclass, fields, replace

from katherine import cores, gpu, prices
from katherine.errors import DataError, SetupError
from katherine.runs import Run, write_json
from katherine.settings import Home

FILE = "hardware.json"


@dataclass(frozen=True, slots=True)
class Hardware:
    """gpu: the driver's name of the first card, "" without one; gpus: how many there are, used: on how many a run
    computed. gpu_memory, memory: bytes, None where not told. hourly: dollars an hour of all of it, as priced when this
    was written, None where nobody said."""

    gpu: str
    gpus: int
    gpu_memory: int | None
    cores: int
    memory: int | None
    hourly: float | None = None
    used: int = 1


@dataclass(frozen=True, slots=True)
class Sheet:
    """peak: bfloat16 FLOP/s of the tensor cores, dense. bandwidth: bytes a second. memory: bytes."""

    peak: float
    bandwidth: float
    memory: float


# NVIDIA's data sheets. They print tensor figures with sparsity, which training has none of: half of that is meant here.
SHEETS = {
    "H200 SXM": Sheet(989e12, 4.8e12, 141e9),
    "H200 NVL": Sheet(835e12, 4.8e12, 141e9),
    "H100 SXM": Sheet(989e12, 3.35e12, 80e9),
    "H100 NVL": Sheet(835e12, 3.9e12, 94e9),
    "H100 PCIe": Sheet(756e12, 2.0e12, 80e9),
    "A100 SXM 80GB": Sheet(312e12, 2.039e12, 80e9),
    "A100 PCIe 80GB": Sheet(312e12, 1.935e12, 80e9),
    "L40S": Sheet(362e12, 0.864e12, 48e9),
    "RTX 4090": Sheet(165e12, 1.008e12, 24e9),
}


def here(home: Home | None = None) -> Hardware:
    """This machine; with `home`, priced. A card whose driver does not answer counts as none."""
    try:
        cards = gpu.read()
    except SetupError:
        cards = []
    name = cards[0].name if cards else ""
    hourly = None
    if home is not None:
        try:
            price = prices.hourly(home, name)
            # A price is of one GPU, and a pod of several is paid for whole.
            hourly = price.dollars * max(len(cards), 1) if price else None
        except DataError:
            pass  # a damaged price list is said where prices are shown
    return Hardware(name, len(cards), cards[0].memory_total if cards else None, cores.count(), _memory(), hourly)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def take_down(home: Home, run: Run, used: int = 1) -> Hardware:
    """Writes what this machine is, and how many of its GPUs the run uses, into the run's folder, where it begins; a
    resumed run is then on its latest one."""
    found = replace(here(home), used=used)
    write_json(run.path / FILE, asdict(found))
    return found


def of_run(run: Run) -> Hardware | None:
    """The machine on which the run last began; None where that is not known."""
    try:
        raw = json.loads((run.path / FILE).read_bytes())
        # Older runs do not say how many were used: it was one.
        return Hardware(**{f.name: raw[f.name] if f.name != "used" else raw.get("used", 1) for f in fields(Hardware)})
    except (OSError, ValueError, TypeError, KeyError):
        return None
