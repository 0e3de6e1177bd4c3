"""Benchmarks whose answers a model judges: ActivityNet-QA in its authors' words, and what a judge's replies say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longrl.chat.endpoint import Endpoint, Reply
from longrl.datamodules.rows.sources import read_records
from longrl.evaluation import benchmark_figures
from longrl.evaluation.records import group_records
from longrl.rewards import RewardSum
from longrl.rewards.judge import JudgementFailed
from longrl.rewards.published_judge import correct_flag, score_of_five, yes_or_no
from longrl.types import Completion, Group, Prompt, Row
from tests.chat.server import Server, completion
from tests.datamodules.rows import benchmark_records as released
from tests.evaluation.presets import read_preset


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """`read_preset` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return read_preset


def test_activitynet_qa(preset):
    questions, answers = released.activitynet_qa()
    files = {"data/activitynet_qa/test_q.json": questions, "data/activitynet_qa/test_a.json": answers}
    config, rows, render = preset("activitynet_qa", files)
    assert [(row.id, row.answer, row.category, row.task) for row in rows] == [
        ("v_abc_0", "yes", "Yes/No", "open_ended"), ("v_abc_1", "swim", "Motion", "open_ended"),
        ("v_abc_2", "red", "Color", "open_ended"),
    ]  # fmt: skip
    blind = replace(render, blind=True)
    assert blind(rows[0]).text == "Is the man outdoors? Answer the question using a single word or phrase."
    accuracy, score = (term.function for term in config.reward.terms)
    asked = accuracy.request(rows[0], "Yes, he is.")
    assert asked == score.request(rows[0], "Yes, he is.")  # one call for both
    assert asked.messages[1]["content"].startswith(
        "Please evaluate the following video-based question-answer pair:\n\nQuestion: is the man outdoors\nCorrect "
        "Answer: yes\nPredicted Answer: Yes, he is.\n\nProvide your evaluation only as a yes/no and score where the "
    )
    assert asked.messages[1]["content"].endswith("should look like this: {'pred': 'yes', 'score': 4.8}.")
    reply = Reply("{'pred': 'yes', 'score': 4.8}", "stop", None, 1, 1)
    assert (accuracy.value_of(reply), score.value_of(reply)) == (1.0, 0.8)
    assert accuracy.answer_in(Completion((), (), "<think>x</think>Yes.", "stop")) == "Yes."
    # As the reward fills them: 1 of 2 right among free questions, 4 + 2 + 0 of 15.
    given = [("accuracy", "score"), (1.0, 0.8), (0.0, 0.4), (0.0, 0.0)]
    groups = [
        Group(Prompt(row.id, torch.empty(0), torch.empty(1, 0), (), row), [Completion((), (), text, "stop")],
              reward_parts={name: torch.tensor([value]) for name, value in zip(given[0], values, strict=True)})
        for row, values, text in zip(rows, given[1:], ("yes", "swims", "Red"), strict=True)
    ]  # fmt: skip
    exact = config.protocol.scoring_rule()
    records = [one for row, group in zip(rows, groups, strict=True) for one in group_records(row, group, rule=exact)]
    assert [record["accuracy_by_rule"] for record in records] == [1.0, 0.0, 0.0]
    assert benchmark_figures.activitynet_qa(records) == pytest.approx({
        "accuracy": 100 / 3, "Free: accuracy": 50, "Color: accuracy": 0, "Motion: accuracy": 0,
        "Yes/No: accuracy": 100, "score of 5": 2, "Free: score of 5": 2,
    })  # fmt: skip
    with pytest.raises(ValueError, match="must have as many records, got 3 and 2"):
        two_files(files, answers[:2])
    with pytest.raises(ValueError, match="record 0 has question_id 'v_abc_0' in one and 'v_abc_1' in the other"):
        two_files(files, [answers[1], answers[0], answers[2]])


def two_files(files, answers):
    Path("other.json").write_text(json.dumps(answers))
    return read_records(f"{next(iter(files))}+other.json")


def test_a_published_judge_asks_once_for_both_of_its_parts(tmp_path, preset):
    questions, answers = released.activitynet_qa()
    files = {"data/activitynet_qa/test_q.json": questions, "data/activitynet_qa/test_a.json": answers}
    config, rows, _ = preset("activitynet_qa", files)
    with Server(lambda body: completion("{'pred': 'yes', 'score': 4}")) as server:
        endpoint = Endpoint("j", server.url, retries=0, timeout_s=5.0)
        terms = [
            replace(term, function=replace(term.function, endpoint=endpoint, cache_dir=str(tmp_path / "replies")))
            for term in config.reward.terms
        ]
        choice = Row("c", "Which?\nA. x\nB. y", "B")  # no instructions for its task: by the rule
        said = [Completion((), (), text, "stop") for text in ("Yes.", "<answer>B</answer>")]
        groups = [
            Group(Prompt(row.id, torch.empty(0), torch.empty(1, 0), (), row), [each])
            for row, each in zip((rows[0], choice), said, strict=True)
        ]
        assert RewardSum(terms).score(groups) == 0
    assert [group.reward_parts["accuracy"].item() for group in groups] == [1.0, 1.0]
    assert groups[0].reward_parts["score"].item() == pytest.approx(0.8)
    assert [body["messages"][0]["role"] for body in server.bodies] == ["system"]
    with pytest.raises(ValueError, match="systems of a PublishedJudge must name a task"):
        replace(terms[0].function, systems={})


@pytest.mark.parametrize(
    ("verdict", "reply", "value"),
    [
        (yes_or_no, "{'pred': 'no', 'score': 1}", 0.0),
        (yes_or_no, '```{"pred": "Yes.", "score": 5}```', 1.0),
        (yes_or_no, "{'score': 5}", None),
        (yes_or_no, "<think>Is it {'pred': 'yes'}? It is not.</think>{'pred': 'no', 'score': 0}", 0.0),
        (score_of_five, "{'pred': 'no', 'score': 0}", 0.0),
        (score_of_five, '{"score": "5"}', 1.0),
        (score_of_five, "{'score': 7}", None),
        (correct_flag, '{"extracted_answer": "B", "correct": true}', 1.0),
        (correct_flag, '{"correct": False}', 0.0),
        (correct_flag, '{"correct": "true"}', 1.0),
        (score_of_five, "{'score': 5} or {'score': 2}: {'score': 2}", 0.4),
        (correct_flag, "It is right.", None),
    ],
)
def test_verdicts(verdict, reply, value):
    if value is None:
        with pytest.raises(JudgementFailed, match="the judge's reply must"):
            verdict(reply)
    else:
        assert verdict(reply) == value
