"""One training in several processes, a GPU each. All of them read the same steps; of each step a process looks at its
share, and the gradients are added up before the optimiser goes on, so that all hold the same weights. The first one
leads: it reports, keeps and writes, and the others follow. Starting the others is jobs.following's.

Not through torch's DistributedDataParallel, as accelerate would have it: there batches are cut by position, the last is
filled up with repeated examples, and means over unequal numbers of tokens are averaged. The steps would no longer be
the recipe's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

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
    """Within, `total` adds up over the processes; entering waits for all of them. One that leaves by an error does not
    wait for the others, who may be waiting for it: its process must end."""
    if rank.of == 1:
        yield
        return
    import torch

    cuda = torch.cuda.is_available()

    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{rank.meeting}",
        rank=rank.index,
        world_size=rank.of,
        timeout=PATIENCE,
    )
    # NCCL connects and takes its memory at the first sum: now, before a training fills the card.
    total(torch.zeros(1, device="cuda" if cuda else "cpu"))
    try:
        yield
    except Stopped:
        # All stop at the same step.
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def total(values: Any) -> Any:
    """A tensor of this process → the sum of all processes' ones, in its place and the same in each to the last bit."""
    import torch

    torch.distributed.all_reduce(values)
    return values


def share(units: Sequence[T], size: Callable[[T], int], rank: Rank) -> list[T]:
    """Those of a step's units that are this process's: of alike sizes in all, whoever asks. Some may get none."""
    shares: list[list[T]] = [[] for _ in range(rank.of)]
    sizes = [0] * rank.of
    for unit in sorted(units, key=size, reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(unit)
        sizes[least] += size(unit)
    return shares[rank.index]
