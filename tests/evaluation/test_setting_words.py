"""Differences of protocol in words."""

import pytest

from longrl.evaluation.setting_words import describe_differences, list_unrecorded, list_unsaid
from longrl.evaluation.settings import Setting, setting_of


@pytest.mark.parametrize(
    ("ours", "other", "wanted"),
    [
        ({"frames": 64}, {"frames": 512}, "shows 64 frames where it shows 512 (8 times as many)"),
        ({"frames": 512}, {"frames": 64}, "shows 512 frames where it shows 64 (1/8 as many)"),
        ({"frames": 8}, {"frames": 6}, "shows 8 frames where it shows 6 (0.75 times as many)"),
        (
            {"selection": {"name": "A", "file": "0123456789", "fps": 1.0}},
            {"selection": {"name": "A", "file": "abcdefghij", "fps": 1.0}},
            "selects by file 01234567 where it selects by file abcdefgh",
        ),
        ({"frames": 0}, {"frames": 64}, "shows no video where it shows 64"),
        (
            {"frames": 64}, {"frames_at_most": 768, "fps": 2.0},
            "shows 64 frames where it shows at most 768, 2 a second (12 times as many)",
        ),
        ({"fps": 1.0}, {"fps": 0.5}, "takes 1 frames a second where it takes 0.5"),
        ({"media_tokens": 1024}, {"media_tokens_at_most": 24576},
         "spends 1,024 video tokens where it may spend 24,576 (24 times as many)"),
        ({"max_pixels": 100}, {"max_pixels": 200},
         "shows frames of at most 100 pixels where it shows 200 (2 times as many)"),
        ({"prompt": "{problem}"}, {"prompt": "Look.\n{problem}"},
         'asks by the template "{problem}" where it asks by "Look. {problem}"'),
        ({"prompt": "{problem}"}, {"prompt": "words of its own"},
         'asks by the template "{problem}" where it asks by words of its own'),
        ({"subtitles": False}, {"subtitles": True}, "reads no subtitles where it reads them"),
        ({"tools": True}, {"tools": False}, "has tools where it has none"),
        ({"temperature": 0.0}, {"temperature": 0.6},
         "samples at temperature 0 (greedy) where it samples at temperature 0.6"),
        ({"max_completion_tokens": 16}, {"max_completion_tokens": 2048},
         "lets answers have 16 tokens where it lets them have 2,048"),
        ({"num_generations": 4}, {"num_generations": 1}, "answers each question 4 times where it does 1"),
        ({"scored_by": "a"}, {"scored_by": "b"}, "is scored by a where it is scored by b"),
        ({"questions": 300}, {"questions": 2700}, "asks 300 questions where it asks 2,700"),
    ],
)  # fmt: skip
def test_a_difference_is_a_sentence(ours, other, wanted):
    assert describe_differences(Setting(**ours), Setting(**other), "it") == [wanted]


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ({"model": "Qwen2.5-VL-7B-Instruct"}, {"model": "Qwen/Qwen2.5-VL-7B-Instruct"}),
        ({"frames": 8, "prompt": "{problem}"}, {}),
        ({}, {"frames": 8, "subtitles": True, "temperature": 0.0}),
        ({"frames": 100, "frames_at_most": 768}, {"frames_at_most": 768}),
    ],
)
def test_what_is_alike_or_not_said_is_no_difference(ours, other):
    assert describe_differences(Setting(**ours), Setting(**other)) == []


def test_what_is_not_said_is_listed():
    said = Setting(frames_at_most=768, media_tokens_at_most=24576, subtitles=False, questions=2700)
    assert list_unsaid(said) == ["pixels of a frame", "prompt", "sampling", "length of answers", "scoring"]


def test_what_is_said_of_one_and_not_recorded_of_the_other_is_listed():
    said = Setting(frames_at_most=768, media_tokens_at_most=24576, subtitles=False, thinking=True)
    assert list_unrecorded(Setting(subtitles=True, media_tokens=5), said) == ["frames", "thinking"]


def test_results_of_any_release_have_a_setting():
    assert setting_of({}, "video") == Setting()
    results = {
        "policy": {"model": "m"}, "sampling": {"temperature": 0.0}, "budget": {"max_pixels": 100},
        "conditions": {"video": {
            "reading": {"video": {"fps": 1.0, "max_frames": 64, "moments": "ends"}, "question_template": "{problem}",
                        "blind": False, "subtitles": {"source": "record"}},
            "shown": {"frames": {"min": 3, "median": 5, "max": 9}, "media_tokens": None},
        }},
    }  # fmt: skip
    found = setting_of(results, "video", "a rule")
    assert (found.frames, found.frames_at_most, found.fps, found.max_pixels) == (5, 64, 1.0, 100)
    assert (found.subtitles, found.tools, found.prompt, found.scored_by) == (True, False, "{problem}", "a rule")
    assert found.frame_rule == "moments from the first frame to the last"
    results["conditions"]["video"]["reading"]["selection"] = {"name": "Motion", "detail_frames": 2}
    rule = "moments from the first frame to the last, and behind them 2 frames by the selection Motion"
    assert setting_of(results, "video").frame_rule == rule
