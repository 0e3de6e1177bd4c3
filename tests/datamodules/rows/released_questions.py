"""Questions of LVBench, MLVU, LongVideoBench, Video-MME-v2, MVBench, TempCompass, EgoSchema and Video-Holmes.

Fields and spellings are the released ones; all contents are made up.
"""

from typing import Any

Record = dict[str, Any]
THINGS = ("pot", "cup", "pan", "lid", "jug")


def lvbench() -> Record:
    """A line of `video_info.meta.jsonl`: a video with three questions, the last of which has no answer."""
    question = "What does the baker sell?\n(A) Bread\n(B) Shoes\n(C) Maps\n(D) Rope"
    asked = {"uid": "7", "question": question, "answer": "C", "time_reference": "10:00-11:00"}
    return {
        "key": "abcDEF12345", "type": "cartoon",
        "qa": [
            {**asked, "question_type": ["entity recognition", "reasoning"]},
            {**asked, "uid": "8", "question_type": ["summarization"], "answer": "A"},
            {**asked, "uid": "9", "question_type": ["reasoning"], "answer": ""},
        ],
        "video_info": {"duration_minutes": 61.2, "fps": 25.0, "resolution": {"width": 640, "height": 360}},
    }  # fmt: skip


def mlvu(**changes: Any) -> Record:
    return {
        "video": "movie_1.mp4", "duration": 412.5, "question": "What is on the table?",
        "candidates": ["A vase", "A hat", "A fish", "A key"], "answer": "A hat", "question_type": "plotQA", **changes,
    }  # fmt: skip


def mlvu_scene() -> Record:
    return {
        "video": "scene_3.mp4", "duration": 900.0, "question": "Describe the scene at the harbour.",
        "answer": "A man ties a boat and whistles.", "question_type": "subPlot",
        "scoring_points": ["A man ties a boat", "He whistles"],
    }  # fmt: skip


def longvideobench(**changes: Any) -> Record:
    return {
        "video_id": "abc", "video_path": "abc.mp4", "subtitle_path": "abc_en.json", "id": "abc_0", "duration": 4.0,
        "question": "When she waves, what is behind her?", "candidates": ["A tree", "A car", "A wall", "A dog"],
        "correct_choice": 2, "question_category": "T2O", "topic_category": "KH-Knowledge-History", "duration_group": 15,
        "starting_timestamp_for_subtitles": 0, "position": [12], "view_count": 3, **changes,
    }  # fmt: skip


def video_mme_v2(number: int, video: str = "001", kind: str = "logic", **changes: Any) -> Record:
    return {
        "video_id": video, "url": "https://www.youtube.com/watch?v=x", "group_type": kind,
        "group_structure": "[1, [2, 3], 4]" if kind == "logic" else "[1, 2, 3, 4]", "question_id": f"{video}-{number}",
        "question": f"What happens in step {number}?",
        "options": "\n".join(f"{letter}. Event {letter}." for letter in "ABCDEFGH"), "answer": "E",
        "level": "2" if number == 4 else None, "second_head": "Order" if number == 4 else None,
        "third_head": "Event order" if number == 4 else None, **changes,
    }  # fmt: skip


def mvbench(**changes: Any) -> Record:
    return {
        "video": "ABC12.mp4", "question": "What happened after the person took the bag?",
        "candidates": ["Ate the apple.", "Closed the door.", "Sat down."], "answer": "Closed the door.",
        "question_id": "Interaction_T1_1", "start": 1.0, "end": 3.0, "task_type": "Action Sequence", **changes,
    }  # fmt: skip


def temp_compass_file() -> Record:
    """A video of `questions/multi-choice.json`, under whose name its aspects stand."""
    asked = "What is the boy doing?\nA. running\nB. jumping\nC. resting"
    return {
        "123456": {
            "action": [{"question": asked, "answer": "B. jumping"}, {"question": asked, "answer": "B. jumping"}],
            "speed": [{"question": "How fast?\nA. slow motion\nB. normal speed", "answer": "A. slow motion"}],
        }
    }


def temp_compass(kind: str) -> Record:
    """A row of the hub, whose source says its kind."""
    by_kind = {
        "yes_no": {"question": "Is the boy jumping?", "answer": "yes"},
        "caption_matching": {
            "question": "Which caption matches the video better?\nCaption A: A boy rests.\nCaption B: A boy jumps.",
            "answer": "Caption B: A boy jumps.",
        },
        "captioning": {
            "question": "Write a caption.\nInformation A: {'action': 'jumping'}\nGenerated Caption:",
            "answer": "A. jumping", "mc_question": "What is he doing?\nA. jumping\nB. resting",
            "mc_answer": "A. jumping",
        },
    }  # fmt: skip
    return {"video_id": "123456", "dim": "action", "task_type": kind, **by_kind[kind]}


def ego_schema(**changes: Any) -> Record:
    """A row of the hub's Subset."""
    options = [f"{letter}. C cleans the {thing}." for letter, thing in zip("ABCDE", THINGS, strict=True)]
    return {
        "question_idx": "1", "question": "What is C's aim?", "video_idx": "0074f737", "option": options, "answer": "3",
        **changes,
    }  # fmt: skip


def ego_schema_file(**changes: Any) -> Record:
    """A record of `questions.json`."""
    options = {f"option {number}": f"C cleans the {thing}." for number, thing in enumerate(THINGS)}
    return {"q_uid": "0074f737", "google_drive_id": "x", "question": "What is C's aim?", **options, **changes}


def video_holmes(**changes: Any) -> Record:
    wordings = ["Cleaners", "Cousins", "Rivals", "Strangers", "Officers", "Actors"]
    return {
        "video ID": "RSm", "Question ID": 1, "Question Type": "SR", "Question": "Who are the two?",
        "Options": dict(zip("ABCDEF", wordings, strict=True)), "Answer": "C",
        "Explanation": "They race each other.", **changes,
    }  # fmt: skip
