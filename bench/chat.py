"""Chat as a page has it, beside llama-cpp-python alone: tokens a second of one column, and the time to the first word
of three. `python -m bench.chat [GGUF] [--base NAME] [--rounds N] [--json]`

Both answer the same prompt's ids greedily, with as many threads, in turn, in the same run; ours in a panel that is
served as always, asked over HTTP by what its chat tab sends, and looked at as often as the tab looks."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.served import PASSWORD, panel
from katherine import bases, columns, cores, runs, settings, talks
from katherine.columns import Column
from katherine.engines import CONTEXT
from katherine.examples import Message
from katherine.export import MANIFEST, sha256
from katherine.rendering import Renderer
from katherine.runs import State
from katherine.settings import PROJECT, Home, child_environment

# What chat is held to: of llama-cpp-python's tokens a second, and seconds.
RATIO, FIRST_WORD = 0.9, 1.5
# Long enough that a hundred tokens come, so that the first one's time is small beside the others'.
STORY = "Tell me a long story about a lighthouse, a cat and a storm."
TOKENS = 128
# A page asks this often while an answer comes.
POLL = 0.25
COLUMNS = 3


def main(argv: Sequence[str] | None = None) -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("gguf", nargs="?", type=Path, help="(default: the small base as its package carries it)")
    asked.add_argument("--base", default=bases.SMALL, help="whose template it has (default: %(default)s)")
    asked.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    asked.add_argument("--json", action="store_true")
    options = asked.parse_args(argv)
    gguf = (options.gguf or bases.small_gguf()).resolve()
    with tempfile.TemporaryDirectory(prefix="katherine-bench-") as folder:
        home = Home(Path(folder))
        cache = settings.home().cache
        if cache.is_dir():
            (home.root / "cache").symlink_to(cache)
        chosen = _export(home, gguf, options.base)
        report = _measure(home, chosen, gguf, options.rounds)
    print(json.dumps(report, indent=2)) if options.json else _print(report)
    return 0


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
    with closing(Renderer(home)) as renderer:
        ids = renderer.prompt(chosen[0].base, [Message("user", STORY)])
    with panel(home) as (port, _, _), closing(_Tab(home, port)) as tab:
        cold = []
        for number in range(3):
            tab.unload(chosen)
            cold.append(tab.first_words(chosen, f"Good morning number {number}, who are you?"))
        loaded = [
            tab.first_words(chosen, f"{number} people ask: who are you, and where do you live?")
            for number in range(rounds)
        ]
        tab.unload(chosen[1:])
        with _alone(gguf) as alone:
            ours, theirs = [], []
            for number in range(rounds + 1):
                mine, other = tab.story(chosen[0]), alone(ids)
                if number:  # the first of each touches its memory for the first time
                    ours.append(mine)
                    theirs.append(other)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "file": gguf.name,
        "bytes": gguf.stat().st_size,
        "cores": cores.count(),
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


class _Tab:
    """The chat tab as a browser has it open, without the browser: it would want a core that is not the panel's."""

    def __init__(self, home: Home, port: int):
        address = f"http://127.0.0.1:{port}"
        self._home = home
        self._web = httpx.Client(base_url=address, headers={"Origin": address}, timeout=120)
        if self._web.post("/login", data={"password": PASSWORD}).status_code != 303:
            raise SystemExit("The panel did not let the benchmark in.")
        config = self._web.get("/operator/config").json()
        self._parts = {part["id"]: part["props"] for part in config["components"]}
        by_name = {props.get("elem_id"): key for key, props in self._parts.items()}
        heard = {tuple(target): each for each in config["dependencies"] for target in each["targets"]}
        self._ask = heard[(by_name["chat-question"], "submit")]
        self._question, self._models = by_name["chat-question"], by_name["chat-models"]
        # What is open comes first, and with what was sent last it is all that the tab sends when it looks.
        self._open, self._marks = self._ask["inputs"][0], self._ask["inputs"][3]
        self._look = next(
            each
            for (_, event), each in heard.items()
            if event == "tick" and each["inputs"] == [self._open, self._marks]
        )
        drawn = next(
            key for key, props in self._parts.items() if "katherineTalk.loaded(" in str(props.get("js_on_load"))
        )
        self._unload = heard[(drawn, "select")]

    def close(self) -> None:
        self._web.close()

    def unload(self, chosen: Sequence[Column]) -> None:
        for column in chosen:
            values = [self._parts[key].get("value") for key in self._unload["inputs"]]
            self._queued(self._unload, values, {"id": column.id})

    def first_words(self, chosen: Sequence[Column], question: str) -> float:
        """Seconds from the question to the moment when the page shows a word of every column."""
        began, seconds = time.monotonic(), 0.0
        for answers in self._answering(chosen, question, 16):
            if not seconds and all(each["text"] for each in answers):
                seconds = time.monotonic() - began
        if not seconds:
            raise SystemExit(f"A column did not answer: {[each['note'] or each['words'] for each in answers]}")
        return seconds

    def story(self, column: Column) -> float:
        """Tokens a second after the first."""
        for _ in self._answering([column], STORY, TOKENS):
            pass
        (answer,) = talks.load(self._home, self._talk).rounds[-1].answers
        if answer.tokens_per_second is None:
            raise SystemExit(f"The column did not answer: {answer.note or answer.text!r}")
        return answer.tokens_per_second

    def _answering(self, chosen: Sequence[Column], question: str, tokens: int) -> Iterator[list[dict[str, Any]]]:
        """A new talk; the answers as the page draws them, until they are over and written down."""
        given = {self._models: [column.id for column in chosen], self._question: question, self._open: ""}
        named = {"Temperature": 0, "Tokens at most": tokens}
        values = [
            given.get(key, named.get(self._parts[key].get("label"), self._parts[key].get("value")))
            for key in self._ask["inputs"]
        ]
        came = dict(zip(self._ask["outputs"], self._queued(self._ask, values), strict=True))
        self._talk, marks = str(came[self._open]), came[self._marks]
        answers: list[dict[str, Any]] = []
        while not answers or any(each["busy"] for each in answers):
            news = self._direct(self._look, [self._talk, marks])
            for value in news:
                if isinstance(value, str) and value.startswith('{"talk"'):
                    answers = [each for round in json.loads(value)["rounds"] for each in round["answers"]] or answers
            marks = next((value for value in news if isinstance(value, dict) and "__type__" not in value), marks)
            if answers:
                yield answers
            time.sleep(POLL)
        while not talks.load(self._home, self._talk).rounds:
            time.sleep(0.01)

    def _direct(self, which: dict[str, Any], values: list[Any]) -> list[Any]:
        body = {"data": values, "fn_index": which["id"], "session_hash": "bench"}
        answer = self._web.post("/operator/gradio_api/run/predict", json=body)
        answer.raise_for_status()
        return answer.json()["data"]

    def _queued(self, which: dict[str, Any], values: list[Any], event: dict[str, Any] | None = None) -> list[Any]:
        """A person's events wait in Gradio's queue; their answer comes as a stream."""
        body = {"data": values, "fn_index": which["id"], "session_hash": "bench", "event_data": event}
        self._web.post("/operator/gradio_api/queue/join", json=body).raise_for_status()
        with self._web.stream("GET", "/operator/gradio_api/queue/data?session_hash=bench") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and (said := json.loads(line[5:]))["msg"] == "process_completed":
                    if not said["success"]:
                        raise SystemExit(f"The panel refused: {said['output']}")
                    return said["output"]["data"]
        raise SystemExit("The panel gave no answer.")


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
        env=child_environment(),
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
    threads = cores.count()
    model = llama_cpp.Llama(
        gguf, n_ctx=CONTEXT, n_gpu_layers=-1, n_threads=threads, n_threads_batch=threads, verbose=False
    )
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
