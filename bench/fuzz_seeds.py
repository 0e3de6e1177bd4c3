"""What parsers are meant to read: good inputs that are mutated, and words of their languages."""

from __future__ import annotations

from typing import Any

from longrl.datamodules.rows import lmms_eval, published, question_rows
from longrl.datamodules.rows.question_rows import RowFunction
from longrl.diffusion.prompt_rows import geneval_row, ocr_row, prompt_row
from longrl.types import Row

WORDS = (
    "A", "B", "C.", "(D)", "Answer:", "the answer is", "not", "or", "and", "because", "wait, no", "option", "both",
    "all but", "from", "to", "between", "start", "end", "at", "12", "0:12", "00:01:02,5", "1:30", "12.5 s",
    "20 seconds", "3 min", "frame", "-->", "one hundred", "three quarters", "1/2", "50%", "1,234", "1e5", "2^3", "x",
    "\\frac{1}{2}", "\\sqrt{2}", "\\pi", "\\boxed{", "}", "$", "=", "+", "<think>", "</think>", "<answer>",
    "</answer>", "<t>", "<box>", "[1, 2, 3, 4]", "{", "[", '"bbox_2d":', '"time":', "\\begin{pmatrix}", "\\int",
    "\\sum_{i=1}^{n}", "!", "^{10}", "^{99999}", "\u2713", "\u2717", "**B**",
)  # fmt: skip
ANSWERS = (
    "<think>He pours tea.</think>\n<answer>B</answer>",
    "<think>x</think><answer>The answer is (B) because A and C are wrong.</answer>",
    "<answer>B. The woman feeds the dog</answer>\n\n------------------------------",
    "Option B is right. A, C and D are not.",
    "<answer>from 12.5 s to 20 s</answer>",
    "<answer>[[1.0, 2.5], [30, 40]]</answer>",
    '<answer>{"time": 1.0, "bbox_2d": [10, 20, 30, 40], "label": "dog"}</answer>',
    "<answer><obj>dog</obj><box>[10, 20, 30, 40]</box>at<t>12.0</t>s</answer>",
    "<answer>3 and a half</answer>",
    "<answer>1,234.5 cm</answer>",
    "<answer>\\frac{1}{2} + \\sqrt{3}</answer>",
    "<think>so 2+2=4</think> \\boxed{x^2 + 2x + 1}",
    "<answer>{1, 2, 3}</answer>",
    "<answer>the quick brown fox jumps over the lazy dog</answer>",
    "",
)
PROBLEM = "What happens?\nA. A man cooks pasta\nB. The woman feeds the dog\nC. They play football\nD. None of the above"
ROWS = {
    "multiple_choice": Row("r", PROBLEM, "B", "multiple_choice", "general"),
    "exact": Row("r", "Who?", "The red cat", "exact", "general", metadata={"aliases": ["cat"]}),
    "ocr": Row("r", "Read it.", "the quick brown fox", "ocr", "general"),
    "free_form": Row("r", "Why?", "because the dog was hungry", "free_form", "general"),
    "temporal_iou": Row("r", "When?", "12.5 to 20 s", "temporal_iou", "general"),
    "box_iou": Row("r", "Where?", '{"12": [10, 20, 30, 40]}', "box_iou", "general"),
    "numeric": Row("r", "How many?", "3.5", "numeric", "general"),
    "regression": Row("r", "How far?", "3.5", "regression", "general"),
}
FORMULAS = (
    ("\\frac{1}{2}", "1/2"), ("x^2+2x+1", "(x+1)^2"), ("\\sqrt{12}", "2\\sqrt{3}"), ("{1, 2, 3}", "{3, 2, 1}"),
    ("2\\pi", "6.28"), ("(0, 1]", "0 < x \\leq 1"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1, 2)"), ("x = 3", "3"),
)  # fmt: skip
FORMULA_WORDS = (
    "x", "y", "^{2}", "^{9}", "\\frac{", "}{", "}", "(", ")", "+", "-", "\\cdot", "\\sqrt{", "\\sin", "\\log", "\\pi",
    "1", "23", "=", "\\leq", ",", "\\int_0^1", "\\sum_{i=1}^{9}", "!", "\\binom{9}{3}", "\\pm", "i", "e^{x}",
    "\\infty", "|", "\\begin{matrix}",
)  # fmt: skip
CHAT = [
    {"role": "user", "content": [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": PROBLEM}]},
    {"role": "assistant", "content": "<answer>B</answer>", "tool_calls": None},
]
RECORDS: tuple[tuple[RowFunction, dict[str, Any]], ...] = (
    (question_rows.longvideo_reason_row,
     {"problem": PROBLEM, "answer": "<answer>B</answer>", "problem_id": 3, "data_type": "video", "problem_type": "x",
      "reasoning": "<think>so</think>", "videos": ["a.mp4"], "metadata": {"span_s": [1, 2], "tolerance": 0.1}}),
    (question_rows.chat_row, {"messages": CHAT, "videos": []}),
    (question_rows.chat_row,
     {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"function": {"name": "seek", "arguments": "{}"}}]}]}),
    (question_rows.longvideo_reason_row, {"prompt": [CHAT[0]], "completion": [CHAT[1]], "solution": "B"}),
    (published.canonical_row,
     {"question": "What?", "options": ["cat", "dog", "hen"], "answer": 1, "video": "v.mp4", "id": "q",
      "problem_type": "multiple choice", "subtitles": [{"start": 0, "end": 1, "text": "hello"}]}),
    (question_rows.text_math_row, {"question": "How much is 2+2?", "answer": "so #### 4", "type": "algebra"}),
    (question_rows.audio_qa_row,
     {"question": "What is heard?", "choices": ["a", "b"], "answer": "a", "audio": {"path": "a.wav"}}),
    (published.video_mme_row,
     {"videoID": "abc", "question": "Why?", "options": ["A. x", "B. y", "C. z", "D. w"], "answer": "C",
      "duration": "short", "domain": "d", "sub_category": "s", "task_type": "t", "question_id": "001-1"}),
    (published.next_qa_row,
     {"video": "a.mp4", "question": "why", "a0": "x", "a1": "y", "a2": "z", "a3": "v", "a4": "w", "answer": 2,
      "type": "CW", "qid": "1"}),
    (question_rows.geometry_row, {"problem": "Count <image>.", "solution": "<answer>3</answer>", "images": ["a.png"]}),
    (question_rows.clevr_row, {"problem": "Count.", "solution": "<answer>3</answer>", "images": "a.png"}),
    (question_rows.image_row, {"problem": PROBLEM, "answer": "B", "image": {"bytes": [1, 2], "path": "a.png"}}),
    (question_rows.open_ended_row,
     {"problem": "When?", "answer": "1 to 2 s", "videos": {"frames": ["a.png", "b.png"], "fps": 3}}),
    (geneval_row,
     {"prompt": "A bench", "tag": "counting", "include": [{"class": "bench", "count": 2}], "id": 3}),
    (ocr_row, {"prompt": 'A sign that says "open"', "answer": ""}),
    (prompt_row, {"prompt": "A bench", "category": "x"}),
    (published.video_r1_row,
     {"path": "v.mp4", "problem": "What?", "solution": "<answer>B</answer>", "options": ["A. x", "B. y"],
      "problem_type": "multiple choice", "data_type": "video", "problem_id": 1}),
    (published.llava_video_rows,
     {"id": "v", "video": "v.mp4", "data_source": "0_30_s_academic_v0_1", "conversations": [
         {"from": "human", "value": "<image>\nWhat?\nA. x\nB. y"}, {"from": "gpt", "value": "A."}]}),
    (published.clevrer_rows,
     {"video_filename": "v.mp4", "scene_index": 1, "questions": [
         {"question": "What?", "question_id": 0, "question_type": "descriptive", "answer": "yes"},
         {"question": "Why?", "question_id": 1, "question_type": "explanatory",
          "choices": [{"choice": "it moves", "choice_id": 0, "answer": "correct"}]}]}),
    (published.perception_test_rows,
     {"mc_question": [{"id": 0, "question": "What?", "options": ["a", "b", "c"], "answer_id": 1, "area": "x",
                       "reasoning": "y", "tag": ["z"]}], "metadata": {"video_id": "v"}}),
    (published.star_row,
     {"video_id": "v", "question_id": "Interaction_T1_1", "question": "What?", "answer": "x", "start": 1.0, "end": 2.0,
      "choices": [{"choice_id": 0, "choice": "x"}, {"choice_id": 1, "choice": "y"}]}),
    (lmms_eval.lmms_eval_row,
     {"question": "What?", "candidates": ["x", "y"], "answer": "x", "video": "v.mp4", "video_path": "v.mp4"}),
)  # fmt: skip
"""A record of each schema with its row function."""
RECORD_WORDS = (
    *WORDS,
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|im_end|>",
    "data:image/png;base64,iVBO",
    "file://",
    "../../etc",
)
SRT = """1
00:00:01,000 --> 00:00:02,500
<i>Hello</i> there

2
00:00:03,000 --> 00:00:04,000
Bye &amp; good night
"""
VTT = """WEBVTT

NOTE x

00:01.000 --> 00:02.500 align:start
<v Bob>Hello<00:01.500> there

1:00:03.000 --> 1:00:04.000
Bye
"""
SUBTITLE_WORDS = (
    "-->",
    "00:00:01,000",
    "99:99:99,999",
    "0:00.1",
    "\n\n",
    "{\\an8}",
    "<font color=red>",
    "NOTE",
    "STYLE",
    "WEBVTT",
)
FRAME_LIST = {"frames": ["a.png", "b.png"], "fps": 2, "times": [0, 1]}
LINES = [{"start": 0.5, "end": "00:01:05.2", "text": "hello"}, {"timestamp": [1, None], "line": "bye"}]
REPLY = {
    "id": "x",
    "choices": [{"message": {"role": "assistant", "content": "<think>so</think>\nSCORE: 0.5", "refusal": None},
                 "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
}  # fmt: skip
QUESTION = {
    "question": "What happens?", "options": ["A. cat", "B. dog"], "answer": "B",
    "reasoning": [{"start": 1, "end": "0:02", "text": "he walks"}, {"time": "3 to 4 s", "text": "he sits"}],
    "box": {"corners": [1, 2, 3, 4], "time": "1:15"},
}  # fmt: skip
