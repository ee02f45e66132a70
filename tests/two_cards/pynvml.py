"""In NVML's place, for child processes of tests that put this folder on PYTHONPATH: a driver with two H200 cards on
which nothing runs."""

from dataclasses import dataclass


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


nvmlMemory_v2 = 2


@dataclass
class _Memory:
    total: int = 150_754_820_096
    used: int = 0


@dataclass
class _Load:
    gpu: int = 0


def nvmlInit() -> None:
    pass


nvmlShutdown = nvmlInit


def nvmlSystemGetDriverVersion() -> str:
    return "580.95"


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    return 13000


def nvmlDeviceGetCount() -> int:
    return 2


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetName(card: int) -> str:
    return "NVIDIA H200"


def nvmlDeviceGetUUID(card: int) -> str:
    return f"GPU-{card}{card}{card}{card}"


def nvmlDeviceGetMemoryInfo(card: int, version: int) -> _Memory:
    return _Memory()


def nvmlDeviceGetUtilizationRates(card: int) -> _Load:
    return _Load()


def nvmlDeviceGetPowerUsage(card: int) -> int:
    return 76_000


def nvmlDeviceGetEnforcedPowerLimit(card: int) -> int:
    return 700_000


def nvmlDeviceGetCudaComputeCapability(card: int) -> tuple[int, int]:
    return 9, 0
