"""Timelines of steps: shares worked out by hand, and files that a killed run left."""

import itertools
import json
import random

import pytest

from longrl.evaluation.staleness_chart import means_by_age, plot_staleness
from longrl.evaluation.timeline import (
    FILE,
    MAX_SPANS,
    busy_shares,
    exclusive_phases,
    read_timeline,
    step_timeline,
    timeline_line,
    union,
    without,
)
from longrl.evaluation.timeline_chart import plot_timeline


def test_times_are_joined_and_cut_out():
    assert union([(3, 4), (0, 1), (1, 2), (5, 5)]) == [(0, 2), (3, 4)]
    assert without([(0, 10)], [(2, 3), (2.5, 4), (9, 12)]) == [(0, 2), (4, 9)]
    assert without([(0, 1)], []) == [(0, 1)]


def test_a_phase_within_another_counts_alone():
    """A checkpoint from 0 to 4 waits for a rollout from 1 to 3."""
    found = exclusive_phases([("generate", 1, 3), ("save", 0, 4)])
    assert found == [("save", 0, 1), ("generate", 1, 3), ("save", 3, 4)]


def test_without_a_count_of_requests_the_engine_is_busy_where_the_trainer_waits():
    found = step_timeline(1, 10.0, [("generate", 2.0, 6.0), ("update", 6.0, 9.0)], None)
    assert found.engine == [(2.0, 6.0, 1.0)]
    assert (found.trainer_busy, found.engine_busy, found.both_idle) == pytest.approx((0.6, 0.4, 0.0))
    assert not found.is_counted


def test_a_rollout_beside_the_update_makes_the_engine_busy():
    """From 4 s on for the next step; the first second waits for the one begun in the step before."""
    found = step_timeline(2, 10.0, [("generate", 0.0, 1.0), ("update", 5.0, 10.0)], None, [(-3.0, 1.0), (4.0, 12.0)])
    assert found.engine == [(0.0, 1.0, 1.0), (4.0, 10.0, 1.0)]
    assert (found.trainer_busy, found.engine_busy, found.both_idle) == pytest.approx((0.9, 0.7, 0.0))


def test_counted_requests_say_where_both_are_idle():
    """The trainer waits from 0 to 4; the engine has nothing from 1 to 3."""
    requests = [(-2.0, 1.0, 8), (1.0, 3.0, 0), (3.0, 8.0, 2)]
    found = step_timeline(1, 8.0, [("generate", 0.0, 4.0)], requests)
    assert found.engine == [(0.0, 1.0, 8), (3.0, 8.0, 2)]
    assert (found.trainer_busy, found.engine_busy, found.both_idle) == pytest.approx((0.5, 0.75, 0.25))
    assert found.is_counted


def test_many_changes_become_means_over_parts_of_the_step():
    draw = random.Random(0)
    times = sorted(draw.uniform(0, 10) for _ in range(3001))
    spans = [(start, stop, draw.randint(1, 9)) for start, stop in itertools.pairwise(times)]
    found = step_timeline(1, 10.0, [], spans)
    assert len(found.engine) <= MAX_SPANS
    work = sum((stop - start) * requests for start, stop, requests in spans)
    assert sum((stop - start) * requests for start, stop, requests in found.engine) == pytest.approx(work)
    assert found.engine_busy == pytest.approx((times[-1] - times[0]) / 10)


def test_shares_of_several_steps_are_by_their_seconds():
    steps = [step_timeline(1, 1.0, [("generate", 0.0, 1.0)], None), step_timeline(2, 3.0, [("update", 0.0, 3.0)], None)]
    found = busy_shares(steps)
    assert (found.trainer, found.engine, found.both_idle, found.seconds) == (0.75, 0.25, 0.0, 4.0)
    assert str(busy_shares([]).trainer) == "nan"


def test_a_file_is_read_whatever_killed_the_run(tmp_path):
    assert read_timeline(tmp_path) == []
    steps = [
        step_timeline(step, 2.0, [("update", 0.0, 1.23456)], [(0.0, 1.0, 3)], lengths=[[5, 6]], prompt_tokens=7.5)
        for step in (1, 2, 2, 3)
    ]
    lines = [timeline_line(step) for step in steps]
    spoiled = [
        "no json",
        "[1]",
        json.dumps({"step": 9}),
        lines[0].replace("1.2346", "NaN"),
        lines[0].replace("2.0", '"long"'),
        lines[0].replace("[5,6]", "5"),
        lines[0].replace('"update"', "[1]"),
        lines[0].replace('"ranks":1', '"ranks":"all"'),
        lines[3][:-9],
    ]
    (tmp_path / FILE).write_text("\n".join([*lines, *spoiled]))
    found = read_timeline(tmp_path)
    assert [step.step for step in found] == [1, 2, 3]
    assert found[0].lengths == [[5, 6]]
    assert found[0].trainer == [["update", 0.0, 1.2346]]
    assert found[0].is_counted
    assert found[0].prompt_tokens == 7.5


def test_the_last_steps_are_drawn_to_one_scale():
    steps = [
        step_timeline(step, float(step), [("generate", 0.0, 0.5), ("mine", 0.5, 1.0)], None) for step in range(1, 5)
    ]
    figure = plot_timeline(steps, last=3)
    axes = figure.axes[0]
    assert axes.get_xlim() == (0, 2 + 3 + 4)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["step 2", "step 3", "step 4"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["generate (waits)", "other", "engine busy"]
    assert plot_timeline([]) is None


def test_ages_of_tokens_are_means_over_the_last_steps_in_order():
    shares = {f"rollout/staleness_share_{age}": dict.fromkeys(range(60), age / 10) for age in (2, 10, 0)}
    shares["rollout/staleness_share_2"] |= dict.fromkeys(range(10), 99.0)  # long ago
    assert means_by_age(shares, "rollout/staleness_share_") == pytest.approx({0: 0.0, 2: 0.2, 10: 1.0})
    left, right = plot_staleness(shares).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([0, 20, 100])
    assert not right.patches
    assert plot_staleness({"reward/mean": {0: 1.0}}) is None
