"""The process that holds one GGUF: reads requests as JSON lines on stdin, answers on stdout, and ends when stdin
closes. llama.cpp aborts on a bad file, so nothing else may live here. Starting it is the business of engines."""

import codecs
import ctypes
import json
import os
import queue
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as llama
import numpy as np

# Tokens decoded at once: llama.cpp's own default, past which prompts get no faster.
BATCH = 512
# Rows of logits asked for at once: 64 MB at a vocabulary of 248,320, and enough to keep the last layer busy.
OUTPUTS = 64


# ggml_log_level: 3 is a warning, 4 an error, 5 goes on with the line before. Below are hundreds of lines a load.
_WARNING, _CONTINUED = 3, 5
_logged = False


# Own, because the package's takes llama.cpp's levels for one lower each and so drops the errors.
@llama.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    global _logged
    _logged = _logged if level == _CONTINUED else level >= _WARNING
    if _logged:
        os.write(2, text)


class Refused(Exception):
    """A request that cannot be served; the model is sound and the next request can be."""


class Model:
    """One GGUF and one context. `held` are the ids whose state the context holds."""

    def __init__(self, path: str, *, context: int, threads: int, gpu_layers: int, check_tensors: bool):
        llama.llama_backend_init()
        self.path = path
        settings = llama.llama_model_default_params()
        # Every layer, where the build has a GPU at all; -1 is how the caller says so.
        settings.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 0x7FFFFFFF
        settings.check_tensors = check_tensors
        self.model = llama.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise Refused("llama.cpp cannot load it")
        self.vocabulary = llama.llama_model_get_vocab(self.model)
        self.size = llama.llama_vocab_n_tokens(self.vocabulary)
        wanted = llama.llama_context_default_params()
        wanted.n_ctx = min(context, llama.llama_model_n_ctx_train(self.model))
        wanted.n_batch = wanted.n_ubatch = min(BATCH, wanted.n_ctx)
        wanted.n_outputs_max = min(OUTPUTS, wanted.n_batch)
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise Refused(f"llama.cpp cannot make a context of {wanted.n_ctx} tokens for it (out of memory?)")
        self.threads = threads
        self.length = llama.llama_n_ctx(self.context)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.held: list[int] = []

    def meta(self) -> dict[str, Any]:
        """What the file says of itself. tensor_bytes is the tensors alone, without header and vocabulary."""
        with open(self.path, "rb") as file:
            # Magic, version, tensor count: the fixed head of every GGUF.
            _, _, tensors = struct.unpack("<4sIQ", file.read(16))
        fields = {}
        for index in range(llama.llama_model_meta_count(self.model)):
            name = self._text(llama.llama_model_meta_key_by_index, index)
            fields[name] = self._text(llama.llama_model_meta_val_str_by_index, index)
        return {
            "architecture": fields.get("general.architecture", ""),
            "template": fields.get("tokenizer.chat_template"),
            "tensors": tensors,
            "parameters": llama.llama_model_n_params(self.model),
            "tensor_bytes": llama.llama_model_size(self.model),
            "file_type": int(fields.get("general.file_type", -1)),
            "vocabulary": self.size,
            "context": self.length,
            "end_of_turn": llama.llama_vocab_eos(self.vocabulary),
            "adds_begin": bool(llama.llama_vocab_get_add_bos(self.vocabulary)),
            "hybrid": bool(llama.llama_model_is_hybrid(self.model)),
            "on_gpu": bool(llama.llama_supports_gpu_offload()),
        }

    def _text(self, read: Any, index: int) -> str:
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = read(self.model, index, buffer, size)
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        raw = text.encode()
        # A token is at least a byte.
        ids = (llama.llama_token * max(1, len(raw)))()
        count = llama.llama_tokenize(self.vocabulary, raw, len(raw), ids, len(ids), False, special)
        if count < 0:
            raise Refused(f"a text of {len(raw)} bytes gives {-count} tokens")
        return list(ids[:count])

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            # Control tokens are written out: a stray one must be seen, not swallowed.
            written = llama.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, True)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    # ------------------------------------------------------------------ decoding

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise Refused("there are no ids to read")
        if len(ids) > self.length:
            raise Refused(f"{len(ids)} tokens do not fit its context of {self.length}")
        if bad := [i for i in ids if not 0 <= i < self.size]:
            raise Refused(f"id {bad[0]} is outside its vocabulary of {self.size}")

    def forget(self) -> None:
        llama.llama_memory_clear(self.memory, True)
        self.held = []

    def _rewind(self, ids: Sequence[int]) -> int:
        """Keeps of the held state what `ids` begin with, and says how many tokens that is. The last one is always
        read anew, since its logits are what comes next. A recurrent state cannot be cut back in part."""
        same = 0
        for ours, theirs in zip(self.held, ids[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        if same and (same == len(self.held) or llama.llama_memory_seq_rm(self.memory, 0, same, -1)):
            del self.held[same:]
        else:
            self.forget()
        return len(self.held)

    def _decode(self, ids: Sequence[int], wanted: Sequence[bool]) -> None:
        """Appends at most BATCH ids to the held ones; logits are kept where `wanted`."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = len(self.held) + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = wanted[index]
        code = llama.llama_decode(self.context, batch)
        if code:
            self.forget()
            raise Refused(f"llama.cpp could not decode {len(ids)} tokens (code {code})")
        self.held += ids

    def _read(self, ids: Sequence[int], stop: threading.Event) -> bool:
        """Appends ids of any number, with logits for the last. False where it was stopped on the way."""
        for start in range(0, len(ids), BATCH):
            if stop.is_set():
                return False
            part = ids[start : start + BATCH]
            last = start + len(part) == len(ids)
            self._decode(part, [last and i == len(part) - 1 for i in range(len(part))])
        return True

    def generate(
        self,
        ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        min_p: float,
        seed: int,
        threads: int | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """Yields {"text"} as words come, whole characters only, then {"done"}: why and when it ended."""
        self._check(ids)
        began = time.monotonic()
        llama.llama_set_n_threads(self.context, threads or self.threads, self.threads)
        reused = self._rewind(ids)
        sampler = self._sampler(temperature, top_p, top_k, min_p, seed)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ended, count, first, last = "length", 0, None, None
        try:
            going = self._read(ids[reused:], stop)
            while True:
                if not going or stop.is_set():
                    ended = "stopped"
                    break
                if count == max_new_tokens or len(self.held) >= self.length:
                    break
                last = llama.llama_sampler_sample(sampler, self.context, -1)
                count += 1
                first = first if first is not None else time.monotonic() - began
                if llama.llama_vocab_is_eog(self.vocabulary, last):
                    ended = "end"
                    break
                if text := decoder.decode(self._piece(last)):
                    yield {"text": text}
                if count < max_new_tokens and len(self.held) < self.length:
                    self._decode([last], [True])
        finally:
            llama.llama_sampler_free(sampler)
        # What the decoder still holds is part of a character that was cut off: it is left out.
        yield {
            "done": {
                "finish": ended,
                "end_token": last if ended == "end" else None,
                "prompt_tokens": len(ids),
                "reused_tokens": reused,
                "tokens": count,
                "seconds": time.monotonic() - began,
                "first_token_seconds": first,
            }
        }

    def _sampler(self, temperature: float, top_p: float, top_k: int, min_p: float, seed: int) -> Any:
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if temperature <= 0:
            parts = [llama.llama_sampler_init_greedy()]
        else:
            parts = [
                llama.llama_sampler_init_top_k(top_k),
                llama.llama_sampler_init_top_p(top_p, 1),
                llama.llama_sampler_init_min_p(min_p, 1),
                llama.llama_sampler_init_temp(temperature),
                llama.llama_sampler_init_dist(seed),
            ]
        for part in parts:
            llama.llama_sampler_chain_add(chain, part)
        return chain

    # ------------------------------------------------------------------ scoring

    def score(
        self, ids: list[int], positions: list[int], *, reference: str | None, row: int, write: bool
    ) -> dict[str, list[float]]:
        """Log-probability, in nats, of ids[p] given ids[:p], for each p of ascending `positions` (each at least 1).

        `reference` is a file of float32 rows, one a scored position, each this vocabulary's log-probabilities.
        With `write` they are written from `row` on; else KL(reference ‖ this) and whether both put the same token
        first are returned too.
        """
        self._check(ids)
        if positions != sorted(set(positions)) or (positions and not 1 <= positions[0] <= positions[-1] < len(ids)):
            raise Refused("positions must ascend and lie within the ids, after the first")
        self.forget()
        logprobs: list[float] = []
        kl: list[float] = []
        same: list[float] = []
        with open(reference, "r+b" if write else "rb") if reference else open(os.devnull, "rb") as file:
            file.seek(row * self.size * 4)
            for part, wanted in _parts(ids, positions):
                self._decode(part, wanted)
                for index in (i for i, w in enumerate(wanted) if w):
                    logits = llama.llama_get_logits_ith(self.context, index)
                    ours = _log_softmax(np.ctypeslib.as_array(logits, shape=(self.size,)))
                    position = len(self.held) - len(part) + index + 1
                    logprobs.append(float(ours[ids[position]]))
                    if reference and write:
                        file.write(ours.tobytes())
                    elif reference:
                        theirs = np.frombuffer(file.read(self.size * 4), dtype=np.float32)
                        if len(theirs) < self.size:
                            raise Refused(f"{reference} ends before row {row + len(logprobs) - 1}")
                        divergence = float(np.dot(np.exp(theirs), theirs - ours))
                        # Rounding can leave a sum of nothing a hair below zero; NaN must stay NaN.
                        kl.append(0.0 if divergence < 0 else divergence)
                        same.append(float(theirs.argmax() == ours.argmax()))
        return {"logprobs": logprobs, "kl": kl, "same": same}


def _parts(ids: list[int], positions: list[int]) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids up to the last position, cut so that no part asks for more than OUTPUTS rows of logits."""
    wanted = set(p - 1 for p in positions)
    part: list[int] = []
    flags: list[bool] = []
    for index, token in enumerate(ids[: positions[-1]] if positions else []):
        part.append(token)
        flags.append(index in wanted)
        if len(part) == BATCH or sum(flags) == OUTPUTS:
            yield part, flags
            part, flags = [], []
    if part:
        yield part, flags


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))


