"""From a folder of safetensors to GGUF files: llama.cpp's converter and quantiser, each in a child process, with
their progress. Merging an adapter is merge's work, judging the files acceptance's."""

import codecs
import ctypes
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from select import POLLIN, poll
from typing import NamedTuple

from katherine import cores, memory
from katherine.errors import ExportError, SetupError
from katherine.progress import Progress, Stopped
from katherine.settings import PROJECT, Home, child_environment

# How often a silent child is left alone to see whether somebody asked to stop, in milliseconds.
_LOOK = 500
# As much of a failed child's output as an error can show.
_LAST_LINES = 8
UNQUANTISED = "bf16"
# Bytes in which the quantiser holds a piece of a tensor, in 32 bits and quantised. Its own limit is 8 GiB, and three at
# once would take 5 each for a 9B's embeddings. Rows are quantised one by one, so the file is the same.
BUFFER = 256 * 2**20
# A quantiser's whole process, without the mapped file: measured 0.5 GB.
_QUANTISER = 2**30
# llama.cpp refuses to make these without importance data (tensor_requires_imatrix in llama-quant.cpp).
_NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k_s"})


def types() -> dict[str, int]:
    """Every llama.cpp type by name, as in "q4_k_m", with its number (llama_ftype)."""
    from gguf import LlamaFileType

    prefixes = ("MOSTLY_", "ALL_")
    return {
        each.name.removeprefix(prefix).lower(): each.value
        for each in LlamaFileType
        for prefix in prefixes
        if each.name.startswith(prefix)
    }


def wrong_types(names: Sequence[str]) -> list[str]:
    """One sentence for each quant that cannot be made: unknown, in need of importance data, or no quant at all."""
    known = types()
    found = []
    for name in names:
        if name not in known:
            found.append(
                f"quants names {name!r}, which is no llama.cpp type. The types are {', '.join(sorted(known))}."
            )
        elif name == UNQUANTISED:
            found.append(f"quants names {UNQUANTISED}, which is the unquantised file itself: set keep_unquantised.")
        elif name in _NEED_IMPORTANCE:
            found.append(
                f"quants names {name}, which needs importance data, and none is made here: take one of 4 bits or more, "
                "or q2_k, q3_k_s, q3_k_m, q3_k_l."
            )
    return found


def nominal_bits(name: str, width: int) -> float:
    """Bits per weight to reckon with before anything is measured, from above. `width` is the model's hidden size."""
    if name in ("f32", "f16", "bf16"):
        return 32.0 if name == "f32" else 16.0
    found = re.search(r"\d", name)
    # Block scales and the wider tensors of a mixture add up to 1.0 at 9B (5.6, 6.5, 7.4 GB); a quarter is margin.
    bits = (int(found.group()) if found else 8) + 1.25
    # Rows that super-blocks of 256 do not divide fall back to wider types, q8_0 (8.5 bits) at most.
    return bits if width % 256 == 0 else max(bits, 8.5)


def nominal_bytes(parameters: int, name: str, width: int) -> int:
    """Bytes of a file of that type, to reckon with before it is made."""
    return int(parameters * nominal_bits(name, width) / 8)


def converter(home: Home) -> Path:
    """llama.cpp's converter of exactly the version of the runtime. Raises SetupError where it is missing."""
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise SetupError("llama-cpp-python is not installed: run `bash bootstrap.sh setup`.") from None
    script = home.cache / f"llama.cpp-{version}" / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise SetupError(f"The GGUF converter is not at {script}: run `bash bootstrap.sh setup`, which fetches it.")
    return script


