"""Records of messages, in the forms that people have them."""

import base64
import io
import json

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from longrl.datamodules.rows import chat_row, longvideo_reason_row
from longrl.datamodules.rows.question_rows import make_rows

TARGET = {"role": "assistant", "content": "<think>It is red.</think><answer>B</answer>"}


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


ENCODED = base64.b64encode(png()).decode()


def of_user(*parts, **fields):
    """A record of one question and its answer."""
    return {"messages": [{"role": "user", "content": list(parts)}, TARGET], **fields}


def text(words="Which?"):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "url": "file:///MEDIA/a.png"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": "https://example.com/a.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{ENCODED}"},
        {"type": "image", "base64": ENCODED},
        {"type": "image", "bytes": png()},
        {"type": "image", "image": {"bytes": png(), "path": None}},
        {"type": "image", "image": Image.new("RGB", (8, 8)), "text": None},
    ],
)
def test_an_image_may_be_named_in_any_of_the_usual_ways(tmp_path, part):
    row = longvideo_reason_row(of_user(part, text()), 0, str(tmp_path))
    assert len(row.images) == 1
    assert row.messages == ({"role": "user", "content": [{"type": "image"}, text()]},)
    assert (row.response, row.answer, row.task, row.problem) == (TARGET["content"], "B", "open_ended", "Which?")
    assert row.images[0].startswith(("https://", "/MEDIA", str(tmp_path)))


def test_videos_sounds_and_frames_are_parts_too(tmp_path):
    row = chat_row(
        of_user(
            {"type": "video", "video": "v.mp4"},
            {"type": "video_url", "video_url": {"url": "https://example.com/w.mp4"}},
            {"type": "video", "video": ["1.jpg", "2.jpg"], "fps": 2.0},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF....").decode(), "format": "wav"}},
            text(),
        ),
        0,
        str(tmp_path),
    )
    kinds = [part["type"] for part in row.messages[0]["content"]]
    assert kinds == ["video", "video", "video", "audio", "text"]
    assert row.videos[:2] == (str(tmp_path / "v.mp4"), "https://example.com/w.mp4")
    assert [len(row.videos), len(row.audios), len(row.images)] == [3, 1, 0]
    assert row.audios[0].startswith(str(tmp_path / ".audios"))


def test_media_of_the_record_take_the_places_that_parts_and_tags_have():
    first = chat_row(of_user({"type": "image"}, text(), {"type": "image"}, images=["a.png", "b.png"]), 0, "/m")
    tagged = {"messages": [{"role": "user", "content": "<image>Which?<image>"}, TARGET], "images": ["a.png", "b.png"]}
    assert chat_row(tagged, 0, "/m") == first
    assert first.images == ("/m/a.png", "/m/b.png")
    unplaced = chat_row({"messages": [{"role": "user", "content": "Which?"}, TARGET], "image": "a.png"}, 0, "/m")
    assert unplaced.messages == ({"role": "user", "content": [{"type": "image"}, text()]},)


def test_without_media_a_tag_is_text():
    row = chat_row({"messages": [{"role": "user", "content": "What does <video> do in HTML?"}, TARGET]}, 0)
    assert row.messages[0]["content"] == [text("What does <video> do in HTML?")]
    assert make_rows([of_user(text("See <image>."))], longvideo_reason_row, None)[0].problem == "See <image>."


def test_trl_openai_and_sharegpt_say_the_same():
    """Prompt and completion; thinking apart; JSON in a column; speakers by other names."""
    asked = {"role": "user", "content": "Which?"}
    apart = {"role": "assistant", "content": "<answer>B</answer>", "reasoning_content": "It is red."}
    rows = [
        chat_row({"messages": [asked, TARGET]}, 0),
        longvideo_reason_row({"prompt": [asked], "completion": [TARGET]}, 0),
        longvideo_reason_row({"messages": json.dumps([asked, TARGET], indent=1)}, 0),
        chat_row(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Which?"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": TARGET["content"]}]},
                ]
            },
            0,
        ),
        chat_row(
            {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": TARGET["content"]}]}, 0
        ),
    ]
    assert all(row == rows[0] for row in rows)
    row = chat_row({"messages": [asked, apart]}, 0)
    assert row.response == "<think>\nIt is red.\n</think>\n\n<answer>B</answer>"
    for_rl = longvideo_reason_row({"prompt": [asked], "solution": "<answer>12</answer>", "task": "numeric"}, 0)
    assert (for_rl.answer, for_rl.task, for_rl.response) == ("12", "numeric", None)


def test_earlier_turns_and_system_messages_stay():
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [text("Hello")]},
        {"role": "user", "content": "Which?\nA. one\nB. two"},
        TARGET,
    ]
    row = chat_row({"messages": said, "answer": "B"}, 0)
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "user"]
    assert (row.problem, row.task, row.answer) == ("Which?\nA. one\nB. two", "multiple_choice", "B")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [TARGET]}, "needs a message before the last answer"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role must be one of .* got 'narrator'"),
        (
            {"messages": [{"role": "user", "content": None}, TARGET]},
            "content must be text or a list of parts, got None",
        ),
        (of_user("Which?"), r"content must be text or a list of parts, got \['Which\?'\]"),
        ({"messages": [{"role": "user", "content": "Which?"}]}, "needs 'answer', which is missing"),
        ({"messages": [{"role": "user", "content": "x"}, {**TARGET, "content": " "}]}, "an empty last answer"),
        (
            {"messages": [{"role": "user", "content": "x"}, {**TARGET, "tool_calls": [1]}]},
            "a tool call that must have a name",
        ),
        (of_user({"type": "image"}), "must be one image, got .*; name its file, or add images"),
        (of_user({"type": "hologram"}), "must be text or one of image"),
        (of_user({"type": "image"}, images=["a.png", "b.png"]), r"place \{'image': 1\} of its media, but it has"),
        (of_user({"type": "image", "image": "a.png"}, images=["b.png"]), "leave out the fields"),
        ({"messages": "Which?", "prompt": [TARGET]}, "must be a list of messages, got str"),
    ],
)
def test_what_is_wrong_is_said(record, message):
    with pytest.raises(ValueError, match=f"record 3 .*{message}"):
        chat_row(record, 3)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 3)
    | st.sampled_from(["", "text", "image", "user", "assistant", "a.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "images", "messages"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_no_record_of_messages_ends_a_run(value):
    for record in ({"messages": value}, {"messages": [{"role": "user", "content": value}, TARGET]}):
        (result,) = make_rows([record], chat_row, None)
        assert isinstance(result, ValueError) or result.messages
