"""A document of every task folder of lmms-eval 75571cfe whose YAML says `video: True`, in the fields its code reads.

The fields are those that doc_to_visual, doc_to_text, doc_to_target and process_results take; all contents are made up.
"""

from typing import Any

Document = dict[str, Any]

OPTIONS = ["a cup", "a plate", "a bowl"]
LETTERED = ["A. a cup", "B. a plate", "C. a bowl"]
BY_LETTER = dict(zip("ABC", OPTIONS, strict=True))
INLINE = "What falls?\nA. a cup\nB. a plate\nC. a bowl"
ASKED = {"question": "What falls?"}
CHOICE = ("multiple_choice", "B")


def columns(pattern: str) -> Document:
    return {pattern.format(n): option for n, option in enumerate(OPTIONS)}


BY_RULE: dict[str, tuple[Document, tuple[str, str]]] = {
    "FALCONBench": (ASKED | {"question_id": "f1", "options": OPTIONS, "gt_option_idx": 1, "gt_answer": "a plate",
                             "path": "f.mp4", "category": "c", "dataset": "d", "gt_time_interval": [1, 2]}, CHOICE),
    "av_odyssey": (ASKED | {"question_id": 1, "options": LETTERED, "answer": "B", "data_type": "video", "subfield": "s",
                            "video_path": ["a.mp4", "b.mp4"], "audio_path": ["a.wav"], "image_path": []}, CHOICE),
    "av_speakerbench": (ASKED | {"question_id": 1, "choices": str(LETTERED), "answer": "B", "audio_path": "a.wav",
                                 "audio_visual_path": "av/a.mp4", "visual_path": "v/a.mp4", "task_id": "t"}, CHOICE),
    "cgav_counting": ({"index": 1, "question": "How many cups?", "answer": 3, "video": "c.mp4", "category": "object",
                       "type": "t", "clue": "[]", "query_interval": [1, 2]}, ("numeric", "3")),
    "cgbench": (ASKED | {"qid": 1, "video_uid": "c", "choices": OPTIONS, "right_answer": "B", "domain": "d",
                         "sub_category": "s", "duration": 99}, CHOICE),
    "charades_sta": ({"video": "c.mp4", "caption": "a man sits", "timestamp": [1.5, 4.0]},
                     ("temporal_iou", "1.5 to 4 seconds")),
    "cover": (ASKED | {"choices": '{"A": "a cup", "B": "a plate", "C": "a bowl"}', "answer": "b", "video_name": "c.mp4",
                       "src_dataset": "s", "qa_type": "q", "aspect": "a"}, CHOICE),
    "egoschema": (ASKED | {"video_idx": "e", "question_idx": "1", "option": LETTERED, "answer": "1"}, CHOICE),
    "lemonade": ({"QID": "q1", "Question": "What falls?", "Answers": str(OPTIONS), "Correct Answer": "B", "Clip": "l",
                  "Start": "3", "End": "9", "Category": "c", "Subcategory": "s", "Difficulty": "d"}, CHOICE),
    "longtimescope": ({"id": 1, "video": "l.mp4", "input": INLINE, "answer": "B", "length": 36000, "type": "QA"},
                      CHOICE),
    "longvideobench": (ASKED | columns("option{}") | {"id": "l_0", "video_path": "l.mp4", "correct_choice": 1,
                       "option3": "N/A", "option4": "N/A", "duration": 9.5, "question_category": "S2E"}, CHOICE),
    "lsdbench": (ASKED | {"video_id": "l", "options": BY_LETTER, "correct_answer": "B"}, CHOICE),
    "lvbench": (ASKED | {"video_id": "l", "video_path": "l.mp4", "options": OPTIONS, "answer": "B"}, CHOICE),
    "mlvu": ({"video_name": "m.mp4", "question": INLINE, "answer": "B", "task_type": "needle"}, CHOICE),
    "mmou": (ASKED | {"question_id": "m1", "video_id": "m", "video_url": "https://host/m", "options": str(BY_LETTER),
                      "correct_option_letter": "B", "question_type": "q", "domain": "d"}, CHOICE),
    "mmsi_video": ({"user_prompt": f"<video>\n{INLINE}", "task_prompt": "Look.", "system_prompt": "",
                    "format_prompt": "", "video_list": [{"path": "m.mp4"}], "ref_images": [], "ground_truth": "B",
                    "type": "t"}, CHOICE),
    "mmvu": (ASKED | {"id": "m1", "video_path": "videos/Art/0.mp4", "question_type": "multiple-choice", "answer": "B",
                      "choices": BY_LETTER | {"D": "", "E": ""}}, CHOICE),
    "mmworld": (ASKED | {"video_id": "shorts:m", "discipline": "d", "options": dict(zip("abc", OPTIONS, strict=True)),
                         "answer": "It is a plate, as said", "correct_answer_label": "b"}, CHOICE),
    "mvbench": (ASKED | {"video": "m.mp4", "candidates": OPTIONS, "answer": "a plate"}, CHOICE),
    "neptune": (ASKED | columns("answer_choice_{}") | {"key": "n1", "video_path": "n.mp4", "answer_id": 1,
                                                       "question_type": "q"}, CHOICE),
    "nextqa": (ASKED | columns("a{}") | {"video": 401, "qid": 6, "type": "CH", "answer": 1}, CHOICE),
    "osi_bench": (ASKED | {"video": "o", "file_name": "o.mp4", "category": "absolute_speed", "options": [],
                           "answer": "1.25", "video_length": 9}, ("numeric", "1.25")),
    "paibench_u": (ASKED | {"video_path": "p.mp4", "index2ans": BY_LETTER | {"D": None}, "answer": "B", "category": "c",
                            "subcategory": "s"}, CHOICE),
    "perceptioncomp": (ASKED | columns("answer_choice_{}") | {"video_id": "p", "answer_id": "1", "category": "c",
                                                              "answer_choice_3": "", "difficulty": "d"}, CHOICE),
    "perceptiontest": (ASKED | {"video_name": "p", "question_id": "1", "options": OPTIONS, "answer_id": 1, "area": "a",
                                "reasoning": "r", "tag": ["t"]}, CHOICE),
    "revsi": (ASKED | {"scene_id": "r", "num_frames": 32, "question_type": "object_rel_distance", "options": LETTERED,
                       "ground_truth": "B"}, CHOICE),
    "scivideobench": (ASKED | {"video_id": "s", "video_duration": 99.0, "options": BY_LETTER, "answer": "B",
                               "question_type": "q", "category": "c"}, CHOICE),
    "sis_bench": (ASKED | {"question_id": "s1", "video_name": "a/s.mp4", "video_path": "UAVideo/a/s.mp4", "answer": "b",
                           "options": BY_LETTER, "task_type": "t"}, CHOICE),
    "sitebench": (ASKED | {"visual": ["v/s.mp4"], "options": OPTIONS, "answer": "B", "category": "c", "dataset": "d"},
                  CHOICE),
    "spatialtreebench": (ASKED | {"id": "s1", "video": ["v/s.mp4"], "video_info": [{"frame_index": [0]}], "hint": "",
                                  "option": LETTERED, "answer": "B", "extra_info": "{}"}, CHOICE),
    "tempcompass": ({"video_id": "t", "question": INLINE, "answer": "B. a plate", "dim": "action"}, CHOICE),
    "temporalbench": ({"idx": "t1", "video_name": "t.mp4", "question": INLINE, "GT": "B", "dataset": "d",
                       "category": "c"}, CHOICE),
    "timelens": ({"video_path": "charades/t.mp4", "query": "a man sits", "span": [[1.5, 4.0]]},
                 ("temporal_iou", "1.5 to 4 seconds")),
    "timescope": ({"id": 1, "video": "t.mp4", "input": INLINE, "answer": "B", "length": 60, "type": "OCR"}, CHOICE),
    "tomato": (ASKED | {"id": "t1", "video_path": "t.mp4", "options": OPTIONS, "answer": 1, "reason_type": "count",
                        "demonstration_type": "human"}, CHOICE),
    "tvbench": (ASKED | {"video": "t.mp4", "candidates": OPTIONS, "answer": "a plate"}, CHOICE),
    "video-tt": (ASKED | {"question_id": "v1", "video_id": "v", "options": str(LETTERED), "answer": "B",
                          "capability": "c", "question_prompt": "Choose."}, CHOICE),
    "video_holmes": ({"video ID": "v", "Question ID": 1, "Question": "What falls?", "Options": BY_LETTER, "Answer": "B",
                      "Question Type": "SR"}, CHOICE),
    "videoevalpro": (ASKED | {"video": "v.mp4", "options": LETTERED, "answer": "B", "answer_text": "a plate",
                              "qa_type": "q"}, CHOICE),
    "videomathqa": (ASKED | {"question_id": 1, "videoID": "v", "options": LETTERED, "answer": "B", "category": "c",
                             "length": "short"}, CHOICE),
    "videomme": (ASKED | {"question_id": "1", "videoID": "v", "options": LETTERED, "answer": "B", "duration": "short",
                          "domain": "d", "sub_category": "s", "task_type": "t"}, CHOICE),
    "videomme_v2": (ASKED | {"question_id": "1", "video_id": "v", "options": "\n".join(LETTERED), "answer": "B",
                             "group_type": "g", "group_structure": "s", "level": 1}, CHOICE),
    "vsibench": (ASKED | {"id": 1, "dataset": "scannet", "scene_name": "v", "question_type": "room_size_estimation",
                          "options": None, "ground_truth": "21.5"}, ("numeric", "21.5")),
    "vsisuper": (ASKED | {"video_path": "v.mp4", "options": LETTERED, "answer": "B", "type": "10mins"}, CHOICE),
    "vstat": (ASKED | {"video_id": "v", "video_path": "v.mp4", "choices": [], "answer": "4", "answer_type": "numeric",
                       "answer_index": None, "source_task": "s"}, ("numeric", "4")),
    "worldqa": (ASKED | {"video_idx": "w", "question_idx": "1", "option": LETTERED, "answer": "B. a plate",
                         "object_description": "o"}, CHOICE),
    "worldsense": (ASKED | {"index": 1, "video_path": "w.mp4", "candidates": LETTERED, "answer": "B",
                            "duration": "1min", "task_type": "t", "task_domain": "d",
                            "subtitle_path": "w.srt"}, CHOICE),
}  # fmt: skip
"""Task -> a document, and the task and the answer of its row: rules judge them."""

