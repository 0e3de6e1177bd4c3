"""Clustered intervals against what they stand for: a bootstrap over videos, and how often they hold the truth."""

import numpy as np
import pytest

from longrl.evaluation.scoring import paired_difference, score
from tests.evaluation.test_scores import record

NUM_VIDEOS = 150


def clustered_answers(rng, num_videos=NUM_VIDEOS, spread=1.5):
    """[n] right or wrong and the video of each: 1 to 9 questions per video, alike within a video."""
    sizes = rng.integers(1, 10, num_videos)
    chance = 1 / (1 + np.exp(-0.4 - spread * rng.standard_normal(num_videos)))
    videos = np.repeat(np.arange(num_videos), sizes)
    return (rng.random(len(videos)) < chance[videos]).astype(float), videos


def bootstrap(values, videos, rng, draws=4000):
    """95% percentile interval of the mean over questions when whole videos are drawn again."""
    count = videos.max() + 1
    sums, sizes = np.bincount(videos, values, count), np.bincount(videos, minlength=count)
    drawn = rng.integers(0, count, (draws, count))
    return np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))


@pytest.mark.parametrize("seed", range(4))
def test_a_clustered_interval_is_that_of_a_bootstrap_over_videos(seed):
    rng = np.random.default_rng(seed)
    values, videos = clustered_answers(rng)
    found, (low, high) = score(values.tolist(), videos.tolist()), bootstrap(values, videos, rng)
    width = high - low
    assert abs(found.cluster_low - low) < 0.1 * width
    assert abs(found.cluster_high - high) < 0.1 * width
    assert (found.high - found.low) < 0.85 * width  # what it would be if questions were independent


@pytest.mark.parametrize("seed", range(4))
def test_a_paired_interval_is_that_of_a_bootstrap_over_videos(seed):
    rng = np.random.default_rng(100 + seed)
    before, videos = clustered_answers(rng)
    flips = (rng.random(NUM_VIDEOS) < 0.3)[videos] & (rng.random(len(videos)) < 0.7)
    after = np.where(flips, 1.0, before)
    first, second = (
        [record(str(n), bool(value), video=str(videos[n])) for n, value in enumerate(values)]
        for values in (before, after)
    )
    found, (low, high) = paired_difference(first, second), bootstrap(after - before, videos, rng)
    assert abs(found.low - low) < 0.1 * (high - low)
    assert abs(found.high - high) < 0.1 * (high - low)


def test_a_clustered_interval_holds_the_truth_as_often_as_it_says():
    """Over 400 benchmarks of 60 videos: 95%, give or take three standard errors; the plain interval does not."""
    rng = np.random.default_rng(0)
    truth = np.mean([clustered_answers(rng, 20_000)[0].mean() for _ in range(5)])
    held = {"clustered": 0, "plain": 0}
    for _ in range(400):
        found = score(*(array.tolist() for array in clustered_answers(rng, 60)))
        held["clustered"] += found.cluster_low <= truth <= found.cluster_high
        held["plain"] += found.low <= truth <= found.high
    assert 0.917 <= held["clustered"] / 400 <= 0.983
    assert held["plain"] / 400 < 0.91
