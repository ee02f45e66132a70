"""One training in several processes, a GPU each. All of them read the same steps; of each step a process looks at its
share, and the gradients are added up before the optimiser goes on, so that all hold the same weights. The first one
leads: it reports, keeps and writes, and the others follow. Starting the others is jobs.following's.

accelerate holds them together, so that the trainers know of each other: it forms the group and adds up. How a step is
shared is our own. accelerate deals batches out, fills the last ones up with repeated examples and averages means over
unequal numbers of tokens: the steps would no longer be the recipe's."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from katherine.progress import Stopped

# Loading from a slow volume takes one process minutes longer than another; what is lost is noticed by its end.
PATIENCE = timedelta(minutes=20)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """This process's place among those of its training. meeting: a file of this machine by which they find another."""

    index: int = 0
    of: int = 1
    meeting: str = ""

    @property
    def leads(self) -> bool:
        return self.index == 0


ALONE = Rank()
_mine = ALONE


def enter(rank: Rank) -> None:
    """Says what this process is, before its work begins."""
    global _mine
    _mine = rank


def mine() -> Rank:
    return _mine


def undivided() -> Rank:
    """For a training that cannot be shared: its leader does it alone, and whoever follows ends here."""
    if not _mine.leads:
        raise SystemExit(0)
    return ALONE


@contextmanager
def together(rank: Rank) -> Iterator[None]:
    """Within, accelerate knows of all processes, and a trainer that is made there belongs to them; entering waits for
    all. One that leaves by an error does not wait for the others, who may be waiting for it: its process must end."""
    if rank.of == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    # Where accelerate looks, again when a trainer is made. LOCAL_RANK counts devices, of which each process sees one. A
    # processor it would call cpu:0, which torch.load does not know.
    of = str(rank.of)
    told = {"RANK": str(rank.index), "LOCAL_RANK": "0", "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of}
    os.environ |= told | {"ACCELERATE_TORCH_DEVICE": "cuda:0" if cuda else "cpu"}
    state = PartialState(
        cpu=not cuda,
        init_method=f"file://{rank.meeting}",
        rank=rank.index,
        world_size=rank.of,
        timeout=PATIENCE,
    )
    # NCCL connects and takes its memory at the first exchange: now, before a training fills the card.
    state.wait_for_everyone()
    try:
        yield
    except Stopped:
        # All stop at the same step.
        state.destroy_process_group()
        raise
    state.destroy_process_group()


def share(units: Sequence[T], size: Callable[[T], int], rank: Rank) -> list[T]:
    """Those of a step's units that are this process's: of alike sizes in all, whoever asks. Some may get none."""
    shares: list[list[T]] = [[] for _ in range(rank.of)]
    sizes = [0] * rank.of
    for unit in sorted(units, key=size, reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(unit)
        sizes[least] += size(unit)
    return shares[rank.index]
