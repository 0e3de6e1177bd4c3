"""Row functions of benchmarks of order and reasoning: MVBench, TempCompass, EgoSchema and Video-Holmes.

As `long_video_sets.py` has them for long videos.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from longrl.datamodules.rows.long_video_sets import HIDDEN, HIDDEN_MARK, asked_with_options, candidates_choice
from longrl.datamodules.rows.published import each_row, option_index, options_by_letter, shown_span, video_row
from longrl.datamodules.rows.question_rows import (
    first_field,
    media_field,
    missing_field_error,
    record_id,
    text_field,
)
from longrl.datamodules.rows.sources import NAME_FIELD, Record
from longrl.types import Row

MVBENCH_FOLDERS = {
    "Action Sequence": "star/Charades_v1_480", "Action Prediction": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video", "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test", "Object Existence": "clevrer/video_validation",
    "Object Interaction": "star/Charades_v1_480", "Object Shuffle": "perception/videos",
    "Moving Direction": "clevrer/video_validation", "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video", "Action Count": "perception/videos",
    "Moving Count": "clevrer/video_validation", "Moving Attribute": "clevrer/video_validation",
    "State Change": "perception/videos", "Fine-grained Pose": "nturgbd", "Character Order": "perception/videos",
    "Egocentric Navigation": "vlnqa", "Episodic Reasoning": "tvqa/frames_fps3_hq",
    "Counterfactual Inference": "clevrer/video_validation",
}  # fmt: skip
"""The twenty tasks of MVBench -> the folder of their videos."""
MVBENCH_SPANS = (
    "Action Sequence", "Action Prediction", "Object Interaction", "Action Localization", "Episodic Reasoning",
)  # fmt: skip
"""Tasks that ask about a part of a video."""
MVBENCH_FRAMES_FPS = 3
"""Of Episodic Reasoning, whose videos are folders of frames."""
TEMP_COMPASS_DIRECTIONS = {
    "multi-choice": "Please directly give the best option:",
    "yes_no": "Please answer yes or no:",
    "caption_matching": "Please directly give the best option:",
    "captioning": "",
}
"""Task of TempCompass -> what its authors write behind a question (`{instruction}` of `data.question_template`)."""
TEMP_COMPASS_ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
EGO_SCHEMA_OPTIONS = tuple(f"option {number}" for number in range(5))


# -------------------------------------------------------------------------------------------------------------- MVBench


def mvbench_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of MVBench (arXiv:2311.17005), of one of its twenty files.

    A file says by its name alone which task it is of, so its source must: `fields: {task_type: Action Sequence}` beside
    `source`. Of five tasks only `start` to `end` (seconds) is read; the videos of one are folders of frames, three a
    second. Videos lie under the media root in the folders of `MVBENCH_FOLDERS`, as the archives unpack.
    """
    task = text_field(record, "task_type", index)
    if task not in MVBENCH_FOLDERS:
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): 'task_type' must be one of "
            f"{', '.join(MVBENCH_FOLDERS)}, got {task!r}; correct the fields of its source in data.test"
        )
    choice = candidates_choice(record, index)
    question = text_field(record, "question", index)
    video = os.path.join(MVBENCH_FOLDERS[task], text_field(record, "video", index))
    fields: dict[str, Any] = {
        "id": f"{task}-{index}",
        "question": question,
        **choice,
        "task": "multiple_choice",
        "category": task,
        "metadata": {
            "video_id": video,
            "span_s": shown_span(record, index) if task in MVBENCH_SPANS else None,
            "asked": asked_with_options(question, choice["options"]),
        },
    }
    if task == "Episodic Reasoning":
        frames = {"video": video, "fps": MVBENCH_FRAMES_FPS}
        fields["videos"] = media_field(frames, "video", "video", index, media_root)
    return video_row(record, index, media_root, video, fields)


# ---------------------------------------------------------------------------------------------------------- TempCompass


def temp_compass_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """Questions of TempCompass (arXiv:2403.00476): of a video, as its files have them by aspect, or one of the hub's.

    What kind of question they are no record says, so their source does: `fields: {task_type: yes_no}`, or multi-choice,
    caption_matching, captioning. A choice is judged by its option, yes or no exactly, and a caption by a judge that
    sees nothing else of the video (`configs/eval/temp_compass_captioning.yaml`): a record of the hub has the question
    for it, `mc_question`, and its answer, `mc_answer`; of the files the answer alone is there.
    The category is the temporal aspect (`dim`); the metadata has `task_type`.
    """
    task = text_field(record, "task_type", index)
    if task not in TEMP_COMPASS_DIRECTIONS:
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): 'task_type' must be one of "
            f"{', '.join(TEMP_COMPASS_DIRECTIONS)}, got {task!r}; correct the fields of its source in data.test"
        )
    video = first_field(record, "video_id", NAME_FIELD)
    if video is None:
        raise missing_field_error(record, index, "video_id")
    by_aspect = {aspect: record[aspect] for aspect in TEMP_COMPASS_ASPECTS if isinstance(record.get(aspect), list)}
    items = [
        {**item, "dim": aspect} if isinstance(item, Mapping) else item
        for aspect, asked in by_aspect.items()
        for item in asked
    ] or [record]

    def row(item: Mapping[str, Any], position: int) -> Row:
        known = _temp_compass(item, task, index)
        fields = {
            "id": f"{task}-{video}-{position if by_aspect else index}",
            "options": None,
            "category": text_field(item, "dim", index),
            "metadata": {
                "video_id": str(video),
                "task_type": task,
                "instruction": TEMP_COMPASS_DIRECTIONS[task] or None,
                "aliases": known.pop("aliases", None),
            },
            **known,
        }
        return video_row(item, index, media_root, str(video), fields)

    return each_row(items, index, row)


