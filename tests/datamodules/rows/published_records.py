"""Records in the schemas of published sets, with the oddities they are released with; all contents are made up."""

from typing import Any

Record = dict[str, Any]

OPTIONS = "\nA. He waters the plant.\nB. He feeds the cat.\nC. He paints the door.\nD. He reads aloud."


def longvideo_reason(number: int, **changes: Any) -> Record:
    """A whole record of LongVideo-Reason's test split."""
    return {
        "problem_id": number,
        "problem": f"What does the man do after lunch?{OPTIONS}",
        "data_type": "video",
        "problem_type": "temporal",
        "reasoning": "I check the video after the meal. He takes a can and goes to the window.",
        "videos": f"longvila_videos/{number}.mp4",
        "answer": "<answer>A</answer>",
        **changes,
    }


def longvideo_reason_test() -> list[Record]:
    """Ten records: five whole ones in three containers, and the five kinds of malformed ones of the released split."""
    thoughts = "But the viewer must weigh several scenes here, so the options should be harder. Let me think again."
    return [
        longvideo_reason(1),
        longvideo_reason(2, videos="longvila_videos/2.webm", problem_type="spatial", answer="<answer> b </answer>"),
        longvideo_reason(3, videos="longvila_videos/3.mkv", problem_type="goal", answer="<answer>C</answer>"),
        longvideo_reason(4, problem_type="plot"),
        longvideo_reason(5, videos="longvila_videos/1.mp4", answer="<answer>D</answer>"),  # a second question on 1
        # 147, 743, 825: the writer's own deliberation stands where options should be.
        longvideo_reason(147, problem=f"Why does he stay?\nA. {thoughts}"),
        longvideo_reason(743, problem=f"What decides the outcome?\nC. {thoughts}", answer="<answer>C</answer>"),
        longvideo_reason(825, problem=f"What decides the outcome?\nB. {thoughts}\nD. {thoughts}"),
        # 379, 857: no options at all.
        longvideo_reason(379, problem="Who stands beside the car?\n\n", answer="<answer>C</answer>"),
        longvideo_reason(857, problem="Where is the key kept?\n\n", answer="<answer>B</answer>"),
    ]


def video_mme(**changes: Any) -> Record:
    return {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many candles burn on the table?",
        "options": ["A. Two.", "B. Three.", "C. Four.", "D. Five."],
        "answer": "C",
        **changes,
    }


def llava_video(**changes: Any) -> Record:
    return {
        "id": "1234-5678",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nWhat colour is the kite?\nA. Red.\nB. Green.\n"
                "Please respond with only the letter of the correct answer.",
            },
            {"from": "gpt", "value": "B."},
            {
                "from": "human",
                "value": "Who holds the kite?\nA. A girl.\nB. A boy.\n"
                "Please provide your answer by stating the letter followed by the full option.",
            },
            {"from": "gpt", "value": "A. A girl."},
        ],
        "data_source": "0_30_s_youtube_v0_1",
        "video": "liwei_youtube_videos/videos/youtube_video_2024/ytb_abc.mp4",
        **changes,
    }


def next_qa(**changes: Any) -> Record:
    return {
        "video": 4010069381,
        "frame_count": 369,
        "width": 640,
        "height": 480,
        "question": "how do the two men play the instrument",
        "answer": 3,
        "qid": 6,
        "type": "CH",
        "a0": "roll the handle",
        "a1": "tap their feet",
        "a2": "strum the string",
        "a3": "hit with sticks",
        "a4": "pat with hand",
        **changes,
    }


def perception_test_question(**changes: Any) -> Record:
    return {
        "video_name": "video_1580",
        "question_id": "121",
        "question": "Is the camera moving or static?",
        "options": ["static or shaking", "moving", "I don't know"],
        "answer_id": 0,
        "area": "physics",
        "reasoning": "descriptive",
        "tag": ["motion"],
        **changes,
    }


def perception_test_video() -> Record:
    """As the annotations are released: all questions on a video under its name."""
    asked = {
        key: value for key, value in perception_test_question().items() if key not in ("video_name", "question_id")
    }
    return {
        "metadata": {"split": "valid", "video_id": "video_1580", "num_frames": 300, "frame_rate": 30.0},
        "mc_question": [
            {"id": 34, **asked},
            {"id": 35, **asked, "answer_id": 2},
            {"id": 36, **asked, "answer_id": None},
        ],
        "object_tracking": [],
    }


def clevrer() -> Record:
    """A scene with a question of every type; the last has no answer, as in the hidden test split."""

    def choices(*right: bool) -> list[Record]:
        return [
            {"choice_id": n, "choice": f"Event {n} takes place", "program": [], "answer": "correct" if yes else "wrong"}
            for n, yes in enumerate(right)
        ]

    asked = [
        {"question_type": "descriptive", "question_subtype": "count", "question": "How many balls?", "answer": "3"},
        {"question_type": "descriptive", "question_subtype": "exist", "question": "Is there a cube?", "answer": "yes"},
        {"question_type": "predictive", "question": "What comes next?", "choices": choices(False, True)},
        {"question_type": "explanatory", "question": "What is it due to?", "choices": choices(True, False, True)},
        {"question_type": "counterfactual", "question": "Without the ball?", "choices": choices(False, False)},
        {"question_type": "descriptive", "question_subtype": "query_color", "question": "Which colour?"},
    ]
    questions = [{"question_id": n, "program": [], **item} for n, item in enumerate(asked)]
    return {"scene_index": 10009, "video_filename": "video_10009.mp4", "questions": questions}


def star(**changes: Any) -> Record:
    wordings = ("The sandwich.", "The medicine.", "The blanket.", "The box.")
    return {
        "question_id": "Interaction_T1_4",
        "question": "Which object was eaten by the person?",
        "video_id": "TJZ0P",
        "start": 1.0,
        "end": 3.0,
        "answer": "The medicine.",
        "question_program": [{"function": "Situations", "value_input": []}],
        "choices": [{"choice_id": n, "choice": text, "choice_program": []} for n, text in enumerate(wordings)],
        "situations": {
            "000245": {"rel_pairs": [["o000", "o006"]], "actions": ["a051"], "bbox": [[1.0, 2.0, 3.0, 4.0]]}
        },
        **changes,
    }


def clevr(**changes: Any) -> Record:
    return {
        "images": ["images/0.png"],
        "problem": "<image>How many different items are there in the image?",
        "answer": "7",
        **changes,
    }


def geometry(**changes: Any) -> Record:
    return {"images": ["images/1.png"], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }", **changes}


def canonical(**changes: Any) -> Record:
    return {
        "id": "q1",
        "video": "clips/a.webm",
        "question": "What falls?",
        "options": ["a cup", "a plate"],
        "answer": "a plate",
        "problem_type": "plot",
        "subtitles": "clips/a.srt",
        "metadata": {"video_id": "a", "domain": "home"},
        **changes,
    }
