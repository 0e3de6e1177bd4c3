"""How benchmarks' released code reads answers; the expected readings are those of that code, run on the same texts.

20,000 random texts of such pieces gave no other reading either, by any of these rules: of LVBench f998d95, MLVU
fd060c1, Video-MME-v2 b24176a, MVBench's notebook, Video-Holmes 52ef8da and, for the others, lmms-eval 75571cfe.
"""

import time

import pytest
import torch

from longrl.evaluation.option_rules import (
    ego_schema_option,
    longvideobench_letter,
    lvbench_letter,
    mlvu_option,
    mvbench_option,
    temp_compass,
    video_holmes_letter,
    video_mme_v2_letter,
)
from longrl.types import Completion, Row

PROBLEM = "Which?\nA. a red cat\nB. dog\nC. Bike\nD. the end\nE. every Egg"
RULES = {
    "lvbench": lvbench_letter, "mlvu": mlvu_option, "longvideobench": longvideobench_letter,
    "video_mme_v2": video_mme_v2_letter, "mvbench": mvbench_option, "ego_schema": ego_schema_option,
    "video_holmes": video_holmes_letter,
}  # fmt: skip
READINGS = [  # text, and of which of the rules in their order it is B
    ("B", "yyyyyyy"),
    ("(B) dog", "yyyyyyy"),
    ("B) dog", "yyyyyny"),
    ("B. dog", "ynyyyyy"),
    ("The answer is B", "nnyynyy"),
    ("Because B is right", "ynyynyy"),
    ("Blue", "ynyynny"),
    ("**B**", "nnyynny"),
    ("b", "nnnnynn"),
    ("", "nnnnynn"),
    ("A or B", "nnnnnnn"),
    ("Final Answer: B", "nnnynyn"),
    ("<think>A? No.</think>\nB", "yyyyyyn"),
    ("<answer>B: dog</answer>", "nnyynny"),
]


def scored(rule, text, answer="B", problem=PROBLEM, **metadata):
    none = torch.empty(0, dtype=torch.int64)
    return rule(Completion(none, torch.empty(0), text, "stop"), Row("1", problem, answer, metadata=metadata))


@pytest.mark.parametrize(("text", "right"), READINGS)
def test_what_is_read_as_b(text, right):
    assert "".join("ny"[int(scored(rule, text))] for rule in RULES.values()) == right


def test_an_option_of_ego_schema_is_known_by_its_line_where_no_letter_stands():
    assert scored(ego_schema_option, "i think that it is b. dog, surely") == 1.0
    assert scored(ego_schema_option, "it is b. dog") == 0.0  # too short for that


YES_NO = {"task_type": "yes_no"}
MATCHING = {"task_type": "caption_matching"}
CAPTIONS = "Which one?\nOption 1: A cat runs.\nOption 2: A dog sits."


@pytest.mark.parametrize(
    ("text", "answer", "problem", "metadata", "right"),
    [
        ("Yes, he is", "yes", "Is he?", YES_NO, 1),
        ("No.", "no", "Is he?", YES_NO, 1),
        ("He is: yes", "yes", "Is he?", YES_NO, 0),
        ("nothing", "no", "Is he?", YES_NO, 1),
        ("Option 2: A dog sits.", "Option 2: A dog sits.", CAPTIONS, MATCHING, 1),
        ("Option 2", "Option 2: A dog sits.", CAPTIONS, MATCHING, 1),
        ("2.", "Option 2: A dog sits.", CAPTIONS, MATCHING, 1),
        ("A dog sits.", "Option 2: A dog sits.", CAPTIONS, MATCHING, 1),
        ("b) A dog sits.", "Option 2: A dog sits.", CAPTIONS, MATCHING, 1),
        ("Option 1", "Option 2: A dog sits.", CAPTIONS, MATCHING, 0),
        ("A dog sits", "Option 2: A dog sits.", CAPTIONS, MATCHING, 0),
        ("B", "B", PROBLEM, {"task_type": "multi-choice"}, 1),
        ("B. cat", "B", PROBLEM, {"task_type": "multi-choice"}, 1),
        ("B) dog", "B", PROBLEM, {"task_type": "multi-choice"}, 1),
        ("(B) dog", "B", PROBLEM, {"task_type": "multi-choice"}, 0),
    ],
)
def test_kinds_of_temp_compass(text, answer, problem, metadata, right):
    assert scored(temp_compass, text, answer, problem, **metadata) == right


@pytest.mark.parametrize("piece", ["the answer is ", "A ", "<answer>", "Z(", ") ("])
def test_rules_are_quick_on_long_answers(piece):
    text = (piece * 50_000)[:50_000]
    for rule in (*RULES.values(), temp_compass):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            scored(rule, text)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.25  # 50 ms are allowed; this machine may be busy
