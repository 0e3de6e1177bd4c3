"""Records with tool calls and what tools answered."""

import json

import pytest

from longrl.datamodules.loading.row_fingerprint import row_text
from longrl.datamodules.loading.traces import trace_media
from longrl.datamodules.rows import chat_row, longvideo_reason_row

QUESTION = {"role": "user", "content": [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "Which?"}]}
CALL = {"type": "function", "id": "1", "function": {"name": "crop_video", "arguments": '{"start_s": 8, "end_s": 16}'}}
ASKS = {"role": "assistant", "content": "<think>Look.</think>", "tool_calls": [CALL]}
CROP = {"type": "video", "video": "v.mp4", "span_s": [8, 16], "fps": 2}
SHOWS = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "8 to 16 s"}, CROP]}
ANSWERS = {"role": "assistant", "content": "<think>It is red.</think><answer>B</answer>"}


def conversation(*messages, **fields):
    return chat_row({"messages": [QUESTION, *messages], **fields}, 3, "/m")


def test_what_follows_the_last_question_is_the_trace():
    row = conversation(ASKS, SHOWS, ANSWERS)
    assert [message["role"] for message in row.messages] == ["user"]
    assert row.videos == ("/m/v.mp4",)
    asks, shows, answers = row.trace
    call = {"name": "crop_video", "arguments": {"start_s": 8, "end_s": 16}}
    assert asks == {"role": "assistant", "content": ASKS["content"], "tool_calls": [call]}
    crop = {"type": "video", "video": "/m/v.mp4", "span_s": [8.0, 16.0], "fps": 2.0}
    assert shows == {"role": "tool", "content": [{"type": "text", "text": "8 to 16 s"}, crop]}
    assert answers == {"role": "assistant", "content": ANSWERS["content"]}
    assert (row.answer, row.response, row.problem) == ("B", ANSWERS["content"], "Which?")
    assert trace_media(row) == [("video", "/m/v.mp4")]


def test_a_conversation_without_tools_is_read_as_ever():
    row = conversation({"role": "assistant", "content": "Hm."}, QUESTION, ANSWERS)
    assert row.trace == ()
    assert [message["role"] for message in row.messages] == ["user", "assistant", "user"]


def test_calls_before_the_last_question_are_a_part_of_the_prompt():
    later = {"role": "user", "content": "And then?"}
    nothing = {"role": "tool", "content": "nothing"}
    row = conversation(ASKS, nothing, nothing, ANSWERS, later, ASKS, SHOWS, ANSWERS)
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert row.messages[1]["tool_calls"][0]["name"] == "crop_video"
    assert len(row.trace) == 3


def test_a_question_may_have_a_trace_that_shows_parts_of_its_video():
    named = {"type": "image", "time_s": 9.5, "box": [0, 0, 500, 1000]}
    record = {"problem": "Which? A. red B. blue", "answer": "B", "videos": "v.mp4", "tools": '[{"type": "function"}]'}
    trace = [ASKS, {"role": "tool", "content": [{"type": "video", "start_s": 8, "end_s": 16}, named]}, ANSWERS]
    row = longvideo_reason_row({**record, "trace": json.dumps(trace)}, 0, "/m")
    span, frame = row.trace[1]["content"]
    assert span == {"type": "video", "video": "/m/v.mp4", "span_s": [8.0, 16.0]}
    assert frame == {"type": "image", "video": "/m/v.mp4", "time_s": 9.5, "box": [0.0, 0.0, 0.5, 1.0]}
    assert row.metadata["tools"] == [{"type": "function"}]
    assert (row.problem, row.messages, row.task) == (record["problem"], (), "multiple_choice")


def test_a_moved_data_set_is_the_same_and_another_span_is_not():
    texts = {row_text(chat_row({"messages": [QUESTION, ASKS, SHOWS, ANSWERS]}, 0, root)) for root in ("/m", "/n")}
    assert len(texts) == 1
    other = {**SHOWS, "content": [{**CROP, "span_s": [8, 15]}]}
    assert row_text(chat_row({"messages": [QUESTION, ASKS, other, ANSWERS]}, 0, "/m")) not in texts


def tool(*parts):
    return {"role": "tool", "content": list(parts)}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SHOWS, ANSWERS], "before the assistant said anything"),
        ([ASKS, SHOWS], "ends with a tool's answer"),
        ([ASKS, SHOWS, ANSWERS, ANSWERS], "a turn of the assistant behind another"),
        ([ASKS, tool({"type": "audio", "audio": "a.wav"}), ANSWERS], "must be an image or a video, got audio"),
        ([ASKS, tool({"type": "video", "video": "v.mp4", "span_s": [8]}), ANSWERS], "span_s must be 2 numbers"),
        ([ASKS, tool({"type": "image", "video": "v.mp4"}), ANSWERS], "time_s must be 1 numbers"),
        ([ASKS, tool({**CROP, "box": [0, 0, 1, 1]}), ANSWERS], "a video with a box"),
        (
            [ASKS, tool({"type": "image", "video": "v.mp4", "time_s": 1, "box": [500, 0, 100, 1000]}), ANSWERS],
            "left < right",
        ),
        (
            [ASKS, tool({"type": "image", "video": "v.mp4", "time_s": 1, "box": [0, 0, 500, 2000]}), ANSWERS],
            "in thousandths",
        ),
        ([ASKS, tool({"type": "image", "image": "a.png", "time_s": 1}), ANSWERS], "name its video"),
        ([ASKS, tool({"type": "video", "video": ["v.mp4", "w.mp4"]}), ANSWERS], "must name one video"),
        ([ASKS, tool({"type": "box"}), ANSWERS], "must be text or one of"),
        ([{**ASKS, "tool_calls": "crop"}, SHOWS, ANSWERS], "tool_calls that must be a list"),
        ([{**ASKS, "tool_calls": [{"name": "x", "arguments": [1]}]}, SHOWS, ANSWERS], "a name and its arguments"),
        ([ASKS, SHOWS, ANSWERS, {"role": "user", "content": "And?"}, ANSWERS], "shows a part of a video"),
    ],
)
def test_what_is_wrong_is_said(messages, message):
    with pytest.raises(ValueError, match=f"record 3 .*{message}"):
        conversation(*messages)