BY_JUDGE: dict[str, Document] = {
    "activitynetqa": ASKED | {"video_name": "a", "question_id": "a_1", "answer": "plates", "type": 5},
    "cvrr": {"Q": "What falls?", "A": "A plate falls.", "VideoID": "c.mp4", "DimensionName": "Partial actions"},
    "funqa": ASKED | {"video_name": "f.mp4", "answer": "A plate falls.", "task": "H2", "prompt": "Judge it."},
    "longvt": ASKED | {"video_path": "l.mp4", "answer": "A plate falls."},
    "mix_evals": {"id": "1", "query": "What falls?", "reference_answer": ["a plate", "plate"], "input_file": ["m.mp4"]},
    "moviechat": ASKED | {"video_name": "m.mp4", "answer": "A plate falls.", "time": 12},
    "video_detail_description": ASKED | {"video_name": "v", "answer": "A plate falls."},
    "videochatgpt": {"video_name": "v", "question_1": "What falls?", "question_2": "None", "answer": "A plate falls."},
    "worldvqa": ASKED | {"image": "w.jpg", "answer": "a plate"},
}
"""Task -> a document whose answer is in one's own words."""

NOT_READ: dict[str, tuple[Document, str]] = {
    "camerabench_vqa": ({"Index": 1, "Video": "c.mp4", "Question": "Does it pan?", "Question_Type": "yes_no"},
                        "the answer follows from the document's place among four"),
    "capability": ({"file_id": "c", "file_path": "data/c.mp4", "data_type": "video", "task": "t", "annotation": "x"},
                   "captioning: code has the prompt"),
    "cuva": ({"video_name": "c.mp4", "task": "Cause", "answer": "x"}, "code has the question"),
    "egoplan": ({"sample_id": 1, "task_goal": "make tea", "choice_a": "pour", "choice_b": "boil", "answer": "B"},
                "code has the question, and the video is named by `sample_id`"),
    "jumpscore": (ASKED | {"video_path": "j.mp4", "answer": '[["0.5", "0.9"], ["1.2", "1.6"]]'},
                  "the answer is a list of moments, scored by mAP"),
    "megabench": ({"id": 1, "task_name": "t", "query_text": "What falls?", "query_media": "['m.mp4']",
                   "answer": "['x']", "eval_context": "{}"}, "505 tasks with metrics of their own"),
    "physical_conflict": (ASKED | {"sample_id": "p", "qa_id": "q", "answer_type": "single_choice",
                                   "options": [{"id": "A", "text": "a cup"}, {"id": "B", "text": "a plate"}]},
                          "hidden answers"),
    "pushupbench": ({"video_path": "p.mp4", "name": "push_ups", "count": [12]}, "code has the question"),
    "rvos": ({"video": "r", "expression": "the cat", "frame_trajectories": "[]", "width": 9, "height": 9, "fps": 6},
             "points or masks of an object in every frame"),
    "vatex": ({"videoID": "v", "enCap": ["x"]}, "captioning"),
    "vbvr": ({"prompt": "Move it.", "first_image": "w.jpg", "ground_truth_video_path": "v.mp4"},
             "a video is generated"),
    "vdc": ({"video_name": "v", "caption": "x"}, "captioning"),
    "videommmu": (ASKED | {"id": "dev_Art_1", "options": OPTIONS, "answer": "B", "question_type": "multiple-choice"},
                  "the id alone names the video: `video_mmmu_*_row` reads it"),
    "vinoground": ({"index": "1_pos_text", "major": "m", "minor": "n"}, "question and answer are in other files"),
    "vitatecs": ({"video_name": "v.mp4", "src_dataset": "s", "caption": "x", "counterfactual": "y", "aspect": "a"},
                 "code makes a question of two captions"),
    "youcook2": ({"video_path": "y.mp4", "youtube_id": "y", "segment": [1, 2], "sentence": "x"}, "captioning"),
}  # fmt: skip
"""Task -> a document, and why it is no question that a rule or a judge could score."""
