"""Seconds of decoding travel with a prompt: what it takes alone, and what this run spent."""

import dataclasses

import torch

from longrl.datamodules.loading.reading_time import ReadingClock
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows.question_rows import longvideo_reason_row
from longrl.types import Frames
from tests.evaluation.scripted import questions, records
from tests.tiny import vl_family


def rows():
    made = [longvideo_reason_row(record, index, questions().parent) for index, record in enumerate(records())]
    return made[0], made[1], made[4]  # two about one video, one about another


def test_a_held_video_costs_nothing_again_and_the_same_alone(monkeypatch):
    renderer = RowRenderer(vl_family(), VideoSampling(fps=1.0), cached_media=1)
    first, again, other = map(renderer, rows())
    assert first.reading.spent_s == first.reading.alone_s > 0
    assert (again.reading.spent_s, again.reading.alone_s) == (0, first.reading.alone_s)
    assert other.reading.spent_s == other.reading.alone_s > 0
    assert len(first.video_s) == 1
    assert first.video_s[0] > 1

    # Two conditions of an evaluation share what is held; of an evicted video the time is known and spent anew.
    once_more = dataclasses.replace(renderer)(rows()[0]).reading
    assert once_more.spent_s == once_more.alone_s > 0


def test_nothing_is_decoded_for_stored_features_and_blind_questions():
    class Everything:
        def has(self, key):
            return True

    renderer = RowRenderer(vl_family(), VideoSampling(fps=1.0), stored=Everything())
    assert renderer(rows()[0]).reading == (0, None)
    blind = RowRenderer(vl_family(), VideoSampling(fps=1.0), blind=True)(rows()[0])
    assert (blind.reading, blind.video_s) == ((0, 0), ())


def test_choosing_frames_is_spent_on_each_question(monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("longrl.datamodules.loading.reading_time.time.perf_counter", lambda: next(now))
    clock = ReadingClock()
    video = Frames("video", torch.zeros(0), (), "a")
    clock.decoded(9.0, "a")
    mark = clock.mark()
    clock.chose(9.0)
    assert clock.of([video], mark) == (3.0, 1.0 + 3.0)
    assert clock.of([video, Frames("video", torch.zeros(0), (), "stored")], mark) == (3.0, None)


def test_seconds_are_no_part_of_what_a_prompt_or_a_renderer_is():
    made = RowRenderer(vl_family(), VideoSampling(fps=1.0))
    before = made.identity()
    prompt = made(rows()[0])
    assert made.identity() == before
    compared = {item.name for item in dataclasses.fields(prompt) if item.compare}
    assert "reading" not in compared
