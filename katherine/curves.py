"""What a run measured, as arrays: read once, then only what was added, and made small enough for a screen. Writing the
rows is training's and jobs.worker's affair, drawing them the page's."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Steps = NDArray[np.int32]

TRAINED = (
    "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib",
    "margin", "accuracy", "reward_chosen", "reward_rejected",
)  # fmt: skip
EVALUATED = ("eval_loss", "eval_margin", "eval_accuracy", "eval_reward_chosen", "eval_reward_rejected")

# Decoded rows are Python objects of some 500 bytes, arrays 40: so a file is decoded a piece at a time.
PIECE_BYTES = 1_000_000
# A row of training is 350 bytes. What has no end after this much is no row, and must not be held in memory.
ROW_BYTES = 64_000
# So many bytes before the place where reading ended are looked at again: a file that was rewritten differs there.
SEAL_BYTES = 64
# 50,000 steps take 3 MB: ten of such runs, for each of the pages that draw, against 350 MB for the whole web process.
CACHE_BYTES = 32_000_000


class _Row(msgspec.Struct, gc=False):
    """The fields that are drawn; the others are skipped without being built. Numbers that are not finite are texts."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    attempt: int = 1
    loss: float | str | None = None
    learning_rate: float | str | None = None
    grad_norm: float | str | None = None
    tokens_per_second: float | str | None = None
    memory_gib: float | str | None = None
    margin: float | str | None = None
    accuracy: float | str | None = None
    reward_chosen: float | str | None = None
    reward_rejected: float | str | None = None
    eval_loss: float | str | None = None
    eval_margin: float | str | None = None
    eval_accuracy: float | str | None = None
    eval_reward_chosen: float | str | None = None
    eval_reward_rejected: float | str | None = None


_decoder = msgspec.json.Decoder(_Row)


@dataclass(frozen=True, slots=True)
class Series:
    """steps: int32, strictly increasing. values: name → float32 of the same length, only names that were logged at
    least once; what is missing or no number is nan, and an infinite number stays infinite."""

    steps: Steps
    values: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.steps)

    def odd(self, name: str) -> Steps:
        """The steps at which the value is not a finite number."""
        return self.steps[~np.isfinite(self.values[name])]


@dataclass(frozen=True, slots=True)
class Curves:
    """trained: a row an optimiser step. evaluated: a row an evaluation of the held-out share. resumed: the first steps
    of later attempts. mark: changes whenever the content does, and only then."""

    trained: Series
    evaluated: Series
    resumed: tuple[int, ...]
    mark: str


class _Columns:
    """Arrays that grow: rows of increasing step. What snapshot() gave out is never written again."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._steps = np.empty(0, np.int32)
        self._values: dict[str, Floats] = {}
        self._count = 0

    @property
    def held(self) -> int:
        return self._steps.nbytes * (1 + len(self._values))

    def append(self, steps: Steps, rows: Sequence[_Row]) -> None:
        """Rows of strictly increasing step; those from the first one's step on that are here already make way."""
        keep = int(np.searchsorted(self._steps[: self._count], steps[0]))
        total = keep + len(steps)
        if keep < self._count or total > len(self._steps):
            self._move(keep, total)
        self._steps[keep:total] = steps
        for name in self._names:
            values = [getattr(row, name) for row in rows]
            column = self._values.get(name)
            if column is None:
                if all(value is None for value in values):
                    continue
                column = self._values[name] = np.full(len(self._steps), np.nan, np.float32)
            column[keep:total] = _floats(values)
        self._count = total

    def cut(self, step: int) -> None:
        """Forget the rows from `step` on."""
        keep = int(np.searchsorted(self._steps[: self._count], step))
        if keep < self._count:
            self._move(keep, keep)
            self._count = keep

    def snapshot(self) -> Series:
        return Series(
            self._steps[: self._count], {name: values[: self._count] for name, values in self._values.items()}
        )

    def _move(self, keep: int, needed: int) -> None:
        """Into new arrays, half as large again as needed: earlier snapshots share the old ones."""
        room = needed + needed // 2 + 64
        for name, old in [("", self._steps), *self._values.items()]:
            new = np.full(room, 0 if name == "" else np.nan, old.dtype)
            new[:keep] = old[:keep]
            if name:
                self._values[name] = new
            else:
                self._steps = new


