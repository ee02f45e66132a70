"""What a machine costs an hour, by kind of GPU: first estimates until somebody enters what they pay, each entry with
its day. What a run costs is estimate's business."""

import json
import math
import os
import re
import socket
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from katherine.errors import DataError, PriceError
from katherine.runs import write_json
from katherine.settings import Home


@dataclass(frozen=True, slots=True)
class Price:
    """dollars: an hour, of one GPU and the machine around it. dated: the ISO day it was entered, None for the estimates
    that come with the program. source: who says so."""

    kind: str
    dollars: float
    dated: str | None
    source: str


_FIRST = "first estimate for a Secure Cloud pod; enter what you pay"
DEFAULTS = {
    kind: Price(kind, dollars, None, _FIRST)
    for kind, dollars in (("H200 SXM", 3.99), ("H100 SXM", 3.49), ("H100 PCIe", 2.49))
}
ENTERED = "entered here"
THIS_POD = "this pod"
# An hour on the largest machines for rent is under $100; ten times that is a slip of the finger.
HIGHEST = 1000.0
_KIND = re.compile(r"[0-9A-Za-z][0-9A-Za-z ./()+-]{0,59}")
_lock = threading.RLock()


def path(home: Home) -> Path:
    return home.root / "prices.json"


def kind(gpu_name: str) -> str:
    """The kind under which a card is rented, from the driver's name for it: "NVIDIA H100 80GB HBM3" is an H100 SXM.
    Names that say no form factor stay as they are, without the maker."""
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", gpu_name.strip())
    name = re.sub(r"^GeForce\s+", "", name)
    # The driver writes PCIe and NVL where a Hopper card is one of these, and only memory, or nothing, for SXM.
    if match := re.fullmatch(r"(GH200|H[12]00|H20|B[23]00)(?: \d+GB)?(?: HBM3e?)?", name):
        return f"{match[1]} SXM" if match[1] in ("H100", "H200") else match[1]
    if match := re.fullmatch(r"A100-(SXM4|PCIE)-(40|80)GB", name):
        return f"A100 {'SXM' if match[1] == 'SXM4' else 'PCIe'} {match[2]}GB"
    if match := re.fullmatch(r"A100 (40|80)GB PCIe", name):
        return f"A100 PCIe {match[1]}GB"
    return name


def listed(home: Home) -> dict[str, Price]:
    """Every kind with a price, the defaults' first, in the order they were entered. Raises DataError for a damaged
    file."""
    return DEFAULTS | {name: price for name, price in _entered(home).items() if name != THIS_POD}


def hourly(home: Home, gpu_name: str = "") -> Price | None:
    """What an hour with this card costs, by the driver's name for it ("" for a machine without one); None where nobody
    said. What was entered for this very pod comes before the kind's price. Raises DataError for a damaged file."""
    if (pod := this_pod(home)) and _raw(home)[THIS_POD].get("gpu", "") == gpu_name:
        return pod
    return listed(home).get(kind(gpu_name)) if gpu_name else None


def this_pod(home: Home) -> Price | None:
    """What was entered for the machine that asks, or None: a price of another pod on the same volume is not ours."""
    entry = _raw(home).get(THIS_POD)
    if not isinstance(entry, dict) or entry.get("machine") != machine():
        return None
    return _entered(home).get(THIS_POD)


def enter(home: Home, name: str, dollars: Any, gpu_name: str = "") -> Price:
    """Takes down a kind's price as of today, or under "this pod" that of this machine with its card's name. Raises
    PriceError for what is no price or no kind, DataError for a damaged file."""
    name = " ".join(str(name).split())
    if not _KIND.fullmatch(name):
        raise PriceError(f"{name!r} cannot name a kind of GPU: up to 60 letters, digits and spaces, as in H200 SXM.")
    price = Price(name, _dollars(name, dollars), datetime.now(UTC).date().isoformat(), ENTERED)
    entry = asdict(price)
    del entry["kind"]
    if name == THIS_POD:
        entry |= {"machine": machine(), "gpu": gpu_name}
    with _lock:
        home.root.mkdir(parents=True, exist_ok=True)
        write_json(path(home), _raw(home) | {name: entry})
    return price


def forget(home: Home, name: str) -> None:
    """Takes an entered price back: a kind with a first estimate has that again. Raises PriceError where there is no
    such entry."""
    with _lock:
        raw = _raw(home)
        if name not in raw:
            raise PriceError(f"No price was entered for {name!r}.")
        write_json(path(home), {other: entry for other, entry in raw.items() if other != name})


def machine() -> str:
    """The pod, or else the host's name."""
    return os.environ.get("RUNPOD_POD_ID") or socket.gethostname()


def _dollars(name: str, given: Any) -> float:
    text = str(given).strip().removeprefix("$").strip()
    try:
        value = float(text)
    except ValueError:
        raise PriceError(f"{name}: {text!r} is not a price. Give dollars an hour, as in 3.79.") from None
    if not math.isfinite(value) or not 0 <= value <= HIGHEST:
        raise PriceError(f"{name}: {text} is not between 0 and {HIGHEST:,.0f} dollars an hour.")
    return value


def _raw(home: Home) -> dict[str, Any]:
    try:
        raw = json.loads(path(home).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path(home)} is damaged ({error}). Mend it, or remove it to have the defaults.") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path(home)} is damaged: it is not a JSON object. Remove it to have the defaults.")
    return raw


def _entered(home: Home) -> dict[str, Price]:
    found = {}
    for name, entry in _raw(home).items():
        try:
            found[name] = Price(name, float(entry["dollars"]), entry["dated"], str(entry["source"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path(home)} is damaged at {name!r} ({error!r}). Mend it, or remove it.") from error
    return found
