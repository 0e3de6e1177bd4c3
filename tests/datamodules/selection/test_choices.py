"""Which candidates the rules choose, from numbers alone."""

import numpy as np
import pytest

from longrl.datamodules.selection.frame_similarity import covering_indices, top_indices
from longrl.datamodules.selection.pixel_changes import equal_motion, scene_middles

PLACES = np.arange(200)
SCORES = np.round(0.2 + 0.05 * np.sin(PLACES * PLACES / 7) + 0.3 * np.exp(-((PLACES - 137.0) ** 2) / 8), 4)
AKS = {
    (32, 0.8, 5): [
        3, 10, 12, 19, 25, 32, 41, 47, 54, 56, 63, 69, 76, 85, 91, 95, 103, 108, 117, 120, 130, 136, 138, 147, 155,
        156, 167, 174, 176, 185, 189, 198,
    ],
    (8, 0.8, 3): [10, 47, 69, 85, 117, 138, 155, 176],
    (8, 0.3, 3): [133, 134, 135, 136, 137, 138, 139, 140],
}  # fmt: skip
"""Frames, threshold and depth -> what `frame_select.py` of github.com/ncTimTang/AKS (4667501) chooses by `SCORES`."""


@pytest.mark.parametrize("asked", AKS)
def test_coverage_chooses_what_the_released_code_of_aks_does(asked):
    assert covering_indices(SCORES, *asked) == AKS[asked]


def test_coverage_gives_as_many_as_asked_where_the_released_code_gives_fewer():
    rng = np.random.default_rng(0)
    for count, length in [(1, 1), (3, 3), (5, 7), (13, 40), (50, 64), (64, 64)]:
        for scores in (rng.normal(size=length), np.zeros(length)):
            chosen = covering_indices(scores, count, 0.8, 5)
            assert len(set(chosen)) == count
            assert chosen == sorted(chosen)
            assert chosen[-1] < length
    assert covering_indices(SCORES, 4, 0.8, 0) == top_indices(SCORES, PLACES, 4)


def test_of_neighbours_the_best_is_shown_before_others_and_of_equals_the_earlier():
    scores, times = np.array([1.0, 3.0, 3.0, 2.0, 0.0, 1.0]), np.arange(6) / 2
    assert top_indices(scores, times, 3) == [1, 2, 3]
    assert top_indices(scores, times, 3, min_gap_s=0.9) == [1, 3, 5]
    assert top_indices(scores, times, 4, min_gap_s=0.9) == [1, 2, 3, 5]  # no other is far enough


def test_the_largest_changes_cut_a_video_and_the_middle_of_each_part_is_shown():
    changes = np.array([0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 7.0, 1.0])  # parts 0-2, 3-6, 7-8
    assert scene_middles(changes, 3) == [1, 4, 7]
    assert scene_middles(changes, 9) == [*range(9)]
    assert scene_middles(changes, 1) == [4]


def test_where_more_moves_more_is_shown_and_where_nothing_does_time_decides():
    changes = np.array([0.0] * 10 + [5.0] * 10)
    assert [index for index in equal_motion(changes, 6, 0.0) if index <= 10] == []
    assert len([index for index in equal_motion(changes, 6, 0.8) if index <= 10]) == 3
    assert equal_motion(np.zeros(10), 3, 0.0) == [1, 5, 9]
