"""Which frames are sampled: at middles of equal times, and at equal steps as lmms-eval, VILA and Qwen sample."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from longrl.datamodules.media.sampling import VideoSampling, sample_indices


def samplings():
    def by_fps(fps, low, more):
        return VideoSampling(fps=fps, min_frames=low, max_frames=low + more)

    def by_count(count):
        return VideoSampling(fps=None, num_frames=count, min_frames=1)

    few = st.integers(1, 40)
    return st.builds(by_fps, st.floats(0.05, 60), few, st.integers(0, 40)) | st.builds(by_count, few)


@settings(deadline=None)
@given(steps=st.lists(st.floats(0.001, 30), min_size=1, max_size=150), start=st.floats(0, 9), sampling=samplings())
def test_indices_increase_and_are_as_many_as_asked_for_at_any_frame_rate(steps, start, sampling):
    *starts, end_s = (start + np.concatenate([[0], np.cumsum(steps)])).tolist()
    indices = sample_indices(starts, end_s, sampling)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < len(starts)
    assert len(indices) >= min(sampling.num_frames or sampling.min_frames, len(starts))
    assert len(indices) <= (sampling.num_frames or sampling.max_frames)


@settings(deadline=None)
@given(count=st.integers(1, 400), fps=st.sampled_from([1, 4, 10, 24, 25, 30000 / 1001, 60]), sampling=samplings())
def test_a_constant_frame_rate_is_sampled_in_even_steps(count, fps, sampling):
    starts = (np.arange(count) / fps).astype(np.float32).astype(np.float64)  # coarse, as some files have them
    indices = sample_indices(starts, count / fps, sampling)
    by_rate = sampling.num_frames or round(count / fps * sampling.fps)
    assert len(indices) == min(max(by_rate, sampling.min_frames), sampling.max_frames, count)
    gaps = np.diff(indices)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(indices[0] - (count - 1 - indices[-1])) <= 1


def test_half_the_frame_rate_takes_every_second_frame():
    for fps in (4, 30):
        starts = np.arange(40 * fps) / fps
        indices = sample_indices(starts, 40.0, VideoSampling(fps=fps / 2, max_frames=2000))
        assert np.diff(indices).tolist() == [2] * (20 * fps - 1)


def test_time_decides_where_the_frame_rate_varies():
    starts = [0.0, 1.0, 2.0, 3.0, *(4 + 0.1 * i for i in range(40))]  # 1 fps for 4 s, then 10 fps for 4 s
    indices = sample_indices(starts, 8.0, VideoSampling(fps=None, num_frames=8))
    assert indices == [0, 1, 2, 3, 9, 19, 29, 39]  # half a second into each second


def test_a_frame_that_stands_still_is_taken_once_and_missing_ones_are_added_where_the_gap_is_widest():
    starts = [0.0, 90.0, 91.0, 92.0, 98.0]
    assert sample_indices(starts, 100.0, VideoSampling(fps=None, num_frames=2, min_frames=1)) == [0, 4]
    assert sample_indices(starts, 100.0, VideoSampling(fps=0.03, min_frames=1)) == [0]
    assert sample_indices(starts, 100.0, VideoSampling(fps=0.03, min_frames=3)) == [0, 1, 4]


def test_a_video_shorter_than_the_minimum_gives_all_its_frames():
    assert sample_indices([0.0, 0.5], 1.0, VideoSampling(fps=1.0, min_frames=4)) == [0, 1]
    assert sample_indices([0.0], 0.0, VideoSampling()) == [0]


def test_of_a_span_the_frames_on_show_in_it_are_sampled_as_a_video_of_their_own():
    starts = np.arange(40) / 4  # 10 s at 4 frames per second
    sampling = VideoSampling(fps=2.0, min_frames=1, span_s=(2.0, 5.0))
    assert sample_indices(starts, 10.0, sampling) == [index + 8 for index in sample_indices(np.arange(12) / 4, 3.0,
                                                      VideoSampling(fps=2.0, min_frames=1))]  # fmt: skip
    every = VideoSampling(fps=None, num_frames=768, span_s=(2.1, 3.1))
    assert sample_indices(starts, 10.0, every) == [8, 9, 10, 11, 12]  # frame 8 is on show from 2.0 to 2.25 s
    assert sample_indices(starts + 5, 15.0, every) == [8, 9, 10, 11, 12]  # counted from the first frame
    late = VideoSampling(fps=None, num_frames=768, span_s=(9.6, 99.0))
    assert sample_indices(starts, 10.0, late) == [38, 39]


@given(
    count=st.integers(1, 100), start=st.floats(0, 9), length=st.floats(0.01, 20), fps=st.sampled_from([1, 4, 25]),
    sampling=samplings(),
)  # fmt: skip
def test_no_frame_outside_a_span_is_taken(count, start, length, fps, sampling):
    starts = np.arange(count) / fps
    assume(start < count / fps)
    indices = sample_indices(starts, count / fps, replace(sampling, span_s=(start, start + length)))
    assert indices
    assert indices == sorted(set(indices))
    assert all(starts[i] < start + length and starts[i] + 1 / fps > start - 1e-9 for i in indices)


def test_an_hour_is_thinned_to_the_maximum():
    indices = sample_indices(np.arange(3600 * 25) / 25, 3600.0, VideoSampling(fps=2.0, max_frames=768))
    assert len(indices) == 768


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_frames": 8}, "set either fps or num_frames, got fps=2.0 and num_frames=8"),
        ({"fps": None}, "set either fps or num_frames"),
        ({"fps": 0.0}, "fps must be above 0, got 0.0"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"min_frames": 0}, "1 <= min_frames <= max_frames, got 0"),
        ({"min_frames": 9, "max_frames": 8}, "got 9 and 8"),
        ({"moments": "start"}, "moments must be middles or ends or inner or starts or whole_steps, got 'start'"),
        ({"rounding": "nearest"}, "the first to the last, and moments is middles; set moments to ends"),
        ({"multiple_of": 3}, "divide num_frames, min_frames and max_frames, got 3 for None, 4 and 768"),
        ({"fps": None, "num_frames": 1000}, "num_frames=1000 must lie between min_frames=4 and max_frames=768"),
    ],
)
def test_contradictory_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        VideoSampling(**wrong)


# ------------------------------------------------------------------------------------- equal steps, as released code
# Figures of np.linspace(0, N - 1, n, dtype=int), and of qwen-vl-utils 0.0.14: smart_nframes, then
# torch.linspace(0, N - 1, n).round().

QWEN = VideoSampling(fps=2.0, max_frames=2048, moments="ends", rounding="nearest", multiple_of=2)


def steps_of(num_there, count):
    sampling = VideoSampling(fps=None, num_frames=count, min_frames=1, moments="ends")
    return sample_indices(np.arange(num_there) / 25, num_there / 25, sampling)


def qwen(num_there, fps, **options):
    return sample_indices(np.arange(num_there) / fps, num_there / fps, replace(QWEN, **options))


def test_equal_steps_are_those_of_lmms_eval():
    assert steps_of(100, 8) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert steps_of(31, 8) == [0, 4, 8, 12, 17, 21, 25, 30]
    assert steps_of(17, 4) == [0, 5, 10, 16]
    assert steps_of(5, 3) == [0, 2, 4]
    assert steps_of(8, 8) == list(range(8))
    assert steps_of(900, 32) == [
        0, 29, 58, 87, 116, 145, 174, 203, 232, 261, 290, 319, 348, 377, 406, 435, 464, 493, 522, 551, 580, 609, 638,
        667, 696, 725, 754, 783, 812, 841, 870, 899,
    ]  # fmt: skip


def test_a_video_of_one_frame_or_of_fewer_than_asked_gives_each_once():
    """lmms-eval's Qwen models take each once too (`np.unique`); its decord loader repeats some."""
    assert steps_of(1, 8) == [0]
    assert steps_of(1, 1) == [0]
    assert steps_of(40, 1) == [0]
    assert steps_of(3, 8) == [0, 1, 2]
    assert qwen(1, 25.0) == [0]  # qwen-vl-utils refuses it


