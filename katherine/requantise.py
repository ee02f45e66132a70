"""A quantised GGUF from a 16-bit one, with the arithmetic done by torch, where llama.cpp's own quantiser would keep
every core at work for a minute. Which tensor takes which type is llama.cpp's choice (gguf.reckon), its library writes
the header, and the numbers are kquants'. Needs torch: import it in a job's process only."""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf as library
import numpy as np
import torch

from katherine import gguf, kquants
from katherine.errors import ExportError
from katherine.progress import Progress, Stopped

# Weights that are worked on at once. The search holds some forty bytes for each: 0.7 GB.
PIECE = 2**24
# What torch can read a tensor as.
_SOURCES = {"bf16": torch.bfloat16, "f32": torch.float32}


def is_able(reckoned: gguf.Reckoned) -> bool:
    """Whether every tensor that llama.cpp would convert takes a type that is known here."""
    return set(reckoned.kinds.values()) <= kquants.types().keys()


def write(
    source: Path, out: Path, name: str, kinds: Mapping[str, str], progress: Progress, *, device: str = "cuda"
) -> None:
    """Writes `out`, the source GGUF in the type `name`, with tensors as `kinds` says ("q4_K" by tensor's name) and the
    others as they are. Raises ExportError or Stopped; `out` is then absent."""
    try:
        with _opened(source) as header:
            before = header.tensors()
            header.set("general.quantization_version", library.GGML_QUANT_VERSION)
            header.set("general.file_type", gguf.types()[name])
            for tensor, kind in kinds.items():
                header.retype(tensor, kind)
            header.write(out)
            after, alignment = header.tensors(), header.alignment
        held = np.memmap(source, dtype=np.uint8, mode="r")
        done, of = 0, sum(each.size for each in before)
        with out.open("r+b") as file:
            for old, new in zip(before, after, strict=True):
                place = new.offset
                for piece in _pieces(old, held):
                    if progress.stop_requested():
                        raise Stopped
                    found = _converted(piece, old, kinds.get(old.name), device)
                    place += os.pwrite(file.fileno(), found, place)
                    done += piece.nbytes
                    progress.step(done, of)
                if place != new.offset + new.size:
                    raise ExportError(
                        f"{new.name} takes {new.size} bytes in {out}, and {place - new.offset} were made."
                    )
            # What lies between tensors was never written, and is zeros; so is the end.
            os.ftruncate(file.fileno(), place + -place % alignment)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    finally:
        if device == "cuda":
            # What torch keeps for later is wanted by the engines that check the files.
            torch.cuda.empty_cache()


def _pieces(tensor: "_Tensor", held: Any) -> Iterator[Any]:
    """A tensor's bytes in parts, each of whole super-blocks."""
    step = PIECE * (2 if tensor.kind == "bf16" else 4)
    for begin in range(0, tensor.size, step):
        yield held[tensor.offset + begin : tensor.offset + min(begin + step, tensor.size)]


def _converted(piece: Any, tensor: "_Tensor", kind: str | None, device: str) -> Any:
    if kind is None:
        return piece
    if tensor.kind not in _SOURCES:
        raise ExportError(f"{tensor.name} is {tensor.kind}; only {' and '.join(_SOURCES)} can be quantised.")
    # A copy, because torch refuses memory that may not be written to.
    values = torch.from_numpy(piece.copy()).view(_SOURCES[tensor.kind]).to(device)
    if not values.isfinite().all():
        raise ExportError(f"{tensor.name} holds weights that are no numbers. Its training went wrong; train again.")
    return kquants.encode(values, kind).cpu().numpy()


# ---------------------------------------------------------------------- llama.cpp's own reading and writing of headers


class _Tensor(NamedTuple):
    """`kind` as llama.cpp names types; `offset` from the file's begin, and `size`, in bytes."""

    name: str
    kind: str
    offset: int
    size: int


class _Header:
    """A GGUF's metadata and its tensors' places, in llama.cpp's hands."""

    def __init__(self, lib: Any, handle: int):
        self._lib, self._handle = lib, handle
        self._numbers = {lib.ggml_type_name(each).decode(): each.value for each in library.GGMLQuantizationType}
        self.alignment: int = lib.gguf_get_alignment(handle)

    def tensors(self) -> list[_Tensor]:
        lib, handle = self._lib, self._handle
        # Not gguf_get_data_offset, which is where the data began in the file that was read.
        begin = lib.gguf_get_meta_size(handle)
        return [
            _Tensor(
                lib.gguf_get_tensor_name(handle, each).decode(),
                lib.ggml_type_name(lib.gguf_get_tensor_type(handle, each)).decode(),
                begin + lib.gguf_get_tensor_offset(handle, each),
                lib.gguf_get_tensor_size(handle, each),
            )
            for each in range(lib.gguf_get_n_tensors(handle))
        ]

    def set(self, key: str, value: int) -> None:
        self._lib.gguf_set_val_u32(self._handle, key.encode(), value)

    def retype(self, tensor: str, kind: str) -> None:
        self._lib.gguf_set_tensor_type(self._handle, tensor.encode(), self._numbers[kind])

    def write(self, out: Path) -> None:
        if not self._lib.gguf_write_to_file(self._handle, os.fsencode(out), True):
            raise ExportError(f"{out} could not be written: is there room, and may this user write there?")


@contextmanager
def _opened(source: Path) -> Iterator[_Header]:
    lib = _library()
    handle = lib.gguf_init_from_file(os.fsencode(source), _Params(True, None))
    if not handle:
        raise ExportError(f"llama.cpp cannot read {source} as GGUF.")
    try:
        yield _Header(lib, handle)
    finally:
        lib.gguf_free(handle)


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _library() -> Any:
    """llama.cpp's base library, of which llama-cpp-python wraps the models but not the files."""
    import llama_cpp

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    handle, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
    for name, result, *given in (
        ("gguf_init_from_file", handle, text, _Params),
        ("gguf_free", None, handle),
        ("gguf_get_alignment", size, handle),
        ("gguf_get_meta_size", size, handle),
        ("gguf_get_n_tensors", ctypes.c_int64, handle),
        ("gguf_get_tensor_name", text, handle, ctypes.c_int64),
        ("gguf_get_tensor_type", number, handle, ctypes.c_int64),
        ("gguf_get_tensor_offset", size, handle, ctypes.c_int64),
        ("gguf_get_tensor_size", size, handle, ctypes.c_int64),
        ("gguf_set_val_u32", None, handle, text, ctypes.c_uint32),
        ("gguf_set_tensor_type", None, handle, text, number),
        ("gguf_write_to_file", ctypes.c_bool, handle, text, ctypes.c_bool),
        ("ggml_type_name", text, number),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, given
    return lib
