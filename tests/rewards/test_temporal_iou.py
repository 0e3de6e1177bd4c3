"""Intervals of time and their overlap."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.temporal_iou import interval_iou, temporal_iou, temporal_iou_lenient
from longrl.rewards.time_intervals import Interval
from longrl.types import Completion, Row


def test_iou_by_hand():
    assert interval_iou([Interval(0, 10)], [Interval(5, 15)]) == pytest.approx(5 / 15)
    assert interval_iou([Interval(0, 10)], [Interval(0, 10)]) == 1.0
    assert interval_iou([Interval(0, 1)], [Interval(2, 3)]) == 0.0
    assert interval_iou([Interval(0, 4), Interval(2, 6), Interval(8, 10)], [Interval(5, 9)]) == pytest.approx(2 / 10)
    assert interval_iou([], []) == 0.0


SPANS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 20)).map(lambda t: Interval(t[0], t[0] + t[1])), max_size=4
)


@given(SPANS, SPANS)
def test_iou_equals_counting_whole_seconds(first, second):
    def seconds(spans):
        return {s for span in spans for s in range(int(span.start_s), int(span.stop_s))}

    union = seconds(first) | seconds(second)
    expected = len(seconds(first) & seconds(second)) / len(union) if union else 0.0
    assert interval_iou(first, second) == pytest.approx(expected)


def test_the_reward_reads_the_answer_tag_and_lenient_the_rest():
    row = Row(id="1", problem="When?", answer="0:10-0:20", task="temporal_iou")
    tagged = Completion((), (), "<answer>15 to 25 s</answer>", "stop")
    bare = Completion((), (), "<think>0 to 99 s</think>15 to 25 s", "stop")
    assert temporal_iou(tagged, row) == pytest.approx(5 / 15)
    assert temporal_iou(bare, row) == 0.0
    assert temporal_iou_lenient(bare, row) == pytest.approx(5 / 15)


def test_a_row_without_an_interval_is_an_error_with_the_remedy():
    row = Row(id="9", problem="When?", answer="20 to 10", task="temporal_iou")
    with pytest.raises(ValueError, match=r"row '9'.*got '20 to 10'; write it as"):
        temporal_iou(Completion((), (), "<answer>1-2</answer>", "stop"), row)
