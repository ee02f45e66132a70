"""llama.cpp's K-quants by torch against llama.cpp itself: block by block, and whole files."""

import ctypes

import numpy as np
import pytest
import torch
from blocks import odd_blocks

from bench import base as bases
from katherine import gguf, kquants, requantise
from katherine.errors import ExportError
from katherine.progress import Quiet, Stopped

KINDS = tuple(kquants.types())


@pytest.fixture(scope="module")
def reference():
    """llama.cpp's own: (values of float32 in rows of 256, kind) → bytes (rows, bytes of a super-block)."""
    lib = requantise._library()
    chunk = lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    numbers = {lib.ggml_type_name(each).decode(): each for each in range(30)}

    def quantised(values, kind):
        rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, kquants.SUPER_BLOCK)
        out = np.zeros((len(rows), kquants.types()[kind]), dtype=np.uint8)
        made = chunk(numbers[kind], rows.ctypes.data, out.ctypes.data, 0, len(rows), kquants.SUPER_BLOCK, None)
        assert made == out.nbytes
        return out

    return quantised


@pytest.mark.parametrize("kind", KINDS)
def test_odd_blocks_become_llama_cpps_bytes(reference, kind):
    rows = odd_blocks()
    found = kquants.encode(torch.from_numpy(rows), kind).numpy()
    wrong = np.flatnonzero((found != reference(rows, kind)).any(1))
    assert not wrong.size, f"rows {wrong.tolist()} differ"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_bfloat16_become_llama_cpps_bytes(reference, kind):
    numbers = torch.Generator().manual_seed(5)
    weights = (torch.randn(512, 1024, generator=numbers) * 0.02).to(torch.bfloat16)
    found = kquants.encode(weights, kind).numpy()
    assert found.shape == (2048, kquants.types()[kind])
    assert (found == reference(weights.float().numpy(), kind)).all()


def test_a_width_that_super_blocks_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="Rows of 576 weights"):
        kquants.encode(torch.zeros(2, 576), "q4_K")


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory):
    """A 16-bit GGUF in Qwen3.5's form with widths that super-blocks divide."""
    from katherine import settings

    folder = tmp_path_factory.mktemp("base")
    bases.write_checkpoint(folder / "checkpoint", "tiny")
    out = folder / "model-bf16.gguf"
    gguf.convert(settings.home(), folder / "checkpoint", out, Quiet(), name="tiny", without_mtp=True)
    return out


def contents(path):
    """A file's metadata and its tensors, by name: all but the order in which tensors stand."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    return told, {each.name: (each.tensor_type, each.shape.tolist(), each.data.tobytes()) for each in reader.tensors}


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_m", "q6_k"])
def test_a_file_is_the_one_that_llama_cpp_makes(unquantised, tmp_path, name, monkeypatch):
    # Less at once than the vocabulary takes, so that tensors are made in pieces.
    monkeypatch.setattr(requantise, "PIECE", 2**20)
    reckoned = gguf.reckon(unquantised, name, Quiet())
    assert requantise.is_able(reckoned) and len(set(reckoned.kinds.values())) == (1 if name == "q6_k" else 2)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    gguf.quantise(unquantised, theirs, name, Quiet())
    told = Quiet()
    requantise.write(unquantised, ours, name, reckoned.kinds, told, device="cpu")
    assert ours.stat().st_size == theirs.stat().st_size
    (their_metadata, their_tensors), (metadata, tensors) = contents(theirs), contents(ours)
    assert metadata == their_metadata
    assert tensors.keys() == their_tensors.keys()
    assert [each for each in tensors if tensors[each] != their_tensors[each]] == []


def test_what_is_stopped_or_cannot_be_read_leaves_no_file(unquantised, tmp_path):
    class Stopping(Quiet):
        def stop_requested(self):
            return True

    out = tmp_path / "out.gguf"
    kinds = gguf.reckon(unquantised, "q6_k", Quiet()).kinds
    with pytest.raises(Stopped):
        requantise.write(unquantised, out, "q6_k", kinds, Stopping(), device="cpu")
    assert not out.exists()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, and then nothing")
    with pytest.raises(ExportError, match=r"cannot read .*broken\.gguf as GGUF"):
        requantise.write(broken, out, "q6_k", kinds, Quiet(), device="cpu")
    assert not out.exists()


def test_weights_that_are_no_numbers_are_refused_with_their_tensors_name(unquantised, tmp_path):
    broken, out = tmp_path / "broken.gguf", tmp_path / "out.gguf"
    broken.write_bytes(unquantised.read_bytes())
    kinds = gguf.reckon(unquantised, "q6_k", Quiet()).kinds
    with requantise._opened(broken) as header:
        spoilt = next(each for each in header.tensors() if each.name in kinds and "blk.1" in each.name)
    with broken.open("r+b") as file:
        file.seek(spoilt.offset + 1000)
        file.write(b"\xc0\x7f")  # NaN in bfloat16
    with pytest.raises(ExportError, match=rf"{spoilt.name} holds weights that are no numbers"):
        requantise.write(broken, out, "q6_k", kinds, Quiet(), device="cpu")
    assert not out.exists()


def test_a_type_that_is_not_known_here_is_left_to_llama_cpp(unquantised):
    assert not requantise.is_able(gguf.reckon(unquantised, "q8_0", Quiet()))
