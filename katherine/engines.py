"""A GGUF that can be asked: one child process a file, driven over pipes, with no port. Token ids go in, because
only they can tell a control token from the same characters typed by a user; rendering them is template's work."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll
from types import TracebackType
from typing import Any, BinaryIO, Self

from katherine import cores, gpu
from katherine.errors import EngineError, NotFound, SetupError
from katherine.settings import PROJECT, child_environment

# Four times the recipe's max_length: room for a long talk, and small memory for 8 layers of attention at 9B.
CONTEXT = 4096
# 7.4 GB from a network volume at 50 MB/s take 150 s; four times that is no longer slowness.
LOAD_SECONDS = 600.0
# The longest silence that can be work: a full context of a 9B read on few cores.
ANSWER_SECONDS = 300.0
# How often a loading looks whether it is still wanted, in seconds.
LOOK = 0.2
# As much of the child's log as an error can show.
LOG_LINES = 6


@dataclass(frozen=True, slots=True)
class Finish:
    """How a reply ended. `finish`: "end" (the model's own end-of-turn, `end_token`), "length" or "stopped".
    `reused_tokens` of the prompt were still held from the turn before."""

    finish: str
    end_token: int | None
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    seconds: float
    first_token_seconds: float | None


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class Score:
    """Per position: log-probability of the token that is there, in nats; and, against a reference, the KL
    divergence in nats and 1.0 where both put the same token first."""

    logprobs: list[float]
    kl: list[float]
    same: list[float]


class Engine:
    """One GGUF in a child process. Requests wait for each other; `close` or leaving the `with` ends the child.

    Raises NotFound where there is no file, EngineError where it cannot be loaded, dies, or stays silent.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = CONTEXT,
        threads: int | None = None,
        gpu_layers: int = -1,
        check_tensors: bool = False,
        answer_seconds: float = ANSWER_SECONDS,
        abandon: threading.Event | None = None,
        card: str | None = None,
    ):
        """`context` in tokens, cut to what the model was trained for. `gpu_layers`: how many layers go to a GPU, -1
        for all; without a GPU it has no effect. `card`: which GPU, None for those that this process sees.
        `check_tensors` has llama.cpp look for broken numbers. `abandon`, set
        from another thread, ends the loading (EngineError)."""
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise NotFound(f"There is no model file {self.path}: export again, or name another.")
        self._answer_seconds = answer_seconds
        self._turn = threading.Lock()
        self._writing = threading.Lock()
        self._number = 0
        self._closed = False
        self._unread = b""
        self._meta: dict[str, Any] = {}
        self._log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the child)
        settings = {
            "context": context,
            "threads": threads or cores.count(),
            "gpu_layers": gpu_layers,
            "check_tensors": check_tensors,
        }
        options = {"path": str(self.path), "settings": settings, "parent": os.getpid()}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "katherine.engine_child", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=PROJECT,
            env=child_environment(
                # Else llama.cpp calls a debugger on an assertion that failed, whose pages hide which one it was.
                GGML_NO_BACKTRACE="1",
                **(gpu.alone(card) if card is not None else {}),
            ),
        )
        try:
            self._meta = self._next(LOAD_SECONDS, abandon)["done"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return not self._closed and self._child.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kill(self) -> None:
        """Ends the child without waiting for its end: `close` has to follow."""
        self._closed = True
        self._child.kill()

    def close(self) -> None:
        """Ends the child; safe to call twice, and from another thread than the one that reads a reply."""
        self.kill()
        self._child.wait()
        # Whoever is reading meets the end of the pipe at once and lets go; an abandoned reply never does.
        if self._turn.acquire(timeout=1):
            for pipe in (self._child.stdin, self._child.stdout, self._log):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._turn.release()

    # ------------------------------------------------------------------ requests

    def meta(self) -> dict[str, Any]:
        """What the file says of itself: architecture, template, tensors, parameters, tensor_bytes, file_type,
        vocabulary, context, end_of_turn (id), adds_begin, hybrid, on_gpu."""
        return dict(self._meta)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids by the file's own tokenizer, without what the file says to put around them. `special`: control tokens in
        the text are read as such."""
        return self._ask("tokenize", text=text, special=special)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        seed: int = 0,
        threads: int | None = None,
    ) -> "Generation":
        """A stream of text for a prompt's ids; 0 is greedy. What the context still holds of them is not read again.
        The defaults of the sampling are llama.cpp's. `threads`: for this reply's tokens, after its prompt was read with
        all of the engine's; fewer where other engines answer at the same time."""
        self._turn.acquire()
        self._number += 1
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
        }
        try:
            request = {"number": self._number, "ids": list(prompt), "sampling": sampling, "threads": threads}
            self._send({"op": "generate", **request})
        except BaseException:
            self._turn.release()
            raise
        return Generation(self, self._number)

    def complete(self, prompt: Sequence[int], *, max_new_tokens: int, **sampling: Any) -> Reply:
        """The whole reply at once; arguments as for `generate`."""
        generation = self.generate(prompt, max_new_tokens=max_new_tokens, **sampling)
        text = "".join(generation)
        assert generation.finish is not None
        return Reply(text, generation.finish)

    def score(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        *,
        reference: Path | None = None,
        row: int = 0,
        write: bool = False,
    ) -> Score:
        """Scores ids[p] given ids[:p] for each p of ascending `positions`. `reference` is a file of float32 rows of
        log-probabilities, one a position: written from `row` on with `write`, else compared with."""
        where = str(Path(reference).absolute()) if reference else None
        return Score(
            **self._ask("score", ids=list(ids), positions=list(positions), reference=where, row=row, write=write)
        )

    # ------------------------------------------------------------------ the wire

    def _ask(self, op: str, **arguments: Any) -> Any:
        with self._turn:
            self._send({"op": op, **arguments})
            return self._last(self._answer_seconds)

    def _send(self, request: dict[str, Any]) -> None:
        if self._closed:
            raise self._death()
        try:
            with self._writing:
                assert self._child.stdin is not None
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
        except (OSError, ValueError):
            raise self._death() from None

    def _last(self, seconds: float) -> Any:
        return self._next(seconds)["done"]

    def _next(self, seconds: float, abandon: threading.Event | None = None) -> dict[str, Any]:
        """The child's next answer; raises EngineError for its refusal, its death, silence of `seconds`, or once it is
        to be abandoned."""
        assert self._child.stdout is not None
        handle = self._child.stdout.fileno()
        waiting = poll()
        waiting.register(handle, POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if not waiting.poll(max(0.0, min(left, LOOK) if abandon else left) * 1000):
                if abandon and abandon.is_set():
                    raise EngineError(f"The loading of {self.path} was given up.")
                if left > LOOK and abandon:
                    continue
                self._child.kill()
                raise EngineError(
                    f"The engine of {self.path} said nothing for {seconds:.0f} s and was ended. Is the machine out of "
                    f"memory, or does another job hold it?{self._tail()}"
                )
            more = os.read(handle, 1 << 16)
            if not more:
                raise self._death()
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            # llama.cpp's log says why a file cannot be loaded; a refused request needs no more words.
            raise EngineError(f"{self.path}: {answer['error']}.{'' if self._meta else self._tail()}")
        return answer

    def _death(self) -> EngineError:
        """What became of the child, in words. Raises nothing itself."""
        if self._closed:
            return EngineError(f"The engine of {self.path} was closed: start it again.")
        try:
            code = self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (the host's memory limit, or somebody's kill)" if code == -signal.SIGKILL else ""
        return EngineError(f"The engine of {self.path} {how}{hint}.{self._tail()}")

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 8192))
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return "".join(f"\n  {line}" for line in lines[-LOG_LINES:])


