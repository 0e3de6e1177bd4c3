"""200 outputs, scored as lmms-eval and VLMEvalKit score them, and as a reader does.

The figures of `peer_scores.json` were computed by the released code itself (`tests/harness/peer_figures.py`): lmms-eval
75571cfe `videomme_process_results` behind `strip_reasoning_tags`, VLMEvalKit e8e78f05 `VideoMME.evaluate` and
`eval_vanilla`, both with `exact_matching`. A digit per output says whether it counts as right.
"""

import json
from pathlib import Path

import pytest
import torch

from longrl.evaluation.published_rules import lmms_eval_letter, vlmevalkit_letter, vlmevalkit_option
from longrl.rewards.answers import multiple_choice_lenient
from longrl.types import Completion, Row
from tests.harness.peer_cases import OUTPUTS

FIGURES = json.loads(Path(__file__).with_name("peer_scores.json").read_text())
RULES = {
    "lmms_eval_videomme": lmms_eval_letter,
    "vlmevalkit_videomme": vlmevalkit_letter,
    "vlmevalkit_mcq": vlmevalkit_option,
}
LABELS = [output.right for output in OUTPUTS]


def judged(rule):
    """Which outputs a rule counts as right."""
    none = torch.empty(0, dtype=torch.int64)
    verdicts = []
    for index, output in enumerate(OUTPUTS):
        problem = "Which?\n" + "\n".join(f"{letter}. {wording}" for letter, wording in output.options.items())
        completion = Completion(none, torch.empty(0), output.text, "stop")
        verdicts.append(rule(completion, Row(str(index), problem, output.gold)) == 1.0)
    return verdicts


def agreement(verdicts):
    """Share of the outputs that are judged as a reader judges them."""
    return sum(verdict == label for verdict, label in zip(verdicts, LABELS, strict=True)) / len(LABELS)


@pytest.mark.parametrize("name", RULES)
def test_outputs_are_scored_as_released_code_scores_them(name):
    expected = [digit == "1" for digit in FIGURES[name]]
    assert len(expected) == len(OUTPUTS) == 200
    differing = [index for index, verdict in enumerate(judged(RULES[name])) if verdict != expected[index]]
    assert [(OUTPUTS[index].text, expected[index]) for index in differing] == []


def test_outputs_are_scored_as_a_reader_scores_them_by_our_own_reading():
    by_peers = {name: agreement([digit == "1" for digit in digits]) for name, digits in FIGURES.items()}
    assert by_peers == {"lmms_eval_videomme": 0.825, "vlmevalkit_videomme": 0.765, "vlmevalkit_mcq": 0.675}
    assert agreement(judged(multiple_choice_lenient)) == 1.0
