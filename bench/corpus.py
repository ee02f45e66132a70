"""How fast and in how much memory a large corpus is prepared, sound or damaged:
`python -m bench.corpus [--lines N] [--damaged SHARE]`.

Writes a corpus of its own to a temporary folder (not timed), prepares it in a child process of one thread, and
reads the same lines with plain `json.loads`, which does none of the checking, as the baseline.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from katherine import corpus, memory
from katherine.settings import PROJECT, Home

LINES = 1_000_000
FILES = 20
LEAST_LINES_PER_SECOND = 50_000
MOST_MEMORY = 1e9  # bytes
# What a line is, as shares: repeats like a real corpus, few pairs, and some damage so that the slow path of a rejected
# line is in the figure too.
DUPLICATES, PAIRS, DAMAGED = 0.3, 0.03, 0.002
DAMAGE = ('{"messages": [', '{"messages": [], "messages": []}', '{"messages": [{"role": "bot", "content": "x"}]}')
WORDS = (
    *("the", "a", "my", "your", "kettle", "porch", "window", "rain", "café", "yesterday", "almost", "never", "again"),
    *("letter", "borrowed", "quietly", "bicycle", "street", "laughed", "forgot", "painted", "kept", "told", "asked"),
    *("about", "because", "after", "without", "and", "but", "so", "blue", "warm", "small", "late", "morning", "supper"),
    *("neighbour", "sister", "radio", "garden", "“well”", "it’s", "don’t", "🙂"),
)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def generate(folder: Path, count: int, damaged: float) -> None:
    """`count` lines of some 600 bytes over FILES files: escaped and plain, other key orders, other system turns.
    damaged: the share of lines that will be rejected; the rest keeps its shares among itself."""
    rng = random.Random(11)
    kept: list[list[dict[str, str]]] = []
    for number in range(FILES):
        share = count // FILES + (number < count % FILES)
        with (folder / f"part_{number:02d}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            for line in _some_lines(rng, kept, share, damaged, ascii_only=bool(number % 2)):
                out.write(line + "\n")


def _some_lines(
    rng: random.Random, kept: list[list[dict[str, str]]], count: int, damaged: float, ascii_only: bool
) -> Iterator[str]:
    for _ in range(count):
        if rng.random() < damaged:
            yield rng.choice(DAMAGE)
            continue
        draw = rng.random()
        if draw < PAIRS:
            turn = {"role": "user", "content": text(rng, 12)}
            replies = [[{"role": "assistant", "content": text(rng, rng.randrange(15, 60))}] for _ in range(2)]
            pair = {"prompt": [turn], "chosen": replies[0], "rejected": replies[1], "_cat": "warmth", "_type": "direct"}
            yield json.dumps(pair, ensure_ascii=ascii_only)
            continue
        if draw < PAIRS + DUPLICATES and kept:
            turns = rng.choice(kept)
        else:
            turns = [
                {"role": role, "content": text(rng, words)}
                for role, words in (("user", 10), ("assistant", 28), ("user", 8), ("assistant", 24))
            ]
            if len(kept) < 10_000:  # enough to repeat from, without holding the whole corpus here
                kept.append(turns)
        if rng.random() < 0.5:
            turns = [{"role": "system", "content": text(rng, 12)}, *turns]
        if rng.random() < 0.1:
            turns = [{"content": turn["content"], "role": turn["role"]} for turn in turns]
        yield json.dumps({"messages": turns}, ensure_ascii=ascii_only)


def measure(folder: Path) -> dict[str, float]:
    """Prepares `folder` in this process. seconds: prepare; busy: those of them that it had a
    core (the rest went to the disk and to other programs); loads_seconds: the baseline; peak: bytes after prepare."""
    with tempfile.TemporaryDirectory() as home:
        started, busy = time.perf_counter(), time.process_time()
        dataset = corpus.prepare([folder], Home(Path(home)))
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    peak = memory.peak(os.getpid())
    started = time.perf_counter()
    for file in folder.glob("*.jsonl"):
        with file.open("rb") as lines:
            for line in lines:
                try:
                    json.loads(line)
                except ValueError:
                    continue
    report = dataset.report
    return {
        "lines": report["lines"],
        "unique": report["sft"]["unique"] + report["dpo"]["curated"],
        "rejected": report["sft"]["rejected"] + report["dpo"]["rejected"] + report["unrecognised"],
        "seconds": seconds,
        "busy": busy,
        "loads_seconds": time.perf_counter() - started,
        "peak": peak,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; 1 where they miss what is promised."""
    parser = argparse.ArgumentParser(prog="bench corpus", description=__doc__)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--damaged", type=float, default=DAMAGED, metavar="SHARE", help="of the lines: 0 to 0.99")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    if not 0 <= arguments.damaged <= 0.99:  # something must be left to prepare
        parser.error(f"--damaged is a share from 0 to 0.99, not {arguments.damaged}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generate(folder, arguments.lines, arguments.damaged)
        size = sum(file.stat().st_size for file in folder.iterdir())
        child = [sys.executable, "-m", "bench.corpus", "--measure", str(folder)]
        figures = json.loads(subprocess.run(child, cwd=PROJECT, stdout=subprocess.PIPE, check=True).stdout)
    rate = figures["lines"] / figures["seconds"]
    slower = figures["seconds"] / figures["loads_seconds"]
    loads_rate = figures["lines"] / figures["loads_seconds"]
    print(
        f"corpus: {figures['lines']:,} lines, {size / 1e6:,.0f} MB, {figures['unique']:,} unique, "
        f"{figures['rejected']:,} rejected\n"
        f"  prepare     {figures['seconds']:6.1f} s  {rate:9,.0f} lines/s (promised: {LEAST_LINES_PER_SECOND:,}); "
        f"{figures['busy']:.1f} s of the core itself, {figures['lines'] / figures['busy']:,.0f} lines/s\n"
        f"  json.loads  {figures['loads_seconds']:6.1f} s  {loads_rate:9,.0f} lines/s, checking and writing nothing; "
        f"prepare takes {slower:.2f} times as long\n"
        f"  peak memory {figures['peak'] / 1e6:6.0f} MB (promised: under {MOST_MEMORY / 1e6:,.0f})"
    )
    return 0 if rate >= LEAST_LINES_PER_SECOND and figures["peak"] < MOST_MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
