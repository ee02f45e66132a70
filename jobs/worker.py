"""The process that does one run's work: kind → function, its progress to the supervisor, and why it ended in words a
person can act on. Starting and watching it, and all of status.json, are the supervisor's."""

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jobs import obstacles, queue
from jobs.following import Followers
from katherine import disk, gpu, hardware, prediction, runs
from katherine.errors import DataError, KatherineError, NotFound
from katherine.progress import Progress, Stopped
from katherine.runs import Run
from katherine.settings import Home

# A tenth of the weight in the kernel's scheduler that a process of niceness 0 has (sched-nice-design: a factor of 1.25
# a step): with a third, a page that was opened while both of two cores trained waited up to half a second.
NICENESS = 10


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of run does. work: the stage, which returns what goes into result.json. complete: a recipe's values
    with its defaults filled in, or RecipeError. secrets: names of secrets that its process may see. obstacles: given
    the home, a dataset's id and a recipe, why the work would fail, as far as can be told beforehand. frozen: texts that
    the run keeps in its out folder from its birth, since they may change before it begins: file name → text. spreads:
    given the home and a recipe, whether the work is shared by several GPUs, where they are idle."""

    work: Callable[[Home, Run, Progress], dict[str, Any]]
    complete: Callable[[dict[str, Any]], dict[str, Any]]
    secrets: tuple[str, ...] = ()
    obstacles: Callable[[Home, str, dict[str, Any]], list[str]] = lambda home, dataset, recipe: []
    frozen: Callable[[Home, dict[str, Any]], dict[str, str]] = lambda home, recipe: {}
    spreads: Callable[[Home, dict[str, Any]], bool] = lambda home, recipe: False


def _complete(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    from katherine import recipe

    return recipe.load(kind, values).model_dump(mode="json")


def _recipe(run: Run) -> Any:
    from katherine import recipe

    return recipe.load(run.record.kind, run.record.recipe)


def _sft(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    dataset = _dataset(home, run)
    from katherine import sft

    return sft.train(dataset, _recipe(run), run.out, progress)


def _sft_spreads(home: Home, recipe: dict[str, Any]) -> bool:
    """A training as its recipe is written is one process's: its batches would no longer be those of the recipe."""
    if not recipe.get("fit"):
        return False
    from katherine import fit

    return fit.obstacle_of(home, recipe["base"]) == ""


