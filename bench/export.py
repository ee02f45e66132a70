"""The parts of an export against the straightforward course, in the same run: the converter as it is, one quant after
another, and a 16-bit base that is loaded twice. Prints seconds and ratios. The base is random: none of the work that is
timed depends on what the weights are.

    python -m bench.export [--base FOLDER] [--quants q4_k_m,q5_k_m,q6_k]

Without --base, a checkpoint in the published Qwen3.5 form of 0.2 B weights: minutes on two cores."""

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from bench import base as bases
from katherine import export, gguf, scratch
from katherine.progress import Quiet
from katherine.settings import home

# Large enough that starting a process, 3 s, is not most of what is timed.
_MEDIUM: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


def write_medium(folder: Path) -> None:
    with mock.patch.dict(bases._TINY_TEXT, _MEDIUM):
        bases.write_checkpoint(folder, "tiny")


def timed(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def load_and_save(checkpoint: Path, folder: Path, times: int) -> None:
    """As a merge does to its base; the adapter's own arithmetic is a fraction of it."""
    from katherine import model as models

    kind, _ = models.architecture(checkpoint)
    for _ in range(times):
        model = None
        gc.collect()
        model = kind.from_pretrained(checkpoint, dtype="bfloat16", device_map="cuda" if models.on_cuda() else "cpu")
    assert model is not None
    model.save_pretrained(folder, max_shard_size="4GB")
    for path in checkpoint.glob("tokenizer*"):
        shutil.copy(path, folder)


def convert_as_it_is(checkpoint: Path, out: Path) -> None:
    command = [sys.executable, str(gguf.converter(home())), str(checkpoint), "--outfile", str(out)]
    command += ["--outtype", gguf.UNQUANTISED, "--model-name", "bench", "--no-mtp"]
    subprocess.run(command, check=True, capture_output=True)


def measure(checkpoint: Path, folder: Path, quants: Sequence[str]) -> list[tuple[str, float, float]]:
    """(part, seconds of the straightforward course, seconds of the export's) for each part."""
    found = []
    plain, quick = folder / "plain.gguf", folder / "quick.gguf"
    with scratch.in_memory("bench") as memory:
        work = memory if memory and scratch.is_ample(memory, 2 * _size(checkpoint)) else folder
        merged = work / "merged"
        # Once for nothing, so that neither reads from the disk what the other finds in memory.
        load_and_save(checkpoint, folder / "first", 1)
        twice = timed(lambda: load_and_save(checkpoint, folder / "merged", 2))
        found.append(("merge: load and save", twice, timed(lambda: load_and_save(checkpoint, merged, 1))))
        as_it_is = timed(lambda: convert_as_it_is(folder / "merged", plain))
        quick = work / "quick.gguf"
        convert = timed(lambda: gguf.convert(home(), merged, quick, Quiet(), name="bench", without_mtp=True))
        found.append(("convert", as_it_is, convert))
        if export.sha256(plain) != export.sha256(quick):
            raise SystemExit("The two GGUFs differ: the quick converter is broken.")

        def at_once() -> None:
            def make(quant: str) -> None:
                out = folder / f"quick-{quant}.gguf"
                export.quantise(quick, out, quant, gguf.reckon(quick, quant, Quiet()), Quiet())
                export.sha256(out)

            with ThreadPoolExecutor(gguf.at_once(len(quants))) as pool:
                list(pool.map(make, quants))

        def one_by_one() -> None:
            for quant in quants:
                out = folder / f"plain-{quant}.gguf"
                gguf.quantise(plain, out, quant, Quiet())
                export.sha256(out)

        found.append((f"quantise and hash {', '.join(quants)}", timed(one_by_one), timed(at_once)))
    return found


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.export", description=__doc__)
    parser.add_argument("--base", type=Path, help="a checkpoint in the published Qwen3.5 form, as bench.base makes one")
    parser.add_argument("--quants", default="q4_k_m,q5_k_m,q6_k")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-export-") as temporary:
        folder = Path(temporary)
        checkpoint = arguments.base or folder / "base"
        if not arguments.base:
            write_medium(checkpoint)
        rows = measure(checkpoint, folder, arguments.quants.split(","))
        rows.append(("all of it", sum(row[1] for row in rows), sum(row[2] for row in rows)))
        print(f"{_size(checkpoint) / 1e9:.2f} GB of weights")
        for part, before, after in rows:
            print(f"{part:<44} {before:7.1f} s  {after:7.1f} s  {before / after:5.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
