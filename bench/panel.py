"""The panel while the machine is busy: how long a tab switch, a plot refresh, the slowest handler and the longest
request take, and what the web process needs, with hundreds of past runs and a run of 50,000 logged steps, while a real
training uses every core; and how soon it had started before.
`python -m bench.panel [--runs N] [--steps N] [--seconds N] [--json]`

Every figure stands beside the same one from before the training began, and beside a bare Gradio's (bench.bare) during
it, in the same run: machines differ by a factor of three. Needs Chromium and the test tools (`bash bootstrap.sh test`
brings them)."""

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import bare, chromium
from bench.past import write_past
from bench.served import PASSWORD, bare_gradio, panel
from jobs import queue
from katherine import bases, cores, corpus, memory, probesets, recipe, runs, settings
from katherine.runs import Run, State
from katherine.settings import Home
from katherine.template import ChatTemplate

# What the panel is held to: milliseconds, bytes and bytes.
TAB, REFRESH, REFRESH_BYTES, MEMORY = 300, 150, 60_000, 350e6
# And seconds: of its start on the idle machine, of any handler (ui.edge notes those that take longer), of any request.
START, HANDLER, REQUEST = 5, 1, 30
TABS = ("dataset", "recipe", "train", "export", "chat", "probes", "review", "publish", "history")
# From the click to the frame in which the tab's content is there, measured in the page: the driver's own way to and
# from it is no part of it.
SWITCH = """async (name) => {
  const frame = () => new Promise(requestAnimationFrame);
  const began = performance.now();
  katherine.openTab(name);
  const open = () => {
    const panel = [...document.querySelectorAll('#tabs > .tabitem')].find((one) => one.offsetParent !== null);
    return location.hash === `#${name}` && panel && panel.innerText.trim().length > 0;
  };
  while (!open()) await frame();
  await frame();
  return performance.now() - began;
}"""
# The same of a bare Gradio's tab, whose content is a field.
SWITCH_BARE = """async (number) => {
  const frame = () => new Promise(requestAnimationFrame);
  const began = performance.now();
  document.querySelectorAll('#tabs button[role=tab]')[number].click();
  const open = () => {
    const panel = [...document.querySelectorAll('#tabs > .tabitem')].find((one) => one.offsetParent !== null);
    return panel && panel.innerText.includes(`field ${number}`);
  };
  while (!open()) await frame();
  await frame();
  return performance.now() - began;
}"""
ROUNDS = 10


def main(argv: Sequence[str] | None = None) -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=int, default=500, help="past runs (default: %(default)s)")
    asked.add_argument("--steps", type=int, default=50_000, help="logged steps of the longest (default: %(default)s)")
    asked.add_argument("--seconds", type=float, default=60, help="of watching the plots (default: %(default)s)")
    asked.add_argument("--json", action="store_true")
    options = asked.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="katherine-bench-") as folder:
        home = Home(Path(folder))
        _borrow_cache(home)
        past = write_past(home, runs=options.runs, steps=options.steps)
        longest = max((run for run in past if run.record.kind == "sft"), key=lambda run: _size(run))
        with panel(home) as (port, process, start), bare_gradio() as (beside, least, soonest), _growing(longest):
            before = _watch(port, longest, options.seconds / 2)
            with _training(home) as training:
                during = _watch(port, longest, options.seconds)
                baseline = _watch_bare(beside, options.seconds / 2)
                state = training.status()
            held, held_bare = memory.peak(process.pid), memory.peak(least.pid)
        slow = re.findall(r"slow: (\S+) took ([\d.]+) s", (home.root / "panel.log").read_text())
    if state.state is not State.running:
        raise SystemExit(f"The training meant to keep the cores busy was {state.state}: {state.reason}")
    seen = {"idle": before, "busy": during, "bare": baseline}
    report = _report(seen, (held, held_bare), (start, soonest), slow, len(past), options.steps, state)
    print(json.dumps(report, indent=2)) if options.json else _print(report)
    return 0


def _borrow_cache(home: Home) -> None:
    """What set-up fetched: the small base and its tokenizer."""
    cache = settings.home().cache
    if cache.is_dir():
        (home.root / "cache").symlink_to(cache)