def test_equal_steps_and_pairs_are_those_of_qwen():
    assert qwen(25, 25.0) == [0, 8, 16, 24]
    assert qwen(31, 30.0) == [0, 10, 20, 30]
    assert qwen(3, 25.0) == [0, 2]  # three frames are two in pairs
    assert qwen(2, 1.0) == [0, 1]
    assert qwen(9, 3.0) == [0, 2, 3, 5, 6, 8]
    assert qwen(109, 10.0, max_frames=16) == [0, 7, 14, 22, 29, 36, 43, 50, 58, 65, 72, 79, 86, 94, 101, 108]
    assert qwen(300, 30.0) == [
        0, 16, 31, 47, 63, 79, 94, 110, 126, 142, 157, 173, 189, 205, 220, 236, 252, 268, 283, 299,
    ]  # fmt: skip
    assert len(qwen(327, 30.0)) == 20  # 10.9 s at 2 per second are 21.8: rounded down to a pair, not to 22


def test_an_hour_has_the_2048_frames_of_qwen():
    indices = qwen(108_000, 30.0)
    assert (len(indices), indices[:6]) == (2048, [0, 53, 106, 158, 211, 264])
    assert (indices[1000:1004], indices[-3:]) == ([52760, 52812, 52865, 52918], [107_893, 107_946, 107_999])


