import pytest
from hypothesis import given, strategies as st

from longrl.datamodules.loading.row_marks import RowDraw, drawn_index, marked, unmarked, video_of
from longrl.datamodules.loading.schedules import Schedule, VideoSchedule, check_length_schedule
from longrl.datamodules.media.sampling import VideoSampling
from longrl.evaluation.answering import doc_hash
from longrl.types import Row


def test_values_by_hand():
    steps = Schedule([0, 10, 30], [4, 8, 6])
    assert [steps.at(step) for step in (0, 9, 10, 29, 30, 999)] == [4, 4, 8, 8, 6, 6]
    line = Schedule([0, 10, 30], [4, 9, 6], "linear")
    assert [line.at(step) for step in (0, 1, 2, 10, 11, 14, 30, 999)] == [4, 4, 5, 9, 8, 8, 6, 6]
    assert [line.at(step, 2) for step in (0, 2, 9, 10, 30)] == [4, 4, 8, 8, 6]
    quarters = Schedule([0, 4], [0.5, 1], "linear", multiple_of=0.25)
    assert [quarters.at(step) for step in range(5)] == [0.5, 0.5, 0.75, 0.75, 1.0]


@given(
    values=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    multiple=st.integers(1, 8),
    step=st.integers(0, 40),
)
def test_a_line_stays_between_its_values_whatever_it_is_rounded_to(values, multiple, step):
    line = Schedule([10 * n for n in range(len(values))], values, "linear").at(step, multiple)
    assert line <= max(values)
    assert line > min(values) - multiple
    assert line % multiple == 0 or line < multiple


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (([], []), "as many values as steps, at least one"),
        (([0, 5], [1]), "as many values as steps"),
        (([1, 5], [1, 2]), r"steps of a schedule must begin at 0 and ascend, got steps=\[1, 5\]"),
        (([0, 5, 5], [1, 2, 3]), "must begin at 0 and ascend"),
        (([0], [0]), "values of a schedule must be finite and above 0"),
        (([0], [float("nan")]), "finite and above 0"),
        (([0], [1], "cosine"), "shape of a schedule must be constant or linear, got 'cosine'"),
        (([0], [1], "linear", 0), "multiple_of must be above 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*options)


@pytest.mark.parametrize(
    ("schedule", "video", "message"),
    [
        (VideoSchedule(), {}, "data.curriculum.video has no schedule"),
        (VideoSchedule(max_frames=Schedule([0], [32])), {"max_frames": 16},
         "max_frames goes up to 32, above data.video.max_frames=16, which memory is planned for; raise that to 32"),
        (VideoSchedule(num_frames=Schedule([0], [8])), {}, "data.video.num_frames, which is not set"),
        (VideoSchedule(max_frames=Schedule([0, 5], [8.5, 16])), {}, "max_frames must have whole numbers"),
        (VideoSchedule(max_frames=Schedule([0, 5], [8, 2])), {}, "at step 5: frames must satisfy 1 <= min_frames"),
        (VideoSchedule(fps=Schedule([0], [4])), {}, "fps goes up to 4, above data.video.fps=2.0"),
    ],
)  # fmt: skip
def test_a_schedule_of_frames_keeps_to_what_the_run_is_planned_for(schedule, video, message):
    with pytest.raises(ValueError, match=message):
        schedule.check(VideoSampling(**video))


def test_a_schedule_of_tokens_keeps_to_the_longest_completion():
    check_length_schedule(None, 8)
    check_length_schedule(Schedule([0, 5], [4, 8]), 8)
    with pytest.raises(ValueError, match=r"goes up to 9, above rollout\.sampling\.max_completion_tokens=8, which"):
        check_length_schedule(Schedule([0, 5], [9, 8]), 8)
    with pytest.raises(ValueError, match=r"length_schedule must have whole numbers, got \[4\.5\]"):
        check_length_schedule(Schedule([0], [4.5]), 8)


def test_a_mark_says_what_is_shown_and_which_row_it_is():
    video = VideoSampling(max_frames=64)
    row = Row("a", "?", "1", metadata={"span_s": [0, 1]})
    schedule = VideoSchedule(max_frames=Schedule([0, 4], [8, 64], "linear"), fps=Schedule([0, 4], [1, 2], "linear"))
    drawn = marked(row, RowDraw(7, schedule.budget(1, 4)))
    assert drawn.metadata == {"span_s": [0, 1]}, "rewards and scorers of others are handed the metadata"
    assert unmarked(drawn) == row
    assert doc_hash(drawn) == doc_hash(row)
    assert drawn_index(drawn) == 7
    assert video_of(drawn, video) == VideoSampling(fps=1.25, max_frames=20)
    assert drawn_index(row) is None
    assert video_of(row, video) is video
    assert video_of(marked(row, RowDraw(7)), video) == video