def _temp_compass(item: Mapping[str, Any], task: str, index: int) -> dict[str, Any]:
    """Answer and task of one kind, and what else says the answer."""
    answer = text_field(item, "answer", index)
    if task == "multi-choice":
        return {"answer": answer.partition(".")[0], "task": "multiple_choice"}
    if task == "yes_no":
        if answer.lower() not in ("yes", "no"):
            raise ValueError(
                f"record {index} (id {record_id(item, index)!r}): 'answer' must be yes or no, got {answer!r:.100}; "
                "correct it, or the task_type in the fields of its source in data.test"
            )
        return {"answer": answer.lower(), "task": "exact"}
    if task == "captioning":
        asks_judge = item.get("mc_question")
        right = first_field(item, "mc_answer", default=answer)
        return {"answer": f"{asks_judge}\n{right}" if asks_judge else right, "task": "open_ended"}
    # "Caption A: ..", "Sentence A: .." or "Option 1: ..": label, letter or number alone will do, and so the sentence.
    label, _, sentence = answer.partition(": ")
    if not sentence:
        raise ValueError(
            f"record {index} (id {record_id(item, index)!r}): 'answer' must be 'Caption A: ..' with its sentence, got "
            f"{answer!r:.100}; correct it"
        )
    short = label.rpartition(" ")[2]
    return {"answer": answer, "task": "exact", "aliases": [sentence, label, short, f"{short}."]}


# ------------------------------------------------------------------------------------------------------------ EgoSchema


def ego_schema_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of EgoSchema (arXiv:2308.09126) with its answer, the index of one of five options from 0 on.

    The hub's Subset has `option`, with letters, `video_idx` and `answer`; a record of `questions.json` (`q_uid`,
    `option 0` to `option 4`) may have got its `answer` from `subset_answers.json`.
    """
    fields = {"answer": option_index(record, "answer", index), "task": "multiple_choice"}
    return _ego_schema(record, index, media_root, fields, {})


def ego_schema_hidden_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of all 5,031, whose answers EgoSchema's server knows: of `questions.json`, or of the hub."""
    return _ego_schema(record, index, media_root, HIDDEN, HIDDEN_MARK)


def _ego_schema(
    record: Record, index: int, media_root: str | None, fields: Mapping[str, Any], mark: Mapping[str, Any]
) -> Row:
    name = first_field(record, "q_uid", "video_idx")
    if name is None:
        raise missing_field_error(record, index, "q_uid", ", and so is 'video_idx'")
    options = record.get("option") or [record.get(column) for column in EGO_SCHEMA_OPTIONS]
    known = {"id": str(name), "options": options, "category": "egoschema", "metadata": dict(mark)}
    return video_row(record, index, media_root, str(name), known | dict(fields))


# --------------------------------------------------------------------------------------------------------- Video-Holmes


def video_holmes_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of Video-Holmes (arXiv:2505.21374): six options by letter, asked in one line by its authors (`asked`).

    The category is the `Question Type`: SR, IMC, TCI, TA, MHR, PAR or CTI. `Explanation` is the reasoning.
    """
    options = record.get("Options")
    if not isinstance(options, Mapping) or not options:
        raise missing_field_error(record, index, "Options", ": options by letter")
    video, number = text_field(record, "video ID", index), text_field(record, "Question ID", index)
    question = text_field(record, "Question", index)
    given = options_by_letter(options, record, index)
    listed = ", ".join(f"{letter}: {wording}" for letter, wording in given.items())
    fields = {
        "id": f"{video}-{number}",
        "question": question,
        "options": [f"{letter}. {wording}" for letter, wording in given.items()],
        "answer": text_field(record, "Answer", index),
        "task": "multiple_choice",
        "category": text_field(record, "Question Type", index),
        "reasoning": record.get("Explanation"),
        "metadata": {"asked": f"The question is: {question}. The options are: {listed}"},
    }
    return video_row(record, index, media_root, video, fields)