def _dpo(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    dataset, adapter = _dataset(home, run), _adapter(home, run)
    from katherine import dpo

    return dpo.train(dataset, adapter, _recipe(run), run.out, progress)


def _export(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    adapter, dataset = _adapter(home, run), _dataset(home, run)
    from katherine import export

    return export.export(adapter, dataset, _recipe(run), run.out, progress)


def _probe(home: Home, run: Run, progress: Progress) -> dict[str, Any]:
    export, trained = _parent(home, run).out, adapters(home, run)
    from katherine import probes

    expected = run.record.inputs.get(probes.FROZEN)
    if expected is not None and probes.fingerprint(run.out) != expected:
        raise DataError(f"{run.out / probes.FROZEN} is not the set that the run was asked for with: start a new run.")
    return probes.run(export, trained, _recipe(run), run.out, progress)


def _probe_set(home: Home, recipe: dict[str, Any]) -> dict[str, str]:
    from katherine import probes

    return {probes.FROZEN: probes.text_of(home, recipe["probes"])}


# Those that look for the base on the hub, where some bases open only to a token that accepted their terms.
_HUB = ("HF_READ_TOKEN",)
KINDS = {
    "sft": Kind(_sft, partial(_complete, "sft"), _HUB, obstacles.sft, spreads=_sft_spreads),
    "dpo": Kind(_dpo, partial(_complete, "dpo"), _HUB, obstacles.dpo),
    "export": Kind(_export, partial(_complete, "export"), _HUB, obstacles.export),
    "probe": Kind(_probe, partial(_complete, "probe"), _HUB, obstacles.probe, _probe_set),
}


def _dataset(home: Home, run: Run) -> Path:
    """The run's dataset folder. Raises NotFound, or DataError if it is not the one that the run was asked about."""
    if run.record.dataset is None:
        raise NotFound(f"Run {run.id} names no dataset, and {run.record.kind} needs one. Start it with a dataset.")
    folder = home.datasets / run.record.dataset
    if not folder.is_dir():
        raise NotFound(f"The dataset {folder} is gone. Prepare it again, under the same name, and resume.")
    expected, found = run.record.inputs.get("dataset"), queue.fingerprint(folder)
    if expected is not None and found != expected:
        raise DataError(f"The dataset {folder} has changed since run {run.id} was asked for. Start a new run.")
    return folder


def _parent(home: Home, run: Run) -> Run:
    if run.record.parent is None:
        raise NotFound(f"Run {run.id} names no parent, and {run.record.kind} builds on one. Start it on another run.")
    return runs.load(home, run.record.parent)


def _adapter(home: Home, run: Run) -> Path:
    return _parent(home, run).out / "adapter"


def adapters(home: Home, run: Run) -> dict[str, Path]:
    """The adapters that the run comes from: kind of run → folder, in the order in which they were trained."""
    found = []
    while run.record.parent is not None:
        run = runs.load(home, run.record.parent)
        if (run.out / "adapter").is_dir():
            found.append((run.record.kind, run.out / "adapter"))
    return dict(reversed(found))


class RunProgress:
    """A Progress that tells the supervisor over a pipe, and appends metrics to the run's folder itself."""

    def __init__(self, run: Run, report: int):
        self._run = run
        self._report = report
        self._attempt = run.status().attempt
        self._metrics: int | None = None
        self._stop_seen = False
        self._stop_asked = -math.inf

    def phase(self, name: str) -> None:
        self.tell(phase=name)

    def step(self, step: int, of: int) -> None:
        self.tell(step=step, of=of)

    def metric(self, **values: float | int | str | None) -> None:
        """Appends the row, with the time and the attempt: a resumed run logs the steps after its checkpoint again.
        A number that is not finite becomes the text "nan", "inf" or "-inf", which JSON lacks and float() reads."""
        row = {"time": runs.now(), "attempt": self._attempt} | {name: _plain(value) for name, value in values.items()}
        if self._metrics is None:
            self._metrics = _open_metrics(self._run.path / "metrics.jsonl")
        # One write, so that a row is whole or, at worst, the last and torn.
        os.write(self._metrics, json.dumps(row, allow_nan=False).encode() + b"\n")

    def say(self, text: str) -> None:
        # The log is this process's output: so it stays in order with what libraries print.
        print(text, flush=True)

    def stop_requested(self) -> bool:
        # Asked at every step, which may be a millisecond; four looks a second are soon enough for a person.
        if not self._stop_seen and time.monotonic() - self._stop_asked > 0.25:
            self._stop_asked = time.monotonic()
            self._stop_seen = queue.control(self._run).exists()
        return self._stop_seen

    def failed(self, reason: str, remedy: str) -> None:
        """How the run ended."""
        # The whole text is in the log; a reason has to fit on a screen.
        self.tell(end="failed", reason=reason[:2000], remedy=remedy)

    def tell(self, **message: Any) -> None:
        """One line to the supervisor."""
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._report, line) :]


def _open_metrics(path: Path) -> int:
    opened = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(opened).st_size
    if size and os.pread(opened, 1, size - 1) != b"\n":
        # The machine died in the middle of a row: end it, or the next row would be lost with it.
        os.write(opened, b"\n")
    return opened


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def explain(error: BaseException, run: Run) -> tuple[str, str]:
    """Why the run failed and what to do about it: (reason, remedy)."""
    if isinstance(error, KatherineError):
        return str(error), ""
    for cause in _causes(error):
        text = str(cause)
        # By name and by wording, since torch must not be imported here, and libraries wrap both kinds of shortage.
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in text:
            return "Out of memory (the machine's, not the GPU's).", lower(run, "or take a machine with more memory")
        if type(cause).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text or "ALLOC_FAILED" in text:
            return "Out of GPU memory.", lower(run, "or take a larger GPU")
        # safetensors and torch lose the error's number; torch's writer fails for no other reason.
        if disk.is_full(cause) or "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
            place = getattr(cause, "filename", None) or run.path
            free = shutil.disk_usage(run.path).free / 1e9
            return (
                f"Disk full while writing {place} ({free:.1f} GB free on the run's disk; a quota may be smaller).",
                "Free some room, then resume: it goes on from its newest checkpoint.",
            )
    return f"A bug: {type(error).__name__}: {error}", f"The whole story is in {run.log}."