def convert(home: Home, merged: Path, out: Path, progress: Progress, *, name: str, without_mtp: bool) -> int:
    """Writes the 16-bit GGUF of a checkpoint folder and returns its number of tensors, as the converter counts them.

    `without_mtp` leaves out multi-token prediction, which transformers drops on saving: needed for Qwen3.5.
    Raises SetupError, ExportError, or Stopped.
    """
    command = [sys.executable, "-m", "katherine.gguf_child", str(converter(home)), str(merged.absolute())]
    command += ["--outfile", str(out.absolute()), "--outtype", UNQUANTISED, "--model-name", name]
    command += ["--no-mtp"] * without_mtp
    tensors = 0
    # The converter only reads local files; what it would ask the hub for is a token it must not have.
    for line in _lines(command, progress, "The converter", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1"):
        if share := re.search(r"Writing:\s+(\d+)%", line):
            progress.step(int(share.group(1)), 100)
            continue
        if count := re.search(r"n_tensors = (\d+)", line):
            tensors = int(count.group(1))
        progress.say(line)
    if not out.is_file():
        raise ExportError(f"The converter ended without writing {out}. Its lines above say why.")
    return tensors


class Reckoned(NamedTuple):
    """What a type makes of a GGUF: bytes of tensors, and the type, as in "q4_K", of each tensor that is converted."""

    size: int
    kinds: dict[str, str]


def reckon(source: Path, name: str, progress: Progress) -> Reckoned:
    """As llama.cpp itself reckons it, without writing anything. Raises ExportError; Stopped."""
    size, kinds = None, {}
    for line in _quantise(source, None, name, progress):
        if match := re.search(r"quant size\s+=\s+([\d.]+) MiB", line):
            size = int(float(match.group(1)) * 2**20)
        elif match := re.match(r"\[\s*\d+/\s*\d+\] (\S+)\s+- .* -> .* MiB \((\w+)\)$", line):
            kinds[match.group(1)] = match.group(2)
    if size is None:
        raise ExportError(f"llama.cpp gave no size for the type {name} of {source}.")
    return Reckoned(size, kinds)


def at_once(count: int) -> int:
    """How many of `count` types to quantise to at the same time: as many as there is memory for."""
    return max(1, min(count, memory.host() // _QUANTISER))


def quantise(source: Path, out: Path, name: str, progress: Progress) -> None:
    """Writes `out`, the source GGUF in the named type. Raises ExportError or Stopped; `out` is then absent."""
    try:
        for line in _quantise(source, out, name, progress):
            if match := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
                progress.step(int(match.group(1)), int(match.group(2)))
            else:
                progress.say(line)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _quantise(source: Path, out: Path | None, name: str, progress: Progress) -> Iterator[str]:
    arguments = [str(source.absolute()), str(out.absolute()) if out else "", str(types()[name]), str(cores.count())]
    command = [sys.executable, "-m", "katherine.gguf", *arguments]
    return _lines(command, progress, f"Quantising {source.name} to {name}")


def _lines(command: list[str], progress: Progress, what: str, **extra: str) -> Iterator[str]:
    """A child's output, line by line, progress bars included. Ends the child and raises Stopped once that is asked
    for; raises ExportError where it fails, with the last lines."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=PROJECT,
        env=child_environment(**extra),
    )
    assert child.stdout is not None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        for line in _read(child.stdout.fileno(), progress.stop_requested):
            if line := line.rstrip():
                last.append(line)
                yield line
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    if code:
        ended = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise ExportError(f"{what} failed ({ended}):\n" + "\n".join(f"  {line}" for line in last))


def _read(handle: int, stop_requested: Callable[[], bool]) -> Iterator[str]:
    waiting = poll()
    waiting.register(handle, POLLIN)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    while True:
        if stop_requested():
            raise Stopped
        if not waiting.poll(_LOOK):
            continue
        more = os.read(handle, 1 << 16)
        # A progress bar goes back to its line's start with \r: each of its states is a line here.
        *lines, text = re.split(r"[\r\n]", text + decoder.decode(more, not more))
        yield from lines
        if not more:
            yield text
            return


def main() -> None:
    """The quantiser's child: SOURCE OUT TYPE THREADS; without OUT it only reckons."""
    import llama_cpp

    source, out, kind, threads = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(kind)
    parameters.nthread = int(threads)
    parameters.dry_run = not out
    parameters.max_buf_size = BUFFER
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    main()
