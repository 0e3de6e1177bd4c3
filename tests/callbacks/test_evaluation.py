"""The evaluation report: every completion on file, every question scored once."""

import json
from types import SimpleNamespace

import torch

from longrl.callbacks.evaluation import EvaluationReport
from longrl.evaluation.metric import CategoryAccuracy
from longrl.evaluation.records import sample_record
from longrl.io.jsonl import read_jsonl
from longrl.modules.policy import PolicyModule
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.strategies.parallel import Parallel
from longrl.types import Batch, Completion, Group, Prompt, Row
from tests.tiny import text_family


def group(name, *answers):
    row = Row(id=name, problem="Which?\nA. cat\nB. dog", answer="B")
    prompt = Prompt(name, torch.zeros(3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), (), row)
    texts = [f"<think>x</think><answer>{answer}</answer>" for answer in answers]
    return Group(prompt, [Completion(torch.zeros(2), torch.zeros(2), text, "stop") for text in texts])


def report_of(report, folder, *groups, dp=SINGLE_RANK):
    """Two groups per batch, then the end of the test."""
    trainer = SimpleNamespace(default_root_dir=str(folder), is_global_zero=True)
    module = PolicyModule(text_family())
    module.parallel = Parallel(dp=dp)
    for number, start in enumerate(range(0, len(groups), 2)):
        own = list(groups[start : start + 2])
        report.on_test_batch_end(trainer, module, None, Batch([g.prompt for g in own], groups=own), number)
    report.on_test_end(trainer, module)
    found = [(record["id"], record["sample"], record["correct"]) for record in read_jsonl(folder / "predictions.jsonl")]
    return found, json.loads((folder / "evaluation.json").read_text())["scores"]["overall"]


def test_all_completions_are_on_file_and_a_question_scores_their_mean(tmp_path):
    records, score = report_of(
        EvaluationReport(), tmp_path, group("1", "B", "A"), group("2", "B", "B"), group("3", "A")
    )
    assert records == [("1", 0, True), ("1", 1, False), ("2", 0, True), ("2", 1, True), ("3", 0, False)]
    assert (score["accuracy"], score["n"]) == (0.5, 3)


def test_questions_of_several_ranks_come_in_the_order_of_the_rows(tmp_path):
    second = [sample_record(group("b", "A", "B"), index=n) for n in range(2)]
    count = CategoryAccuracy()
    count.update(second)

    class TwoRanks(Axis):
        def gather(self, own):
            return [own, count.lines if isinstance(own[0], str) else [second]]

    records, score = report_of(EvaluationReport(), tmp_path, group("a", "B", "B"), group("c", "A", "A"), dp=TwoRanks())
    assert [(name, sample) for name, sample, _ in records] == [(name, n) for name in "abc" for n in range(2)]
    assert (score["accuracy"], score["n"]) == (0.5, 3)