def lower(run: Run, otherwise: str) -> str:
    """Which setting of the run's recipe to lower when memory was short, with its value."""
    recipe = run.record.recipe
    batch, accumulation = recipe.get("per_device_batch_size"), recipe.get("gradient_accumulation_steps", 1)
    if batch is None:
        return f"Close what else uses it, {otherwise}, then resume."
    if recipe.get("fit") is False:
        return f"Start again with fit on: the batch is then laid out by the memory that is there, {otherwise}."
    if recipe.get("fit") and recipe.get("load_in_4bit") is False:
        return f"The smallest layout did not fit. Start again with load_in_4bit on, {otherwise}."
    if recipe.get("fit"):
        return (
            f"The smallest layout did not fit. Start again with max_length below {recipe['max_length']}, {otherwise}."
        )
    if batch > 1:
        half = math.ceil(batch / 2)
        same = math.ceil(batch * accumulation / half)
        return (
            f"Start again with per_device_batch_size {half} (it was {batch}) and gradient_accumulation_steps {same} "
            f"(it was {accumulation}), {otherwise}."
        )
    return f"Start again with max_length below {recipe.get('max_length')}, {otherwise}."


def die_with(supervisor: int) -> None:
    """Have the kernel kill this process the moment its supervisor is gone: a run that nobody watches must not be."""
    pr_set_pdeathsig = 1  # from linux/prctl.h
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # Had it died before that call, no signal would come; but then we have another parent by now.
    if os.getppid() != supervisor:
        os._exit(1)


def _abandon(progress: RunProgress, reason: str, remedy: str) -> NoReturn:
    """The end of one of several processes: the threads and libraries of this one may be waiting for another."""
    progress.failed(reason, remedy)
    sys.stdout.flush()
    os._exit(1)


def _own_name() -> str:
    """Of the module that was started, which knows what the kinds of run do."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    return spec.name


def _take_down(home: Home, run: Run, gpus: int) -> None:
    """What this machine is, and what the run is expected to take on it, so that later estimates learn from the run."""
    try:
        hardware.take_down(home, run, gpus)
        prediction.freeze(home, run)
    except KatherineError as error:
        print(f"Nothing was predicted of this run: {error}", flush=True)
    except Exception:
        # Neither is worth a run that has not begun.
        traceback.print_exc()


def main(kinds: dict[str, Kind]) -> int:
    """Carry out the run named on the command line. Returns the exit code: 0 where it succeeded or kept its work."""
    arguments = argparse.ArgumentParser(description="Carry out one run; started by jobs.supervisor.")
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--report", type=int, required=True, help="descriptor of the pipe to the supervisor")
    arguments.add_argument("--supervisor", type=int, required=True, help="pid of the supervisor")
    arguments.add_argument("--gpus", nargs="+", default=[gpu.PROCESSOR], help="the run's, by name")
    asked = arguments.parse_args()
    die_with(asked.supervisor)
    os.environ |= gpu.alone(asked.gpus[0])
    os.set_inheritable(asked.report, False)
    # When memory runs out, the kernel should end this process and not the panel or the supervisor, which are small
    # and have more to say. Half of the scale is enough to come first.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")

    # On two cores that both train, the panel would wait its turn behind us for every page. It needs a few milliseconds
    # a second, which training does not miss: alone on the machine, a process of any niceness has all of it.
    os.nice(NICENESS)
    # Where the kernel shares a machine among sessions first, what counts is our session's niceness.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))

    home = Home(asked.run.parent.parent)
    run = runs.load(home, asked.run.name)
    progress = RunProgress(run, asked.report)
    _take_down(home, run, len(asked.gpus))
    followers = None
    try:
        if run.record.kind not in kinds:
            raise NotFound(f"Run {run.id} is of kind {run.record.kind!r}; this version knows {', '.join(kinds)}.")
        if len(asked.gpus) > 1:
            followers = Followers(run, _own_name(), asked.gpus, partial(_abandon, progress))
        result = kinds[run.record.kind].work(home, run, progress)
        runs.write_json(run.path / "result.json", result)
        if followers:
            followers.close()
    except Stopped:
        progress.tell(end="stopped")
        return 0
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        # Where the process on another GPU has failed, this one knows only that it was left.
        left = followers.why() if followers and not isinstance(error, KatherineError) else None
        reason, remedy = left or explain(error, run)
        if followers:
            _abandon(progress, reason, remedy)
        progress.failed(reason, remedy)
        return 1
    progress.tell(end="succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(main(KINDS))
