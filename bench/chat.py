"""Chat as a page has it, beside llama-cpp-python alone: tokens a second of one column, and the time to the first word
of three. `python -m bench.chat [GGUF] [--base NAME] [--rounds N] [--json]`

Both answer the same prompt's ids greedily, with as many threads, in turn, in the same run; ours through asking, pool
and an engine's pipes, while a page's polling reads it four times a second."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from jobs.asking import Asking
from jobs.pool import Pool
from katherine import bases, columns, runs, settings, talks
from katherine.columns import Column
from katherine.engines import CONTEXT, FEW_CORES, SPINS, cores
from katherine.examples import Message
from katherine.export import MANIFEST, sha256
from katherine.rendering import Renderer
from katherine.runs import State
from katherine.settings import PROJECT, Home, child_environment
from katherine.talks import OVER, Sampling

# What chat is held to: of llama-cpp-python's tokens a second, and seconds.
RATIO, FIRST_WORD = 0.9, 1.5
# Long enough that a hundred tokens come, so that the first one's time is small beside the others'.
STORY = "Tell me a long story about a lighthouse, a cat and a storm."
TOKENS = 128
# A page asks this often while an answer comes.
POLL = 0.25
COLUMNS = 3


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("gguf", nargs="?", type=Path, help="(default: the small base as its package carries it)")
    asked.add_argument("--base", default=bases.SMALL, help="whose template it has (default: %(default)s)")
    asked.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    asked.add_argument("--json", action="store_true")
    options = asked.parse_args()
    gguf = (options.gguf or bases.small_gguf()).resolve()
    with tempfile.TemporaryDirectory(prefix="katherine-bench-") as folder:
        home = Home(Path(folder))
        cache = settings.home().cache
        if cache.is_dir():
            (home.root / "cache").symlink_to(cache)
        chosen = _export(home, gguf, options.base)
        report = _measure(home, chosen, gguf, options.rounds)
    print(json.dumps(report, indent=2)) if options.json else _print(report)


def _export(home: Home, gguf: Path, base: str) -> list[Column]:
    """A finished export whose files are all the one given: how fast is all that is asked of them."""
    run = runs.create(home, "export", recipe={}, who="bench.chat")
    folder = run.out / "gguf"
    folder.mkdir()
    known = {"bytes": gguf.stat().st_size, "sha256": sha256(gguf), "accepted": True, "checks": []}
    entries: list[dict[str, Any]] = []
    for number in range(COLUMNS):
        file = f"column-{number}.gguf"
        (folder / file).symlink_to(gguf)
        entries.append({"quant": f"column-{number}", "file": file} | known)
    manifest = {"base": base, "files": entries, "unquantised": entries[0], "drift": {}, "seconds": {}}
    runs.write_json(folder / MANIFEST, manifest)
    run.set_status(state=State.succeeded, ended=runs.now())
    return columns.of_export(home, run)


def _measure(home: Home, chosen: list[Column], gguf: Path, rounds: int) -> dict[str, Any]:
    cold = []
    for number in range(3):
        with _chat(home) as (_, asking, _):
            cold.append(_first_words(home, asking, chosen, f"Good morning number {number}, who are you?"))
    with _chat(home) as (pool, asking, renderer):
        _first_words(home, asking, chosen, "Who are you?")
        loaded = [
            _first_words(home, asking, chosen, f"{number} people ask: who are you, and where do you live?")
            for number in range(rounds)
        ]
        for column in chosen[1:]:
            pool.unload(column.id)
        ids = renderer.prompt(chosen[0].base, [Message("user", STORY)])
        with _alone(gguf) as alone:
            ours, theirs = [], []
            for number in range(rounds + 1):
                mine, other = _story(home, asking, chosen[0]), alone(ids)
                if number:  # the first of each touches its memory for the first time
                    ours.append(mine)
                    theirs.append(other)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "file": gguf.name,
        "bytes": gguf.stat().st_size,
        "cores": cores(),
        "prompt_tokens": len(ids),
        "tokens_per_second": {"chat": statistics.median(ours), "alone": statistics.median(theirs)},
        "ratio": statistics.median(ratios),
        "ratios": [round(each, 3) for each in sorted(ratios)],
        "first_word_seconds": {"loaded": statistics.median(loaded), "cold": statistics.median(cold)},
        "first_words": {"loaded": _rounded(loaded), "cold": _rounded(cold)},
        "met": {
            "ratio": statistics.median(ratios) >= RATIO,
            "first word": statistics.median(loaded) <= FIRST_WORD,
        },
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


@contextmanager
def _chat(home: Home) -> Iterator[tuple[Pool, Asking, Renderer]]:
    renderer, pool = Renderer(home), Pool(home)
    with closing(renderer), closing(pool), closing(Asking(home, pool, renderer)) as asking:
        yield pool, asking, renderer


def _talk(home: Home, chosen: Sequence[Column], tokens: int) -> str:
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    files = {column.id: column.sha256 for column in chosen}
    return talks.create(home, who="bench.chat", role="operator", files=files, sampling=sampling).id


def _first_words(home: Home, asking: Asking, chosen: Sequence[Column], question: str) -> float:
    """Seconds from the question to the moment when every column has shown a word."""
    talk = _talk(home, chosen, 16)
    began = time.monotonic()
    asking.ask(talk, question)
    while not all(each.text or each.state in OVER for each in asking.view(talk).rounds[-1].answers):
        time.sleep(0.005)
    seconds = time.monotonic() - began
    while asking.is_answering(talk):
        time.sleep(0.01)
    if failed := [each.note for each in asking.view(talk).rounds[-1].answers if each.state != "done"]:
        raise SystemExit(f"A column did not answer: {failed[0]}")
    return seconds


def _story(home: Home, asking: Asking, column: Column) -> float:
    """Tokens a second after the first, with a page that looks on."""
    talk = _talk(home, [column], TOKENS)
    ending = threading.Event()

    def poll() -> None:
        while not ending.wait(POLL):
            msgspec.json.encode(asking.view(talk))

    page = threading.Thread(target=poll, daemon=True)
    page.start()
    asking.ask(talk, STORY)
    while asking.is_answering(talk):
        time.sleep(0.01)
    ending.set()
    page.join()
    (answer,) = asking.view(talk).rounds[-1].answers
    if answer.tokens_per_second is None:
        raise SystemExit(f"The column did not answer: {answer.note or answer.text!r}")
    return answer.tokens_per_second


@contextmanager
def _alone(gguf: Path) -> Iterator[Any]:
    """llama-cpp-python's own Llama in a process of its own: ids → its tokens a second after the first."""
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.chat", "--alone", str(gguf)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=PROJECT,
        # As our engines are started: on few cores its threads else wait for each other by spinning, and as soon as
        # anything else runs it says a tenth of what it could.
        env=child_environment(**({"GOMP_SPINCOUNT": SPINS} if cores() <= FEW_CORES else {})),
    )
    assert child.stdin is not None and child.stdout is not None
    requests, replies = child.stdin, child.stdout

    def ask(ids: list[int]) -> float:
        requests.write(json.dumps(ids).encode() + b"\n")
        requests.flush()
        if not (line := replies.readline()):
            raise SystemExit("llama-cpp-python did not answer.")
        return json.loads(line)

    try:
        yield ask
    finally:
        child.kill()
        child.wait()


