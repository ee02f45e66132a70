import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from katherine import telemetry
from katherine.errors import SetupError
from katherine.gpu import GpuReading
from katherine.telemetry import Reading, Watch, diagnosis

H200 = GpuReading(
    index=0,
    name="NVIDIA H200",
    driver="580.159.04",
    cuda="13.0",
    compute_capability="9.0",
    memory_total=150_754_820_096,
    memory_used=5_375_852_544,
    utilisation=0,
    power=122.8,
    power_limit=700.0,
)
# Percent and watts as an H200 gave them, two seconds apart: nothing to do; matrices multiplied without a pause, the
# first reading from before it began; vectors as large as its memory; one kernel on one of its 132 processors.
IDLE = [(0, 122.3), (3, 122.8), (0, 123.5)]
MATRICES = [(0, 122.8), (99, 690.2), (99, 687.2), (99, 690.1), (99, 691.9), (99, 690.1), (99, 689.6), (100, 691.6)]
VECTORS = [(100, 586.0), (100, 585.2), (99, 585.4), (99, 584.5), (99, 584.6), (100, 585.8), (100, 584.8)]
STARVED = [(100, 125.4), (100, 124.2), (100, 123.8), (100, 123.8), (100, 124.3), (100, 124.1), (100, 124.0)]


def recorded(
    figures: list[tuple[int, float]], seconds: float = 70, in_use: Iterable[int] = (0, 1), **card: object
) -> list[Reading]:
    """The figures over and over, one every two seconds, for `seconds`."""
    return [
        Reading(
            at=1000.0 + 2 * i,
            cards=(
                replace(H200, utilisation=figures[i % len(figures)][0], power=figures[i % len(figures)][1], **card),
            ),
            in_use=frozenset(in_use),
        )
        for i in range(int(seconds / 2) + 1)
    ]


@pytest.mark.parametrize("figures", [IDLE, MATRICES[1:], VECTORS])
def test_a_card_that_rests_or_works_is_in_order(figures):
    assert diagnosis(recorded(figures)) is None


def test_full_load_at_a_sixth_of_the_power_for_a_minute_looks_shared():
    found = diagnosis(recorded(STARVED))
    assert found is not None and "looks shared" in found and "125 of 700 W" in found


def test_less_than_a_minute_of_it_says_nothing():
    assert diagnosis(recorded(STARVED, seconds=58)) is None
    assert diagnosis(recorded(STARVED, seconds=60)) is not None


def test_one_reading_at_work_within_the_minute_clears_the_pod():
    readings = recorded(STARVED)
    strong = replace(readings[20], cards=(replace(readings[20].cards[0], power=640.0),))
    assert diagnosis([*readings[:20], strong, *readings[21:]]) is None
    paused = replace(readings[20], cards=(replace(readings[20].cards[0], utilisation=41),))
    assert diagnosis([*readings[:20], paused, *readings[21:]]) is None


def test_a_card_that_starts_to_work_is_not_shared():
    assert diagnosis(recorded(IDLE) + [replace(r, at=r.at + 72) for r in recorded(MATRICES, seconds=14)]) is None


def test_an_idle_card_is_not_shared_and_a_busy_one_without_our_work_is_somebody_elses():
    assert diagnosis(recorded(IDLE, in_use=())) is None
    for figures in (STARVED, MATRICES[1:]):
        found = diagnosis(recorded(figures, in_use=()))
        assert found is not None and "nothing of this panel" in found and "looks shared" not in found


def test_a_run_that_began_within_the_minute_is_blamed_for_nothing_yet():
    readings = recorded(STARVED)
    assert diagnosis([replace(r, in_use=frozenset([0] if i > 20 else [])) for i, r in enumerate(readings)]) is None


def test_a_gap_in_the_readings_makes_it_unknown():
    readings = recorded(STARVED)
    assert diagnosis(readings[:10] + readings[12:]) is not None
    assert diagnosis(readings[:10] + readings[14:]) is None


