"""Intervals of time and their overlap."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.temporal_iou import interval_iou, temporal_iou, temporal_iou_lenient
from longrl.rewards.time_intervals import Interval, parse_intervals
from longrl.types import Completion, Row


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("12.5 to 20 s", (12.5, 20)),
        ("12-20", (12, 20)),
        ("12.5s\u201320s", (12.5, 20)),
        ("from 12 seconds until 20 seconds", (12, 20)),
        ("between 12 and 20 seconds", (12, 20)),
        ("[12.5, 20.0]", (12.5, 20)),
        ("0:12-0:20", (12, 20)),
        ("00:12 --> 00:20.5", (12, 20.5)),
        ("1:02:03 - 1:04:00", (3723, 3840)),
        ("75:00 to 76:30", (4500, 4590)),
        ("2 to 3 minutes", (120, 180)),
        ("90 s to 2 min", (90, 120)),
        ("2 min 5 s to 3 min", (125, 180)),
        ("1 h 2 min to 1 h 3 min", (3720, 3780)),
        ("0:50 to 70 s", (50, 70)),
    ],
)
def test_an_interval_is_read_in_seconds(text, interval):
    assert parse_intervals(f"It happens {text}.") == [interval]


@pytest.mark.parametrize("text", ["", "12", "20 to 12", "12 to 12", "at 12 s", "A to B", "twelve to twenty"])
def test_what_is_no_interval_is_left_out(text):
    assert parse_intervals(text) == []


def test_several_intervals_are_read_in_order():
    assert parse_intervals("0:12-0:20 and 30 to 40 s") == [(12, 20), (30, 40)]


@given(st.text(alphabet="0123456789:.-, tosmin[]()") | st.text())
def test_any_text_gives_ordered_intervals(text):
    assert all(0 <= interval.start_s < interval.stop_s for interval in parse_intervals(text))


def mmss(seconds: int) -> str:
    return f"{seconds // 60}:{seconds % 60:02}"


@given(start=st.integers(0, 5000), length=st.integers(1, 900), form=st.sampled_from(["seconds", "clock", "bracket"]))
def test_a_written_interval_is_read_back(start, length, form):
    stop = start + length
    text = {
        "seconds": f"{start} to {stop} seconds",
        "clock": f"{mmss(start)}-{mmss(stop)}",
        "bracket": f"[{start}, {stop}]",
    }[form]
    assert parse_intervals(text) == [(start, stop)]


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
