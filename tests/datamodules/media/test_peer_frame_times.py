"""Frames as qwen-vl-utils, VILA, lmms-eval and VLMEvalKit take them, for 30 combinations of length, rate and limits.

The figures of `peer_frame_times.json` were computed by the released code itself: `tests/harness/peer_figures.py` says
how, with qwen-vl-utils 0.0.14 (its decord reader), NVlabs/Long-RL 97abc844 (`_load_video` of VILA's media.py for a
number, `get_frame_from_vcap_with_fps` of its mm_utils.py for a rate), EvolvingLMMs-Lab/lmms-eval 75571cfe
(`load_video_decord`, `load_video_stream`) and open-compass/VLMEvalKit e8e78f05 (`VideoBaseDataset.save_video_frames`).
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from longrl.datamodules.media.sampling import VideoSampling, sample_indices

FIGURES = json.loads(Path(__file__).with_name("peer_frame_times.json").read_text())
UNLIMITED = 1_000_000


def settings_of(peer, count=None, rate=None, most=None):
    """What makes ours sample as a peer does, of a number of frames or of a rate."""
    asked = {"fps": rate, "num_frames": count, "min_frames": 1, "max_frames": most or UNLIMITED}
    if peer == "qwen":
        return VideoSampling(
            **asked | {"min_frames": 4 if rate else 2}, moments="ends", rounding="nearest", multiple_of=2
        )
    if peer == "vila":
        return VideoSampling(**asked | {"min_frames": 2 if rate else 1}, moments="ends", rate_rounding="down")
    if peer == "lmms_eval":
        return VideoSampling(**asked, moments="ends", rate_rounding="down")
    moments = "starts" if rate else "inner"
    return VideoSampling(**asked | {"max_frames": UNLIMITED}, moments=moments, rate_rounding="down")


def video_of(row):
    """Times in seconds at which the frames appear, and the end."""
    fps = Fraction(row["video"]["fps"])
    count = row["video"]["num_frames"]
    return np.arange(count) / float(fps), float(count / fps)


def check(figures, indices, num_there):
    if "frames" in figures:
        expected = sorted(set(figures["frames"]))  # a short video's are shown twice, here once
        assert indices == expected
        return
    if figures["count"] > num_there:
        assert indices == list(range(num_there))
        return
    assert (len(indices), indices[:4], indices[-3:]) == (figures["count"], figures["first"], figures["last"])
    assert hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:16] == figures["sha256"]


@pytest.mark.parametrize("peer", ["qwen", "vila", "lmms_eval", "vlmevalkit"])
def test_frames_and_their_times_are_those_of(peer):
    assert len(FIGURES) == 30
    for row in FIGURES:
        starts, end_s = video_of(row)
        indices = sample_indices(starts, end_s, settings_of(peer, **row["ask"]))
        if row[peer] is None:  # qwen-vl-utils refuses to show fewer than asked for
            assert row["ask"]["count"] > len(starts)
            continue
        check(row[peer], indices, len(starts))
