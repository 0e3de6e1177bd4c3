"""Boxes in texts, with their times."""

import json

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.timed_boxes import parse_boxes


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[1, 2, 3.5, 4]", [(1, 2, 3.5, 4, None)]),
        ("[[0.1, 0.5, 0.3, 0.6], [0.7, 0.2, 0.8, 0.4]]", [(0.1, 0.5, 0.3, 0.6, None), (0.7, 0.2, 0.8, 0.4, None)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [(1, 2, 3, 4, None)]),
        ('[{"time": 1.0, "bbox_2d": [1, 2, 3, 4], "label": "dog"}]', [(1, 2, 3, 4, 1)]),
        ('{"bbox_2d": [1, 2, 3, 4], "time": "00:03.5"}', [(1, 2, 3, 4, 3.5)]),
        ("{'time': 2, 'bbox': [1, 2, 3, 4]}", [(1, 2, 3, 4, 2)]),
        ('{"12": [1, 2, 3, 4], "13": [[5, 6, 7, 8], [6, 6, 7, 8]]}',
         [(1, 2, 3, 4, 12), (5, 6, 7, 8, 13), (6, 6, 7, 8, 13)]),
        ('{"timestamp": 7, "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}', [(1, 2, 3, 4, 7)]),
        ("<obj>dog</obj><box>[1,2,3,4]</box>at<t>12.5</t>s", [(1, 2, 3, 4, 12.5)]),
        ("<box>[1,2,3,4]</box><box>[5,6,7,8]</box>at<t>12</t>s", [(1, 2, 3, 4, 12), (5, 6, 7, 8, 12)]),
        ("at 12.0 s: [1, 2, 3, 4]", [(1, 2, 3, 4, 12)]),
        ("<12.0 seconds> [1, 2, 3, 4]", [(1, 2, 3, 4, 12)]),
        ("[12.0, [1, 2, 3, 4]]", [(1, 2, 3, 4, 12)]),
        ("Object 2: [1, 2, 3, 4]", [(1, 2, 3, 4, None)]),
        (" 1, 2, 3.5, 4\n", [(1, 2, 3.5, 4, None)]),
        ("1, 2, 3, 4, 5", []),
        ("[1, 2, 3] and 4", []),
        ("", []),
    ],
)  # fmt: skip
def test_boxes_are_read_with_their_times(text, boxes):
    assert [tuple(box) for box in parse_boxes(text)] == boxes


TIMED = st.lists(st.tuples(st.integers(0, 600), *[st.integers(0, 999)] * 4), max_size=6)


@given(TIMED, st.sampled_from(["fields", "keys"]))
def test_boxes_written_as_json_are_read_back(timed, form):
    timed = list({time: (time, *box) for time, *box in timed}.values())
    text = json.dumps(
        [{"time": time, "bbox_2d": box, "label": "a dog at 3 s"} for time, *box in timed]
        if form == "fields"
        else {str(time): box for time, *box in timed}
    )
    assert [(box.time_s, *box[:4]) for box in parse_boxes(text)] == timed


@given(st.text(alphabet='[]{}()0123456789.,:"time st<>') | st.text())
def test_any_text_gives_boxes(text):
    assert all(box.time_s is None or box.time_s >= 0 for box in parse_boxes(text))
