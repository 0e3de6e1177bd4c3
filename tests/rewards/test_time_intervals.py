"""Intervals of time in the wordings of grounding models."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.time_intervals import parse_intervals, read_times


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
        ("from the 12th second to the 20th second", (12, 20)),
        ("from the 1st to the 3rd minute", (60, 180)),
    ],
)
def test_an_interval_is_read_in_seconds(text, interval):
    assert parse_intervals(f"It happens {text}.") == [interval]


@pytest.mark.parametrize(
    "text", ["", "12", "20 to 12", "12,5 to 20,5 s", "12 to 12", "at 12 s", "A to B", "twelve to twenty"]
)
def test_what_is_no_interval_is_left_out(text):
    assert parse_intervals(text) == []


def test_several_intervals_are_read_in_order():
    assert parse_intervals("0:12-0:20 and 30 to 40 s") == [(12, 20), (30, 40)]
    assert parse_intervals("12-20,30-40,50 to 60") == [(12, 20), (30, 40), (50, 60)]


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


WORDINGS = {
    "Time-R1 and VideoChat-R1": "{a:.2f} to {b:.2f}",
    "VideoChat-R1, the other": "{a:.2f} and {b:.2f}",
    "VideoChat-R1's glue": "[({a}, {b})]",
    "TimeLens and Charades-STA": "The event happens in {a} - {b} seconds.",
    "Qwen3-VL's time marks": "From <{a:.1f} seconds> to <{b:.1f} seconds>.",
    "Qwen2.5-VL's JSON": '```json\n[{{"start": {a}, "end": {b}, "event": "a dog"}}]\n```',
    "Open-o3-Video": "From <t>{a}</t>s to <t>{b}</t>s",
    "sentences": "It starts at {a} seconds, when he sits, and ends at {b} seconds.",
    "lists": "- Start: {a} s\n- End: {b} s",
    "QVHighlights": "[[{a}, {b}]]",
}


@given(st.floats(0, 3000), st.floats(1, 600), st.sampled_from(sorted(WORDINGS)))
def test_the_wordings_of_published_prompts_are_read(start, length, name):
    a, b = round(start, 1), round(start + length, 1)
    ((start_s, stop_s),) = parse_intervals(WORDINGS[name].format(a=a, b=b))
    assert (start_s, stop_s) == pytest.approx((a, b))


@given(st.integers(0, 99_999_999), st.integers(1, 900_000))
def test_subtitles_are_read_to_the_millisecond(start_ms, length_ms):
    def stamp(ms: int) -> str:
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    ((start_s, stop_s),) = parse_intervals(f"{stamp(start_ms)} --> {stamp(start_ms + length_ms)}")
    assert (start_s, stop_s) == pytest.approx((start_ms / 1000, (start_ms + length_ms) / 1000))


@pytest.mark.parametrize(
    "text", ["frame 12 to frame 20", "12% to 20%", "2024-01-05", "12 to 20 people", "[12, 20, 30]", "from step 3 to 5"]
)
def test_frames_shares_and_dates_are_no_times(text):
    assert parse_intervals(text) == []


def test_times_have_the_unit_they_are_given_in():
    times = read_times("1 h 2 min; 3 s; 500 ms; 1:02; 2'05\"; 7")
    assert [time.seconds for time in times] == [3720, 3, 0.5, 62, 125, 7]