class Reader:
    """One metrics.jsonl, read on from where the last reading ended: whole lines only. A file that was replaced, cut
    short or rewritten is read anew. After a resume the steps after the checkpoint are logged again: the attempt that
    came later counts, and of one step the last row."""

    def __init__(self, path: Path):
        self._path = path
        self._life = 0
        self._reset()

    @property
    def held(self) -> int:
        return self._trained.held + self._evaluated.held

    def read(self) -> Curves:
        """Raises OSError where the file is there and cannot be read."""
        try:
            with self._path.open("rb") as file:
                if not self._is_the_same(file):
                    self._reset()
                    self._inode = os.fstat(file.fileno()).st_ino
                for piece in self._pieces(file):
                    self._take(piece)
        except FileNotFoundError:
            if self._offset:
                self._reset()
        mark = f"{self._inode}.{self._life}.{self._offset}"
        return Curves(self._trained.snapshot(), self._evaluated.snapshot(), tuple(self._resumed), mark)

    def _reset(self) -> None:
        self._life += 1
        self._inode = 0
        self._offset = 0
        self._seal = b""
        self._attempt: int | None = None
        self._resumed: list[int] = []
        self._trained = _Columns(TRAINED)
        self._evaluated = _Columns(EVALUATED)

    def _is_the_same(self, file: BinaryIO) -> bool:
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._offset:
            return False
        return os.pread(file.fileno(), len(self._seal), self._offset - len(self._seal)) == self._seal

    def _pieces(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole lines that were not read yet, PIECE_BYTES at a time."""
        while data := os.pread(file.fileno(), PIECE_BYTES, self._offset):
            end = data.rfind(b"\n") + 1
            if not end and len(data) <= ROW_BYTES:
                return  # a row that is being written
            piece = data[: end or len(data)]
            self._offset += len(piece)
            self._seal = piece[-SEAL_BYTES:]
            yield piece

    def _take(self, piece: bytes) -> None:
        rows = [row for row in _decoded(piece) if row.step is not None]
        begin = 0
        for index in range(1, len(rows) + 1):
            if index == len(rows) or rows[index].attempt != rows[begin].attempt:
                self._take_attempt(rows[begin:index])
                begin = index

    def _take_attempt(self, rows: list[_Row]) -> None:
        first = rows[0]
        if first.attempt != self._attempt:
            assert first.step is not None
            if self._attempt is not None:
                # What the attempt before did beyond this was lost with it. An evaluation follows its step's own row.
                self._trained.cut(first.step + (first.loss is None))
                self._evaluated.cut(first.step)
                self._resumed = [step for step in self._resumed if step < first.step] + [first.step]
            self._attempt = first.attempt
        _add(self._trained, [row for row in rows if row.loss is not None])
        _add(self._evaluated, [row for row in rows if row.eval_loss is not None])


class Cache:
    """The curves of runs, by the path of their metrics; those asked for last are kept, up to `limit` bytes of arrays.
    Safe to ask from several threads."""

    def __init__(self, limit: int = CACHE_BYTES):
        self._limit = limit
        self._lock = threading.Lock()
        self._readers: OrderedDict[Path, tuple[threading.Lock, Reader]] = OrderedDict()

    def read(self, metrics: Path) -> Curves:
        with self._lock:
            lock, reader = self._readers.setdefault(metrics, (threading.Lock(), Reader(metrics)))
            self._readers.move_to_end(metrics)
        with lock:
            curves = reader.read()
        with self._lock:
            while len(self._readers) > 1 and self.held > self._limit:
                self._readers.popitem(last=False)
        return curves

    @property
    def held(self) -> int:
        return sum(reader.held for _, reader in self._readers.values())


def smooth(values: Floats, weight: float) -> Floats:
    """The exponential moving average with its start corrected, as TensorBoard's slider does it (tf-scalar-dashboard,
    resmoothDataset): s = w·s + (1-w)·x, shown as s / (1 - w^n) after n finite values. weight: from 0, under 1. Values
    that are not finite count for nothing and stay as they are. Same length, float32."""
    if not 0 <= weight < 1:
        raise ValueError(f"weight {weight} is not from 0 to under 1")
    finite = np.isfinite(values)
    known = values[finite].astype(np.float64)
    result = values.astype(np.float32)
    if weight and len(known):
        averaged = _averaged(known, weight)
        # Beyond that weight^n is nothing even in double precision, and powers are dear.
        young = min(len(known), math.ceil(math.log(1e-17) / math.log(weight)))
        averaged[:young] /= 1 - weight ** np.arange(1.0, young + 1)
        result[finite] = averaged
    return result


def _averaged(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """s[i] = weight·s[i-1] + (1-weight)·values[i], from s[-1] = 0."""
    # The sum over the last n values gives that over 2n: so a dozen passes, and none where a weight is nothing any more.
    result, reach = values * (1 - weight), 1
    while reach < len(result) and (power := weight**reach) > 1e-17:
        result[reach:] += power * result[:-reach]
        reach *= 2
    return result


def thin(values: Floats, points: int) -> NDArray[np.intp]:
    """Indices, in order, of at most `points` (10 or more) values that draw the same picture: of each bucket its lowest
    and its highest, where it has any one that is no finite number, and the first and the last of all.

    Lowest and highest rather than largest-triangle-three-buckets, since a single wild step must never go unseen. A
    bucket's length is a power of two, so that points stay where they are while a run grows, and halve in number only
    as its length doubles."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    odd = ~np.isfinite(values)
    # First, last, and three or two a bucket.
    buckets = (points - 2) // (3 if odd.any() else 2)
    size = 1
    while -(-count // size) > buckets:
        size *= 2
    whole = -(-count // size) * size
    chosen = [np.array([0, count - 1])]
    for worst, best in ((np.inf, np.argmin), (-np.inf, np.argmax)):
        padded = np.full(whole, worst, np.float32)
        padded[:count] = np.where(odd, worst, values)
        chosen.append(best(padded.reshape(-1, size), axis=1) + np.arange(0, whole, size))
    if odd.any():
        padded_odd = np.zeros(whole, bool)
        padded_odd[:count] = odd
        table = padded_odd.reshape(-1, size)
        chosen.append((np.argmax(table, axis=1) + np.arange(0, whole, size))[table.any(axis=1)])
    picked = np.unique(np.concatenate(chosen))
    return picked[picked < count]


def course(values: Floats, points: int) -> tuple[NDArray[np.intp], Floats]:
    """Where a smoothed line goes, in at most `points` (2 or more): the mean of each bucket's finite values, nan where
    it has none, and the index of its last value. For a line whose peaks are another's to show: highest and lowest of
    a smoothed line would be a band again. Buckets are thin's."""
    count = len(values)
    if count <= points:
        return np.arange(count), values
    size = 1
    while -(-count // size) > points:
        size *= 2
    whole = -(-count // size) * size
    padded = np.zeros(whole)
    finite = np.zeros(whole, bool)
    finite[:count] = np.isfinite(values)
    padded[:count] = np.where(finite[:count], values, 0)
    known = finite.reshape(-1, size).sum(axis=1)
    total = padded.reshape(-1, size).sum(axis=1)
    means = np.divide(total, known, out=np.full(len(known), np.nan), where=known > 0)
    return np.minimum(np.arange(size - 1, whole, size), count - 1), means.astype(np.float32)


def _decoded(piece: bytes) -> list[_Row]:
    try:
        return _decoder.decode_lines(piece)
    except msgspec.MsgspecError:
        pass
    rows = []
    for line in piece.split(b"\n"):
        try:
            rows.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # torn, or no row of training
    return rows


def _add(columns: _Columns, rows: list[_Row]) -> None:
    if not rows:
        return
    steps: Any = np.array([row.step for row in rows], np.int64)
    if len(rows) > 1 and not (np.diff(steps) > 0).all():
        # Within one attempt a step is logged once; should it not be, the last row counts.
        last = {row.step: row for row in rows}
        rows = [last[step] for step in sorted(last)]  # type: ignore[type-var]
        steps = np.array([row.step for row in rows], np.int64)
    columns.append(steps.astype(np.int32), rows)


def _floats(values: list[Any]) -> Floats:
    try:
        return np.array(values, np.float64).astype(np.float32)
    except (ValueError, TypeError, OverflowError):
        return np.array([_float(value) for value in values], np.float64).astype(np.float32)


def _float(value: Any) -> float:
    try:
        return float("nan" if value is None else value)
    except ValueError:
        return float("nan")
