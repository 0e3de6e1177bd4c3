"""Errors of one rank are errors of all: nobody waits for a rank that has failed."""

import pytest

from longrl.strategies.axis import SINGLE_RANK, world
from tests.distributed import run_distributed


def fails_on_the_second() -> int:
    if world().rank == 1:
        raise ValueError("no memory left")
    return 7


def one_of_two() -> None:
    axis = world()
    assert axis.raise_on_any_rank(lambda: axis.rank + 1) == axis.rank + 1
    with pytest.raises((ValueError, RuntimeError)) as caught:
        axis.raise_on_any_rank(fails_on_the_second)
    assert str(caught.value) == ("no memory left" if axis.rank else "rank 1: ValueError('no memory left')")
    assert axis.gather(axis.rank) == [0, 1]  # and still in step


def test_an_error_of_one_rank_is_raised_on_all():
    run_distributed(one_of_two, 2)


def test_a_rank_alone_just_works():
    assert SINGLE_RANK.raise_on_any_rank(fails_on_the_second) == 7
    with pytest.raises(ZeroDivisionError):
        SINGLE_RANK.raise_on_any_rank(lambda: 1 // 0)