def test_a_card_that_reports_no_power_or_no_load_is_not_judged():
    silent = [replace(r, cards=(replace(r.cards[0], power=None),)) for r in recorded(STARVED)]
    assert diagnosis(silent) is None
    unlimited = recorded(STARVED, power_limit=None)
    assert diagnosis(unlimited) is None
    assert diagnosis([replace(r, cards=(replace(r.cards[0], utilisation=None),)) for r in recorded(STARVED)]) is None
    assert diagnosis([]) is None
    assert diagnosis([replace(r, cards=()) for r in recorded(STARVED)]) is None


def test_of_several_cards_the_one_in_trouble_is_named():
    other = replace(H200, index=1, name="NVIDIA H100 PCIe", utilisation=100, power=80.0, power_limit=350.0)
    readings = [replace(r, cards=(*r.cards, other)) for r in recorded(MATRICES[1:])]
    found = diagnosis(readings)
    assert found is not None and "NVIDIA H100 PCIe" in found and "80 of 350 W" in found
    # A run of ours on the one does not explain what keeps the other busy.
    found = diagnosis([replace(r, in_use=frozenset([0])) for r in readings])
    assert found is not None and "NVIDIA H100 PCIe" in found and "nothing of this panel" in found


def test_memory_is_tight_only_near_the_end():
    assert not telemetry.memory_tight(H200)
    assert telemetry.memory_tight(replace(H200, memory_used=149_000_000_000))
    assert not telemetry.memory_tight(replace(H200, memory_used=None))


# ---------------------------------------------------------------------------------------------------------- the watch


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_the_watch_reads_until_it_is_stopped_and_keeps_a_bounded_history():
    cards = (H200, replace(H200, index=1))
    watch = Watch(read=lambda: list(cards), in_use=lambda index: index == 1, every=0.001)
    assert watch.latest() is None
    with watch:
        until(lambda: len(watch.history()) == 150)
        newest = watch.latest()
        assert newest is not None and newest.cards == cards and newest.in_use == {1}
        until(lambda: watch.history()[-1].at > newest.at)
    count, end = len(watch.history()), watch.history()[-1].at
    assert count == 150
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]
    assert watch.history()[-1].at == end


def test_it_can_be_started_again_and_twice_at_once_is_one_thread():
    watch = Watch(read=lambda: [], every=0.001)
    for _ in range(2):
        watch.start()
        watch.start()
        assert len([thread for thread in threading.enumerate() if thread.name == "telemetry"]) == 1
        watch.stop()
    watch.stop()


def test_a_driver_that_fails_is_a_reading_and_the_next_one_counts():
    answers: list[Exception | list[GpuReading]] = [
        SetupError("The NVIDIA driver does not answer: GPU is lost."),
        [H200],
    ]
    given = iter(answers)
    seen = []

    def read() -> list[GpuReading]:
        answer = next(given, [H200])
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = Watch(read=read, every=0.001)
    with watch:
        until(lambda: len(watch.history()) > 2)
        seen = watch.history()
    assert seen[0].error == "The NVIDIA driver does not answer: GPU is lost." and seen[0].cards == ()
    assert seen[1].error == "" and seen[1].cards == (H200,)


def test_a_driver_that_hangs_is_said_to_and_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(telemetry, "GAP", 0.05)
    hung = threading.Event()
    reads = []

    def read() -> list[GpuReading]:
        reads.append(1)
        if len(reads) > 1:
            hung.wait()
        return [H200]

    watch = Watch(read=read, every=0.01)
    with watch:
        until(lambda: bool((newest := watch.latest()) and newest.error))
        newest = watch.latest()
        assert newest is not None and "has not answered for" in newest.error and newest.cards == ()
    hung.set()


def test_a_machine_without_a_gpu_is_a_reading_without_cards():
    watch = Watch(read=lambda: [], every=0.001)
    with watch:
        until(lambda: watch.latest() is not None)
        newest = watch.latest()
    assert newest is not None and newest.cards == () and newest.error == ""