def test_steps_count_frames_where_middles_count_time():
    starts = [0.0, 1.0, 2.0, 3.0, *(4 + 0.1 * i for i in range(40))]  # 1 fps for 4 s, then 10 fps for 4 s
    sampling = VideoSampling(fps=None, num_frames=4, moments="ends")
    assert sample_indices(starts, 8.0, sampling) == [0, 14, 28, 43]
    assert sample_indices(starts, 8.0, replace(sampling, moments="middles")) == [1, 3, 14, 34]
    assert sample_indices(starts, 8.0, replace(sampling, span_s=(0.0, 4.0))) == [0, 1, 2, 3]


def test_starts_are_every_so_many_seconds_and_inner_steps_leave_both_ends_out():
    every = VideoSampling(fps=2.0, moments="starts")
    assert sample_indices(np.arange(109) / 10, 10.9, every) == list(range(0, 110, 5))
    assert sample_indices(np.arange(109) / 10, 10.9, replace(every, rate_rounding="down")) == list(range(0, 105, 5))
    assert sample_indices(np.arange(100) / 10, 10.0, replace(every, max_frames=4)) == [0, 25, 50, 75]
    assert sample_indices(np.arange(100) / 10, 10.0, VideoSampling(None, 4, moments="starts")) == [0, 25, 50, 75]
    assert sample_indices(np.arange(100) / 10, 10.0, VideoSampling(None, 4, moments="inner")) == [20, 40, 60, 80]


@settings(deadline=None)
@given(
    count=st.integers(1, 400),
    fps=st.sampled_from([1, 4, 25, 30000 / 1001]),
    step=st.integers(1, 4),
    low=st.integers(1, 5),
)
def test_a_multiple_divides_the_number_of_frames_while_there_are_as_many(count, fps, step, low):
    for moments in ("middles", "ends", "inner", "starts"):
        sampling = VideoSampling(
            fps=2.0, min_frames=low * step, max_frames=40 * step, moments=moments, multiple_of=step
        )
        indices = sample_indices(np.arange(count) / fps, count / fps, sampling)
        assert indices == sorted(set(indices))
        assert len(indices) % step == 0 or len(indices) == count < step


def test_a_frame_is_found_by_its_own_time_and_each_once():
    starts = np.arange(1000) / 29.97 + 0.733
    for index in range(1000):
        sampling = VideoSampling(at_s=(float(starts[index] - starts[0]),), span_s=(3.0, 4.0))
        assert sample_indices(starts, 40.0, sampling) == [index]
    assert sample_indices(starts, 40.0, VideoSampling(at_s=(0.0, 0.01, 0.05, 1e9))) == [0, 1, 999]
    for wrong in ((), (-1.0,), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="at_s must be increasing seconds from 0 on, at least one, got"):
            VideoSampling(at_s=wrong)


def test_answers_stored_before_there_were_decoders_and_selections_are_found():
    assert not {"decoder", "at_s"} & VideoSampling().identity().keys()
    assert VideoSampling(at_s=(1.0,)).identity()["at_s"] == (1.0,)


@pytest.mark.parametrize(
    ("moments", "count", "total", "indices"),
    [  # [int(i * (N / (n + 1))) for i in 1..n] of VLMEvalKit, and [int(N / n) * i for i in 0..n-1] of LongVideoBench
        ("inner", 4, 100, [20, 40, 60, 80]),
        ("inner", 3, 10, [2, 5, 7]),
        ("inner", 9, 10, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("whole_steps", 4, 100, [0, 25, 50, 75]),
        ("whole_steps", 4, 103, [0, 25, 50, 75]),
        ("whole_steps", 3, 5, [0, 1, 2]),
    ],
)
def test_equal_steps_without_the_ends_or_from_the_start(moments, count, total, indices):
    sampling = VideoSampling(fps=None, num_frames=count, min_frames=1, moments=moments)
    times = [index / 25 for index in range(total)]
    assert sample_indices(times, total / 25, sampling) == indices
    assert sample_indices(times[:count], count / 25, sampling) == list(range(count))  # a short video gives all
