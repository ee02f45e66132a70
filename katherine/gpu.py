"""What the NVIDIA driver says about its cards at this moment, through NVML. Reading only: what the figures mean is
the doctor's to say, and torch is never asked."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from katherine.errors import SetupError


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One card. None stands for what the card or its driver does not report.

    memory_total, memory_used: bytes. utilisation: percent of the last sample period in which a kernel ran.
    power, power_limit: watts. driver: its version. cuda: the newest CUDA that the driver runs, such as "12.8".
    compute_capability: such as "9.0". uuid: as CUDA_VISIBLE_DEVICES may name it.
    """

    index: int
    name: str
    driver: str
    cuda: str
    compute_capability: str
    memory_total: int | None
    memory_used: int | None
    utilisation: int | None
    power: float | None
    power_limit: float | None
    uuid: str = ""


def read() -> list[GpuReading]:
    """Every card of this machine, in the driver's order; [] where there is no NVIDIA driver.

    Raises SetupError where a driver is there and does not answer.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return []
    except nvml.NVMLError as error:
        raise SetupError(_unwell(error)) from error
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 12080 stands for 12.8
        version = f"{cuda // 1000}.{cuda % 1000 // 10}"
        return [_card(nvml, index, driver, version) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise SetupError(_unwell(error)) from error
    finally:
        nvml.nvmlShutdown()


# What the processor goes by where there is no card.
PROCESSOR = "0"


def usable() -> tuple[str, ...]:
    """The cards that this process may compute on, by number, all where CUDA_VISIBLE_DEVICES is not set; a card's slice
    by the name that is given there. Without a card the processor stands for one: there is always one at least."""
    told = _told()
    try:
        cards = read()
    except SetupError:
        # It may answer again; until then nobody takes a card that was not named.
        return tuple(told or ()) or (PROCESSOR,)
    if told is None:
        return tuple(str(card.index) for card in cards) or (PROCESSOR,)
    # One card has one name, whatever it was called: who holds it must be known to whoever calls it otherwise.
    numbers = {card.uuid: str(card.index) for card in cards if card.uuid}
    named = [next((number for uuid, number in numbers.items() if uuid.startswith(name)), name) for name in told]
    there = [name for name in dict.fromkeys(named) if cards and (not name.isdigit() or int(name) < len(cards))]
    return tuple(there) or (PROCESSOR,)


def of(name: str) -> GpuReading | None:
    """The card of that name, a number or the beginning of a UUID; the first where there is no such card. None without
    a GPU. Raises SetupError as read does."""
    cards = read()
    if name.isdigit() and int(name) < len(cards):
        return cards[int(name)]
    named = [card for card in cards if card.uuid and card.uuid.startswith(name)]
    return next(iter([*named, *cards]), None)


def mine() -> GpuReading | None:
    """The card that this process computes on: the first that CUDA_VISIBLE_DEVICES lets it see. None without a GPU.
    Raises SetupError as read does."""
    told = _told()
    return None if told == [] else of(told[0] if told else PROCESSOR)


def alone(name: str) -> dict[str, str]:
    """What the environment of a process says that is to compute on that card and see no other: given several,
    transformers would split and enlarge the batch, and llama.cpp spread a model over them. Nothing where all cards
    are hidden from this process. CUDA by itself counts the fastest card first, the driver by their place on the bus."""
    return {} if _told() == [] else {"CUDA_VISIBLE_DEVICES": name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _told() -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES, [] where it hides every card, None where it is not set."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if told is None else [name.strip() for name in told.split(",") if name.strip()]


def _card(nvml: Any, index: int, driver: str, cuda: str) -> GpuReading:
    card = nvml.nvmlDeviceGetHandleByIndex(index)

    def reported(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(card)
        except nvml.NVMLError_NotSupported:
            return None

    # The first version of this question counts what the driver keeps for itself as used.
    memory = reported(lambda card: nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2))
    load = reported(nvml.nvmlDeviceGetUtilizationRates)
    power = reported(nvml.nvmlDeviceGetPowerUsage)  # milliwatts, as the limit
    limit = reported(nvml.nvmlDeviceGetEnforcedPowerLimit)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    return GpuReading(
        index=index,
        name=nvml.nvmlDeviceGetName(card),
        driver=driver,
        cuda=cuda,
        compute_capability=f"{major}.{minor}",
        memory_total=None if memory is None else int(memory.total),
        memory_used=None if memory is None else int(memory.used),
        utilisation=None if load is None else int(load.gpu),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        uuid=reported(nvml.nvmlDeviceGetUUID) or "",
    )


def _unwell(error: Exception) -> str:
    remedy = "Restart the machine, or choose another host if that does not help."
    return f"The NVIDIA driver of this machine does not answer: {error}. {remedy}"
