"""Errors of one rank are errors of all: nobody waits for a rank that has failed."""

import pytest

from longrl.strategies.axis import SINGLE_RANK, world_axis
from tests.distributed import run_distributed


def fail_on_the_second() -> None:
    if world_axis().rank == 1:
        raise ValueError("no memory left")


def one_of_two() -> None:
    axis = world_axis()
    reached = []
    with axis.raise_on_any_rank():
        reached.append(axis.rank)
    assert reached == [axis.rank]
    with pytest.raises((ValueError, RuntimeError)) as caught, axis.raise_on_any_rank():
        fail_on_the_second()
    assert str(caught.value) == ("no memory left" if axis.rank else "rank 1: ValueError('no memory left')")
    assert axis.gather(axis.rank) == [0, 1]  # and still in step


def test_an_error_of_one_rank_is_raised_on_all():
    run_distributed(one_of_two, 2)


def test_a_rank_alone_just_works():
    with SINGLE_RANK.raise_on_any_rank():
        fail_on_the_second()
    with pytest.raises(ZeroDivisionError), SINGLE_RANK.raise_on_any_rank():
        _ = 1 // 0
