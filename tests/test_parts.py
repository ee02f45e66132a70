"""The parts of a stage, several of them at work at once: what a person is told, and what each took."""

import pytest

from katherine.parts import Parts, named
from katherine.progress import Quiet, Stopped


class Told(Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int, int]] = []

    def step(self, step: int, of: int) -> None:
        self.said.append((self.phases[-1], step, of))


def test_one_part_tells_its_own_steps():
    told = Told()
    parts = Parts(told)
    with parts.part("merge") as part:
        part.step(1, 4)
        part.step(4, 4)
    assert told.said == [("merge", 1, 4), ("merge", 4, 4)] and list(parts.seconds) == ["merge"]


def test_several_tell_the_share_of_their_work_that_is_done():
    told = Told()
    parts = Parts(told)
    with parts.part("quantise q4_k_m") as first:
        first.step(100, 200)
        with parts.part("quantise q6_k") as second:
            # A part that has told nothing yet has done nothing.
            assert told.said[-1] == ("quantise q4_k_m, q6_k", 25, 100)
            second.step(3, 4)
            assert told.said[-1] == ("quantise q4_k_m, q6_k", 62, 100)
        # Alone again, it goes on in its own steps.
        assert told.said[-1] == ("quantise q4_k_m", 100, 200)
    assert list(parts.seconds) == ["quantise q6_k", "quantise q4_k_m"]


def test_works_are_named_once_with_all_that_they_are_done_to():
    assert named(["quantise q4_k_m", "check bf16", "quantise q6_k", "measure"]) == (
        "quantise q4_k_m, q6_k; check bf16; measure"
    )


def test_given_up_every_part_is_asked_to_stop_and_none_begins():
    parts = Parts(Quiet())
    with parts.part("merge") as part:
        assert not part.stop_requested()
        parts.give_up()
        assert part.stop_requested()
    with pytest.raises(Stopped), parts.part("convert"):
        raise AssertionError("it began")


def test_a_part_that_fails_has_no_time_and_is_no_longer_named():
    told = Told()
    parts = Parts(told)
    with parts.part("merge"):
        with pytest.raises(ValueError, match="broken"), parts.part("convert"):
            raise ValueError("broken")
        assert told.phases[-1] == "merge"
    assert list(parts.seconds) == ["merge"]
