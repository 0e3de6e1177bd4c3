"""Records of benchmarks in the form in which they are released; all contents are made up."""

from typing import Any

Record = dict[str, Any]

CHARADES = ("A1B2C 2.0 6.5##a person opens a window.", "A1B2C 0.0 4.0##a person waters a plant.")
"""Lines of charades_sta_test.txt."""


def timelens() -> Record:
    """A file of TimeLens-Bench: videos by name, each with its sentences."""
    return {
        "A1B2C": {
            "duration": 8.0,
            "spans": [[2.0, 6.5], [0.0, 4.0]],
            "queries": ["a person opens  a window.", "a person waters a plant"],
        },
        "v_abcdefghijk": {"duration": 60.0, "spans": [[5.0, 9.0]], "queries": ["a dog runs"]},
        "abc_60.0_210.0": {"duration": 150.0, "spans": [[10.0, 30.0]], "queries": ["a cook talks"]},
    }


def vsi_bench(kind: str, truth: str, options: list[str] | None = None, number: int = 0) -> Record:
    return {
        "id": number,
        "dataset": "scannet",
        "scene_name": "scene0",
        "question_type": kind,
        "question": "How many lamps are in this room?",
        "ground_truth": truth,
        "options": options,
    }


def cg_bench(**changes: Any) -> Record:
    return {
        "qid": 7,
        "video_uid": "abc",
        "question": "What colour is the kite?",
        "answer": "Red",
        "choices": ["Blue", "Red", "Green"],
        "right_answer": "B",
        "clue_intervals": [[1, 2], [3, 4]],
        "domain": "Life Record",
        "sub_category": "Entity Perception",
        "duration": 2741,
        **changes,
    }


def video_mmmu(track: str) -> Record:
    """A file of VideoMMMU: one track, whose questions have numbers as names."""
    question = {
        "id": "dev_Art_Theory_3",
        "link_selected": "https://www.youtube.com/watch?v=abc",
        "question": "What does the lecture call this?",
        "options": ["hue", "value", "chroma"],
        "answer": "C",
    }
    if track != "Adaptation":
        return {track: {"0": question}}
    asked = {**question, "question": "<image 1> Which one is shown?", "question_type": "multiple-choice"}
    number = {
        **question, "id": "test_Math_12", "question": "<image 1> What is x?", "options": [], "question_type": "open",
        "answer": "['24/7', '3.429', '3.43]",
    }  # fmt: skip
    return {track: {"0": asked, "1": number}}


def mmvu(**changes: Any) -> Record:
    return {
        "id": "validation_1",
        "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Chemistry/0.mp4",
        "youtube_url": "https://www.youtube.com/watch?v=abc",
        "question_type": "multiple-choice",
        "metadata": {"subject": "Modern Physics", "textbook": "A book", "rationale": "So.", "knowledge": []},
        "question": "Which effect is shown?",
        "choices": {"A": "one", "B": "two", "C": "three", "D": "four", "E": "five"},
        "answer": "B",
        **changes,
    }


MMVU_OPEN = mmvu(
    id="validation_2", question_type="open-ended", choices=dict.fromkeys("ABCDE", ""), answer="Interference"
)


def activitynet_qa() -> tuple[list[Record], list[Record]]:
    """The files of questions and of answers."""
    asked = [("is the man outdoors", "yes", 3), ("what does the man do", "swim", 0), ("what colour is it", "red", 4)]
    questions = [
        {"video_name": "abc", "question": text, "question_id": f"v_abc_{n}"} for n, (text, *_) in enumerate(asked)
    ]
    answers = [
        {"answer": answer, "type": kind, "question_id": f"v_abc_{n}"} for n, (_, answer, kind) in enumerate(asked)
    ]
    return questions, answers
