"""Curves in one line of text."""

import math

import pytest

from longrl.evaluation.sparklines import ASCII_BLOCKS, MAX_POINTS, Curve, sparkline


def test_heights_go_from_the_least_to_the_largest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, ASCII_BLOCKS) == ASCII_BLOCKS
    assert sparkline([7, 0], 8, ASCII_BLOCKS) == "#_"
    assert sparkline([3.0, 3.0], 8) == "\u2581\u2581"
    assert sparkline([], 8) == ""
    assert sparkline([1.0], 0) == ""
    assert sparkline([-1e308, 1e308], 2, ASCII_BLOCKS) == "_#"


def test_more_points_than_characters_are_averaged():
    assert sparkline([0, 2, 8, 8, 0, 0], 3, ASCII_BLOCKS) == ".#_"


def test_a_long_curve_is_halved_and_keeps_its_mean():
    curve = Curve()
    for value in range(1000):
        curve.add(float(value))
    assert len(curve.points) < MAX_POINTS
    assert curve.stride == 8
    assert (curve.first, curve.last) == (0.0, 999.0)
    assert curve.values()[0] == pytest.approx(3.5)  # the mean of 0 to 7
    assert sum(curve.values()) / len(curve.values()) == pytest.approx(499.5)


def test_a_curve_goes_on_from_its_state_and_leaves_out_what_is_no_number():
    curve, restored = Curve(), Curve()
    for value in [math.nan, *map(float, range(250))]:
        curve.add(value)
    restored.load_state_dict(curve.state_dict())
    for one in (curve, restored):
        one.add(math.inf)
        one.add(7.0)
    assert restored.values() == curve.values()
    assert (restored.first, restored.last) == (0.0, 7.0)
