"""The process that makes a 16-bit GGUF: llama.cpp's own converter, run from where it lies, with what is slow in it done
otherwise and not a byte of the file changed. Starting it, and what it is asked, is gguf's business.

    python -m katherine.gguf_child CONVERTER [its arguments]

The converter takes every bfloat16 tensor to float32 and, sixteen rows at a time in NumPy, back again; and it reads,
reckons and writes in turns, in one thread. Here a tensor that it only renames keeps its bits, the others are rounded by
torch with every core, and the next tensors are made while one is written."""

import collections
import runpy
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from katherine import cores

# Bytes that may wait for the disk: two of a 9B's largest tensors (2 GB each), and dozens of the others.
AHEAD = 4 * 2**30
# Where a lazy tensor that was made from a bfloat16 one by widening alone keeps that one.
_BITS = "widened_from"


def main() -> None:
    script = Path(sys.argv[1])
    # As Python does for a script that it starts, and as the converter does for the library beside it.
    sys.path[0] = str(script.parent)
    sys.path.insert(1, str(script.parent / "gguf-py"))
    sys.argv = sys.argv[1:]
    # torch counts the machine's cores, of which a container may have a few.
    torch.set_num_threads(cores.count())
    try:
        quicken()
    except (ImportError, AttributeError) as error:
        # Another version's insides: it is slower as it is, and right.
        print(f"The converter is run as it is, and takes longer ({type(error).__name__}: {error}).", flush=True)
    runpy.run_path(str(script), run_name="__main__")


def quicken() -> None:
    """Puts what is quicker in the converter's place, in this process. Raises ImportError or AttributeError, and changes
    nothing, where the converter's insides are not those known here."""
    import gguf
    from conversion import base
    from gguf.gguf_writer import WriterState

    lazy_torch, lazy_numpy = base.LazyTorchTensor, gguf.LazyNumpyTensor
    bf16: Any = gguf.quants.BF16
    writer: Any = gguf.GGUFWriter
    to_numpy, quantize, write = lazy_torch.numpy, bf16.quantize, writer.write_tensors_to_file
    shape_in_bytes = gguf.quant_shape_to_byte_shape
    kind = gguf.GGMLQuantizationType.BF16
    wrap = lazy_torch._wrap_fn

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        widened = wrap(torch.Tensor.to)(self, *args, **kwargs)
        if self.dtype == torch.bfloat16 and args == (torch.float32,) and not kwargs:
            widened.__dict__[_BITS] = self
        return widened

    def numpy(self: Any) -> Any:
        array = to_numpy(self)
        if _BITS in self.__dict__:
            array.__dict__[_BITS] = self.__dict__[_BITS]
        return array

    def rounded(tensor: Any) -> Any:
        if not isinstance(tensor, lazy_numpy):
            return quantize(tensor)
        source = tensor.__dict__.get(_BITS)
        return lazy_numpy(
            meta=lazy_numpy.meta_with_dtype_and_shape(np.uint8, shape_in_bytes(tensor.shape, kind)),
            args=(tensor if source is None else source,),
            func=lambda values: bits_of(values, quantize),
        )

    def write_ahead(self: Any, *, progress: bool = False) -> None:
        if self.temp_file is not None or len(self.fout) > 1:
            write(self, progress=progress)
            return
        self.write_ti_data_to_file()
        (file,), (tensors,) = self.fout, self.tensors
        self.write_padding(file, file.tell())
        _write(self, file, tensors, lazy_numpy, progress)
        self.state = WriterState.WEIGHTS

    lazy_torch.to = to
    lazy_torch.numpy = numpy
    bf16.quantize = rounded
    writer.write_tensors_to_file = write_ahead


def bits_of(values: Any, quantize: Any) -> np.ndarray:
    """The bytes that the converter makes of a bfloat16 tensor's or float32 array's values, shape (..., 2 × width)."""
    held = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    found = held.to(torch.bfloat16).contiguous()
    # What becomes of a number that is none differs from library to library; a maximum over them all is none as well.
    if found.numel() and torch.isnan(found.max()):
        return quantize(held.to(torch.float32).numpy())
    return found.view(torch.uint8).numpy()


def _write(writer: Any, file: Any, tensors: dict[str, Any], lazy: Any, progress: bool) -> None:
    """As the converter's own loop, with a thread that makes the next tensors meanwhile. That thread is one, because
    torch spreads each tensor over all cores by itself."""
    from tqdm import tqdm

    waiting: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
    left = iter(tensors.values())
    ahead = 0
    bar = tqdm(desc="Writing", total=sum(ti.nbytes for ti in tensors.values()), disable=not progress)
    with ThreadPoolExecutor(1) as maker:
        coming = next(left, None)
        while coming or waiting:
            while coming and (ahead < AHEAD or not waiting):
                waiting.append((coming, maker.submit(lazy.to_eager, coming.tensor)))
                ahead += coming.nbytes
                coming = next(left, None)
            info, made = waiting.popleft()
            begun = file.tell()
            made.result().tofile(file)
            if file.tell() - begun != info.nbytes:
                raise ValueError(f"{file.name}: {file.tell() - begun} bytes were written of a tensor of {info.nbytes}")
            writer.write_padding(file, info.nbytes)
            bar.update(info.nbytes)
            ahead -= info.nbytes
            info.tensor = None
    bar.close()


if __name__ == "__main__":
    main()