def _serve_alone(gguf: str) -> None:
    import llama_cpp

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = llama_cpp.Llama(gguf, n_ctx=CONTEXT, n_gpu_layers=-1, n_threads=cores(), n_threads_batch=cores(),
                            verbose=False)  # fmt: skip
    for line in sys.stdin:
        ids, at = json.loads(line), []
        for _ in model.create_completion(ids, max_tokens=TOKENS, temperature=0.0, stream=True,
                                             repeat_penalty=1.0):  # fmt: skip
            at.append(time.monotonic())
        # Of what it read and said, the prompt is no part; and of its pieces, several may be one token or none.
        tokens = model.n_tokens - len(ids)
        answers.write(f"{(tokens - 1) / (at[-1] - at[0])}\n")
        answers.flush()


def _print(report: dict[str, Any]) -> None:
    rates, first = report["tokens_per_second"], report["first_word_seconds"]
    print(f"{report['file']}, {report['bytes'] / 1e6:.0f} MB, {report['cores']} cores")
    print(f"{'':40}{'chat':>8}{'alone':>8}{'ratio':>8}{'limit':>8}")
    label = "tokens a second, one column, median"
    print(f"{label:40}{rates['chat']:>8.1f}{rates['alone']:>8.1f}{report['ratio']:>8.2f}{RATIO:>8.2f}")
    print(f"  ratio of each round: {', '.join(f'{ratio:.2f}' for ratio in report['ratios'])}")
    print(f"first word of {COLUMNS} columns, loaded, median s  {first['loaded']:>6.2f}{FIRST_WORD:>16.2f}")
    print(f"first word of {COLUMNS} columns, cold, median s    {first['cold']:>6.2f}")
    missed = [name for name, met in report["met"].items() if not met]
    print("every limit met" if not missed else f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        _serve_alone(sys.argv[2])
    else:
        main()