class Cancel:
    """Which generation was told to stop. An order for one that is over must not reach the next."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._number = -1
        self._cancelled = -1

    def begin(self, number: int) -> None:
        with self._lock:
            self._number = number
            self.stop.clear()
            if self._cancelled == number:
                self.stop.set()

    def order(self, number: int) -> None:
        with self._lock:
            self._cancelled = number
            if self._number == number:
                self.stop.set()


def _answers(model: Model, request: dict[str, Any], cancel: Cancel) -> Iterator[dict[str, Any]]:
    match request["op"]:
        case "tokenize":
            yield {"done": model.tokenize(request["text"], special=request["special"])}
        case "generate":
            cancel.begin(request["number"])
            asked = request["sampling"] | {"threads": request["threads"]}
            yield from model.generate(request["ids"], **asked, stop=cancel.stop)
        case "score":
            yield {
                "done": model.score(
                    request["ids"],
                    request["positions"],
                    reference=request["reference"],
                    row=request["row"],
                    write=request["write"],
                )
            }
        case other:
            raise Refused(f"there is no request {other!r}")


def main() -> None:
    options = json.loads(sys.argv[1])
    # The answers keep the real stdout to themselves; whatever else prints goes where the log goes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    llama.llama_log_set(_log, ctypes.c_void_p(0))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    cancel = Cancel()

    def listen() -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "cancel":
                cancel.order(request["number"])
            else:
                requests.put(request)
        # Nobody is left to answer. os._exit, because the main thread may be deep in a decode.
        os._exit(0)

    def outlive_nobody() -> None:
        # For the case that a stranger inherited the other end of stdin and keeps it open. The kernel's own
        # parent-death signal would not do: it fires when the *thread* that started us ends.
        while os.getppid() == options["parent"]:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=outlive_nobody, daemon=True).start()

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        model = Model(options["path"], **options["settings"])
    except Refused as refusal:
        answer({"error": str(refusal)})
        sys.exit(1)
    answer({"done": model.meta()})
    while True:
        request = requests.get()
        try:
            for value in _answers(model, request, cancel):
                answer(value)
        except Refused as refusal:
            answer({"error": str(refusal)})


if __name__ == "__main__":
    main()