class Generation(Iterator[str]):
    """Pieces of a reply as they come, whole characters each. After the last, `finish` says how it ended; until the
    end is read, or `close`, the engine serves nobody else. `cancel` may come from any thread."""

    def __init__(self, engine: Engine, number: int):
        self._engine = engine
        self._number = number
        self._over = False
        self.finish: Finish | None = None

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        try:
            answer = self._engine._next(self._engine._answer_seconds)
        except BaseException:
            self._end()
            raise
        if "text" in answer:
            return answer["text"]
        self.finish = Finish(**answer["done"])
        self._end()
        raise StopIteration

    def _end(self) -> None:
        self._over = True
        self._engine._turn.release()

    def cancel(self) -> None:
        """Asks the reply to end after the present token; what comes until then is still to be read."""
        self._engine._send({"op": "cancel", "number": self._number})

    def close(self) -> None:
        """Ends the reply and reads it out, so that the engine is free again."""
        if not self._over:
            self.cancel()
            for _ in self:
                pass


@functools.cache
def offloads() -> bool:
    """Whether engines compute on a GPU here: one is there, and llama.cpp was built for it. A child is asked, since the
    library is never loaded here and starts the card's driver; it may take a minute, once."""
    code = "import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())"
    with contextlib.suppress(SetupError, OSError, subprocess.TimeoutExpired):
        if gpu.read():
            asked = [sys.executable, "-c", code]
            return subprocess.run(asked, capture_output=True, env=child_environment(), timeout=60).returncode == 0
    return False
