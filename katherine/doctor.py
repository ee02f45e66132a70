"""What this machine can do, and what is wrong with it: one check a subject, each on its own, so that a failing one
hides no other. It mends nothing, and what could take this process down (torch, llama.cpp) runs in a child."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from katherine import bases, cores, gpu, pod
from katherine import disk as mounted
from katherine.errors import KatherineError, SetupError
from katherine.settings import PROJECT, SECRETS, Home, child_environment, secret

GIB = 2**30
# The demo takes up to 4 GB of memory, and its checkpoints, merged model and GGUFs about 2 GB of disk.
DEMO_MEMORY = 4 * GIB
DEMO_DISK = 4 * GIB
# At 9B: the base 19 GB, the merged model and its bf16 GGUF 18 GB each, three quants 19.5 GB.
NINE_B_DISK = 75 * 10**9
# Loading torch from a cold network volume takes most of a minute; a child that takes longer than this hangs.
CHILD_SECONDS = 180
HUB_SECONDS = 5
SETUP = "bash bootstrap.sh setup"
SETUP_ANEW = "bash bootstrap.sh setup --again"
SECRET_USES = {
    "HF_READ_TOKEN": "gated bases and private datasets need it",
    "HF_TOKEN": "the push needs it, with the right to write",
    "RUNPOD_API_KEY": "auto-stop needs it; a RunPod pod has one of its own",
}

State = Literal["ok", "warning", "problem", "absent"]


@dataclass(frozen=True, slots=True)
class Check:
    """state: "problem" keeps something from working, "warning" may, "absent" is no fault by itself."""

    name: str
    state: State
    finding: str
    remedy: str = ""


def examine(home: Home) -> list[Check]:
    """Every check, in the order to read them. Never raises: a check that fails is itself a finding."""
    subjects: list[tuple[str, Callable[[], Check]]] = [
        ("Python", python),
        ("packages", packages),
        ("GPU", graphics),
        ("torch", torch),
        ("memory", memory),
        ("disk", lambda: disk(home)),
        ("llama.cpp", llama_build),
        ("decode", decode),
        ("converter", lambda: converter(home)),
        *((name, lambda name=name: secret_present(name)) for name in SECRETS),
        ("hub", hub),
    ]
    return [_alone(name, subject) for name, subject in subjects]


def _alone(name: str, subject: Callable[[], Check]) -> Check:
    try:
        return subject()
    except KatherineError as error:
        return Check(name, "problem", str(error))
    except Exception as error:
        return Check(name, "problem", f"could not be examined: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------ this installation


def python() -> Check:
    finding = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        return Check("Python", "problem", f"{finding}; 3.11 or 3.12 is needed", SETUP)
    holding = mounted.mount(Path(sys.prefix))
    if holding.on_network:
        remedy = f"set XDG_CACHE_HOME to a folder on a local disk, then {SETUP_ANEW}"
        return Check(
            "Python", "warning", f"{finding}, on a {holding.kind} file system: starting anything is slow", remedy
        )
    return Check("Python", "ok", finding)


def packages() -> Check:
    """Whether what requirements.txt pins (and, with a GPU, requirements-cuda.txt) is what is installed."""
    files = ["requirements.txt"]
    if _gpus():
        files.append("requirements-cuda.txt")
    pins = [pin for file in files for pin in _pins(PROJECT / file)]
    differing = []
    for name, pinned in pins:
        found = _version(name)
        # A build's own mark, as in 2.13.0+cpu, is no difference.
        if found is None or found.partition("+")[0] != pinned:
            differing.append(f"{name} {found or 'missing'} instead of {pinned}")
    if differing:
        return Check("packages", "problem", ", ".join(differing), f"{SETUP}; if that installs nothing, {SETUP_ANEW}")
    shown = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes", "llama-cpp-python")
    versions = ", ".join(f"{name} {_version(name)}" for name in shown if _version(name))
    return Check("packages", "ok", f"{len(pins)} as pinned: {versions}")


def _pins(requirements: Path) -> list[tuple[str, str]]:
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return [(name.partition("[")[0].strip(), version.strip()) for name, version in pairs]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------ this machine


def graphics() -> Check:
    cards = gpu.read()
    if not cards:
        nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if nodes:
            remedy = "restart the machine, or start its container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            return Check("GPU", "problem", f"{nodes[0]} is there, but no driver library answers for it", remedy)
        return Check("GPU", "absent", "no NVIDIA GPU: the small base trains on the CPU, a 9B one does not")
    described = []
    for card in cards:
        held = "memory not reported"
        if card.memory_total is not None and card.memory_used is not None:
            held = f"{card.memory_used / GIB:.1f} of {card.memory_total / GIB:.1f} GiB in use"
        watts = "" if card.power is None else f", {card.power:.0f} W"
        limit = "" if card.power_limit is None else f" of {card.power_limit:.0f} W"
        described.append(f"{card.name} (compute capability {card.compute_capability}), {held}{watts}{limit}")
    return Check("GPU", "ok", f"{'; '.join(described)}; driver {cards[0].driver}, CUDA up to {cards[0].cuda}")


def _gpus() -> list[gpu.GpuReading]:
    try:
        return gpu.read()
    except SetupError:  # the GPU's own check says so
        return []


def torch() -> Check:
    """torch, asked in a child whether it can compute on the card. This process never imports it."""
    said = _child("report_torch")
    built = f"CUDA {said['cuda']}" if said["cuda"] else "the CPU"
    finding = f"{said['version']}, built for {built}"
    if said["device"]:
        return Check("torch", "ok", f"{finding}; computes on {said['device']}, bf16 {'yes' if said['bf16'] else 'no'}")
    cards = _gpus()
    if not cards:
        return Check("torch", "ok", f"{finding}; computes on the CPU with {said['threads']} threads")
    if not said["cuda"]:
        return Check("torch", "problem", f"{finding}, but there is a GPU", SETUP_ANEW)
    finding += f", cannot use the GPU: {said['error']} (the driver runs CUDA up to {cards[0].cuda})"
    return Check("torch", "problem", finding, f"{SETUP_ANEW}; if that does not help, choose another host")


def report_torch() -> None:
    """Runs in a child."""
    import torch

    said: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "device": "", "error": ""}
    said["threads"] = torch.get_num_threads()
    try:
        torch.ones(1, device="cuda")
        said |= {"device": torch.cuda.get_device_name(), "bf16": torch.cuda.is_bf16_supported()}
    except (RuntimeError, AssertionError) as error:  # the second where torch is built without CUDA
        said["error"] = str(error).splitlines()[0]
    print(json.dumps(said))


def memory() -> Check:
    import psutil

    machine = psutil.virtual_memory()
    total, available, limited = machine.total, machine.available, ""
    limit, used = cgroup_memory()
    if limit is not None and limit < total:
        total, available = limit, min(available, limit - used)
        limited = ", the limit of this container"
    finding = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free{limited}, {cores.count()} cores"
    if available < DEMO_MEMORY:
        return Check("memory", "warning", finding, "the demo takes up to 4 GB: end what else is running")
    return Check("memory", "ok", finding)


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int | None, int]:
    """The tightest memory limit of this process's control groups, in bytes, and what is used under it beside files
    that the kernel only keeps at hand; None: no limit.

    A container sees its host's memory in /proc/meminfo, and is killed at this limit.
    """
    found: list[tuple[int, int]] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name = root, "memory.max", "memory.current"
        elif controllers == "memory":
            base, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be the host's and not be there: its root is then this container's own group.
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # absent, or the word "max"
                limit = int((folder / limit_name).read_text())
                kept = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
                found.append((limit, int((folder / used_name).read_text()) - int(kept[1] if kept else 0)))
            if folder == base:
                break
    return min(found, default=(None, 0))


def disk(home: Home) -> Check:
    folder = next(path for path in (home.root, *home.root.parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Check("disk", "problem", f"{folder} cannot be written", "set KATHERINE_HOME to a folder that can")
    free, holding = shutil.disk_usage(folder).free, mounted.mount(folder)
    finding = f"{free / 10**9:.0f} GB free for {home.root} ({holding.kind})"
    if free < DEMO_DISK:
        return Check("disk", "problem", finding, "the demo needs 4 GB: make room, or set KATHERINE_HOME elsewhere")
    if _gpus() and free < NINE_B_DISK:
        return Check("disk", "warning", finding, "a 9B run with its export takes about 75 GB: make room before it")
    if pod.here() and not mounted.outlives_a_stop(folder):
        remedy = f"set KATHERINE_HOME to a folder on the pod's volume, such as {pod.VOLUME}/katherine"
        return Check("disk", "warning", f"{finding}: the container's own disk, wiped when the pod stops", remedy)
    if holding.on_network:
        remedy = "compare with the volume's size where you rented it: this figure ignores your quota"
        return Check("disk", "warning", f"{finding}: a network volume", remedy)
    return Check("disk", "ok", finding)


# --------------------------------------------------------------------------------------------------------- llama.cpp


def llama_build() -> Check:
    said = _child("report_llama")
    where = "the GPU" if said["offload"] else "the CPU"
    finding = f"llama-cpp-python {said['version']}, computes on {where}: {said['system'].strip(' |')}"
    if _gpus() and not said["offload"]:
        remedy = f"install the CUDA toolkit that fits the driver (a 'devel' image has it), then {SETUP}"
        return Check("llama.cpp", "warning", f"{finding}. Chat will not use the GPU", remedy)
    return Check("llama.cpp", "ok", finding)


def report_llama() -> None:
    """Runs in a child."""
    import llama_cpp

    said = {
        "version": llama_cpp.__version__,
        "offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(said))


def decode(model: Path | None = None) -> Check:
    """One token of a quantised model (the small base by default), in a child: a llama.cpp that was built for another
    CPU loads, and crashes here."""
    model = model or bases.small_gguf()
    said = _child("report_decode", str(model.resolve()))
    finding = f"one token of {model.name} in {said['seconds']:.2f} s, after {said['load']:.1f} s to load"
    return Check("decode", "ok", finding)


def report_decode(model: str) -> None:
    """Runs in a child."""
    import time

    import llama_cpp

    started = time.monotonic()
    # One thread: enough for one token, and several wait on each other for seconds where other work holds the cores.
    llama = llama_cpp.Llama(model_path=model, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    loaded = time.monotonic()
    reply = llama("Who are you?", max_tokens=1)
    if reply["usage"]["completion_tokens"] != 1:  # type: ignore[index]
        raise ValueError(f"asked for one token, llama.cpp gave {reply}")
    print(json.dumps({"load": loaded - started, "seconds": time.monotonic() - loaded}))


def converter(home: Home) -> Check:
    version = _version("llama-cpp-python")
    script = home.cache / f"llama.cpp-{version}" / "convert_hf_to_gguf.py"
    if not script.is_file():
        return Check("converter", "problem", f"{script} is missing: exports cannot make a GGUF", SETUP)
    return Check("converter", "ok", f"of llama-cpp-python {version}, in {script.parent}")


# ------------------------------------------------------------------------------------------------ secrets, network


def secret_present(name: str) -> Check:
    """Whether it is set. Its value goes nowhere."""
    if secret(name) is None:
        return Check(name, "absent", f"not set; {SECRET_USES.get(name, '')}".rstrip("; "))
    return Check(name, "ok", "set")


def hub() -> Check:
    """Whether the Hugging Face hub (or what HF_ENDPOINT names) answers."""
    from huggingface_hub import constants

    address = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return Check("hub", "problem", "HF_ENDPOINT is no http or https address", "correct or unset HF_ENDPOINT")
    remedy = "check the network; until then only bases that are already here can be used, and nothing can be pushed"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", "warning", "HF_HUB_OFFLINE keeps the hub from being asked", "unset it to download or push")
    answer = Check("hub", "warning", f"{parts.hostname} did not answer in {HUB_SECONDS} s", remedy)

    def ask() -> None:
        nonlocal answer
        try:
            request = urllib.request.Request(address, method="HEAD")
            status = urllib.request.urlopen(request, timeout=HUB_SECONDS).status
        except urllib.error.HTTPError as error:  # it answered, if only to refuse
            status = error.code
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            answer = Check("hub", "warning", f"{parts.hostname} cannot be reached: {reason}", remedy)
            return
        state: State = "warning" if status >= 500 else "ok"
        answer = Check("hub", state, f"{parts.hostname} answers (HTTP {status})", remedy if status >= 500 else "")

    # In a thread: looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return answer


# ---------------------------------------------------------------------------------------------------------- children


def _child(function: str, *arguments: str) -> dict[str, Any]:
    """What this module's `function` prints as its last line, run in a process of its own.

    Raises SetupError where it crashes, fails or hangs, naming which.
    """
    code = f"import sys; from katherine import doctor; doctor.{function}(*sys.argv[1:])"
    # Without it llama.cpp calls a debugger when it aborts.
    environment = child_environment(GGML_NO_BACKTRACE="1")
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHILD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"gave no answer in {CHILD_SECONDS} s ({function}). Try: {SETUP_ANEW}") from error
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        raise SetupError(
            f"crashed with {name} ({function}): {last or 'nothing was said'}. An unsound build for this CPU does that, "
            f"and so does a damaged file. Run: {SETUP_ANEW}"
        )
    if ended.returncode:
        raise SetupError(f"failed ({function}): {last}. Run: {SETUP_ANEW}")
    return json.loads(ended.stdout.strip().splitlines()[-1])