def _size(run: Run) -> int:
    path = run.path / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _growing(run: Run) -> Iterator[None]:
    """A row a second at the end of the run's metrics, as a training logs them: so that every refresh has news."""
    last = list(run.metrics())[-1]
    ending = threading.Event()

    def grow() -> None:
        step = last["step"]
        while not ending.wait(1):
            step += 1
            with (run.path / "metrics.jsonl").open("a") as out:
                out.write(json.dumps(last | {"step": step, "time": runs.now()}) + "\n")

    thread = threading.Thread(target=grow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


@contextmanager
def _training(home: Home) -> Iterator[Run]:
    """A real SFT of the small base through the queue, past its first step when this begins, killed when it ends."""
    sft = recipe.preset("demo", recipe.SftRecipe, {"num_train_epochs": 50, "save_steps": 100_000})
    template = ChatTemplate.load(bases.tokenizer(home, sft.base))
    dataset = corpus.prepare([probesets.SAMPLE], home, template=template, base=sft.base, max_length=sft.max_length)
    run = queue.submit(home, "sft", recipe=sft.model_dump(mode="json"), who="bench.panel", dataset=dataset.id)
    try:
        while (status := run.status()).step < 2:
            if status.state in runs.ENDED:
                raise SystemExit(f"The training did not begin: {status.reason}")
            time.sleep(0.5)
        yield run
    finally:
        queue.stop(home, run.id, kill=True)
        queue.wait(home, run.id, timeout=30)


def _watch(port: int, run: Run, seconds: float) -> dict[str, Any]:
    """Tab switches in turn, then the train tab with `run` chosen: its refreshes over HTTP, as the browser gets them."""
    with _page() as page:
        page.goto(f"http://127.0.0.1:{port}/operator/")
        page.fill("#password", PASSWORD)
        page.click("button[type=submit]")
        switches = _switch(page, {name: (SWITCH, name) for name in TABS})
        page.evaluate("katherine.openTab('train')")
        _choose(page, run)
        return {"switches": switches} | _listen(page, seconds, lambda body: b"bdata" in body)


def _watch_bare(port: int, seconds: float) -> dict[str, Any]:
    """The same of a bare Gradio."""
    with _page() as page:
        page.goto(f"http://127.0.0.1:{port}/bare/")
        switches = _switch(page, {str(number): (SWITCH_BARE, number) for number in range(bare.TABS)})
        return {"switches": switches} | _listen(page, seconds, lambda body: len(body) > bare.BYTES)


@contextmanager
def _page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program, finding = chromium.find()
    if program is None:
        raise SystemExit(f"{finding}: `bash bootstrap.sh test` brings one, or says how.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=chromium.FLAGS)
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


def _switch(page: Any, tabs: dict[str, tuple[str, str | int]]) -> dict[str, list[float]]:
    """Milliseconds by tab, opened in turn by the script and its argument."""
    page.wait_for_selector("#tabs")
    page.wait_for_timeout(3000)
    found: dict[str, list[float]] = {name: [] for name in tabs}
    for _ in range(ROUNDS):
        for name, (script, argument) in tabs.items():
            found[name].append(page.evaluate(script, argument))
            page.wait_for_timeout(400)
    return found


def _listen(page: Any, seconds: float, is_refresh: Callable[[bytes], bool]) -> dict[str, Any]:
    """The refreshes that the page is brought meanwhile, and its longest request, in milliseconds."""
    refreshes: list[tuple[float, int, int]] = []
    longest = 0.0
    # Looked at outside of the listener: in it, the driver would wait for itself.
    finished: list[Any] = []
    page.on("requestfinished", lambda request: finished.append(request))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        page.wait_for_timeout(500)
        while finished:
            request = finished.pop(0)
            if request.method == "POST":  # others are streams, which stay open on purpose, and files
                longest = max(longest, request.timing["responseEnd"])
            if refresh := _refresh(request, is_refresh):
                refreshes.append(refresh)
    if len(refreshes) < 5:
        raise SystemExit(f"Only {len(refreshes)} refreshes were seen in {seconds:.0f} s.")
    return {"refreshes": refreshes, "longest": longest}


def _refresh(request: Any, is_refresh: Callable[[bytes], bool]) -> tuple[float, int, int] | None:
    """(milliseconds, bytes, bytes as sent) of a request that brought figures; None for any other."""
    if request.method != "POST" or "/gradio_api/" not in request.url or not (answer := request.response()):
        return None
    body = answer.body()
    if not is_refresh(body):
        return None
    timing = request.timing
    return timing["responseEnd"] - timing["requestStart"], len(body), request.sizes()["responseBodySize"]


def _choose(page: Any, run: Run) -> None:
    """The run in the picker of the train tab, and its curve on the screen."""
    picker = page.get_by_label("Run shown")
    picker.click()
    picker.press("Control+a")
    picker.press_sequentially(run.id.rpartition("-")[2])
    page.get_by_role("option").first.click()
    page.get_by_text(run.id).locator("visible=true").first.wait_for()
    page.locator(".k-plot .main-svg").locator("visible=true").first.wait_for()


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _report(
    seen: dict[str, dict[str, Any]],
    held: tuple[int, int],
    start: tuple[float, float],
    slow: list[tuple[str, str]],
    past: int,
    steps: int,
    training: runs.Status,
) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": round(statistics.median(values), 1), "p95": round(_percentile(values, 95), 1)}

    def figures(seen: dict[str, Any]) -> dict[str, Any]:
        spent, whole, sent = zip(*seen["refreshes"], strict=True)
        return {
            "tab_ms": {name: spread(values) for name, values in seen["switches"].items()},
            "all_tabs_ms": spread([value for values in seen["switches"].values() for value in values]),
            "refresh_ms": spread(list(spent)),
            "refresh_bytes": spread(list(whole)),
            "refresh_bytes_sent": spread(list(sent)),
            "refreshes": len(spent),
            "longest_request_ms": round(seen["longest"], 1),
        }

    busy = figures(seen["busy"])
    return {
        "past_runs": past,
        "steps": steps,
        "cores": cores.count(),
        "training_step": training.step,
        "idle": figures(seen["idle"]),
        "busy": busy,
        "bare": figures(seen["bare"]),
        "web_process_bytes": held[0],
        "bare_bytes": held[1],
        "start_s": round(start[0], 2),
        "bare_start_s": round(start[1], 2),
        "handlers_over_a_second": slow,
        "met": {
            "start": start[0] <= START,
            "handlers": not slow,
            "requests": busy["longest_request_ms"] <= REQUEST * 1000,
            "tab": busy["all_tabs_ms"]["p95"] <= TAB,
            "refresh": busy["refresh_ms"]["p95"] <= REFRESH,
            "refresh_bytes": busy["refresh_bytes"]["p95"] <= REFRESH_BYTES,
            "memory": held[0] <= MEMORY,
        },
    }


def _print(report: dict[str, Any]) -> None:
    idle, busy, least = (report[which] for which in ("idle", "busy", "bare"))
    print(f"{report['past_runs']} past runs, one of {report['steps']:,} steps; {report['cores']} cores, all training")
    print(f"{'':34}{'idle':>10}{'training':>10}{'bare Gradio':>13}{'ratio':>8}{'limit':>9}")

    def line(label: str, take: Callable[[dict[str, Any]], float], limit: float | None, unit: str) -> None:
        bound = "" if limit is None else f"{limit:,.0f} {unit}"
        print(
            f"{label:34}{take(idle):>10,.0f}{take(busy):>10,.0f}{take(least):>13,.0f}{take(busy) / take(least):>8.2f}"
            f"{bound:>9}"
        )

    for name in TABS:
        print(f"  tab {name:28}{idle['tab_ms'][name]['p95']:>10,.0f}{busy['tab_ms'][name]['p95']:>10,.0f}")
    line("open any tab, p95 ms", lambda figures: figures["all_tabs_ms"]["p95"], TAB, "ms")
    line("refresh, median ms", lambda figures: figures["refresh_ms"]["median"], None, "ms")
    line("refresh, p95 ms", lambda figures: figures["refresh_ms"]["p95"], REFRESH, "ms")
    line("refresh, p95 kB", lambda figures: figures["refresh_bytes"]["p95"] / 1000, REFRESH_BYTES / 1000, "kB")
    line("longest request, ms", lambda figures: figures["longest_request_ms"], REQUEST * 1000, "ms")
    slow = report["handlers_over_a_second"]
    named = ", ".join(f"{name} {seconds} s" for name, seconds in sorted(slow, key=lambda each: -float(each[1]))[:3])
    print(f"handlers over {HANDLER} s: {f'{len(slow)}, slowest {named}' if slow else 'none'}")
    start, bare_start = report["start_s"], report["bare_start_s"]
    print(f"start: {start:.1f} s, bare Gradio {bare_start:.1f}, ratio {start / bare_start:.2f} (limit {START} s)")
    held, bare_held = (report[which] / 1e6 for which in ("web_process_bytes", "bare_bytes"))
    print(f"web process, at most: {held:.0f} MB, bare Gradio {bare_held:.0f} (limit {MEMORY / 1e6:.0f})")
    missed = [name for name, met in report["met"].items() if not met]
    print("every limit met" if not missed else f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    sys.exit(main())
