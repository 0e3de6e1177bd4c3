"""A policy learns what a judge prefers, in real runs: SFT on two answers, then GRPO judged over HTTP, with faults."""

import json
import math

import pytest
import torch

from longrl.callbacks.rollout import RolloutCallback
from longrl.chat.endpoint import Endpoint
from longrl.datamodules.loading.mixing import DataSource
from longrl.rewards import RewardSum, RewardTerm
from longrl.rewards.judge import Judge
from longrl.types import SamplingParams
from tests.callbacks.test_rollout import FakeEngine, data_module, train
from tests.chat.server import Server
from tests.rewards.test_judge import by_content
from tests.runs import metrics, rollouts, run, text_config

QUESTIONS = ("What does he pour?", "What does she drink?")
ANSWERS = ("green tea", "coffee")


def records(folder, answers):
    """Each question with each of `answers`, open-ended."""
    file = folder / f"{len(answers)}.jsonl"
    rows = [
        {"problem": question, "answer": answer, "reasoning": "x", "problem_type": "free-form"}
        for question in QUESTIONS
        for answer in answers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sft(folder):
    values = text_config(records(folder, ANSWERS))
    values["trainer"] |= {"max_steps": 60}
    values["data"] |= {"prompts_per_batch": 4, "response_template": "<answer>{answer}</answer>"}
    values["model"]["optimizer"] = {"lr": 1e-2}
    return run(folder / "sft", values)


def grpo(folder, server, start):
    endpoint = Endpoint("j", server.url, backoff_s=0.01, retries=1, timeout_s=5.0)
    reward = {
        "class_path": "longrl.rewards.judge.Judge",
        "init_args": {"endpoint": vars(endpoint), "cache_dir": str(folder / "replies")},
    }
    values = text_config(records(folder, ANSWERS[:1]), "rl")
    values["trainer"] |= {"max_steps": 20}
    values["rollout"] = rollouts(reward, sampling={"num_generations": 8, "max_completion_tokens": 24})
    values["model"] |= {"optimizer": {"lr": 2e-3}, "init_from": str(start)}
    return run(folder / "rl", values)


def curve(found, name):
    return [float(value) for (_, key), value in sorted(metrics(found).items()) if key == name]


def test_a_policy_learns_what_the_judge_prefers(tmp_path):
    failing = iter([500, 500])  # both attempts of a call

    def judged(body):
        text = body["messages"][0]["content"]
        hit = QUESTIONS[1] in text and "<answer_to_grade>\ngreen tea" in text
        return (hit and next(failing, 0)) or by_content(body)

    with Server(judged) as server:
        found = grpo(tmp_path, server, sft(tmp_path))
    rewards = curve(found, "reward/mean")
    assert 0.1 < rewards[0] < 0.8
    assert sum(rewards[-4:]) / 4 > 0.75
    failed = curve(found, "rollout/failed_rewards")
    assert failed[0] > 0
    assert sum(failed[1:]) == 0
    asked = [json.dumps(body["messages"]) for body in server.bodies]
    assert len(asked) - len(set(asked)) == 2  # no answer is paid for twice, but for those two errors
    assert torch.isfinite(torch.tensor(curve(found, "train/loss"))).all()


# ---- a judge that is away ----


def judged_run(folder, server, answers, steps):
    """A run whose policy says `answers(prompt id)`, judged by a server; what each step trained on."""
    data = data_module(folder)
    data.sources["train"] = [DataSource(str(folder / "open.jsonl"))]
    rows = [{"problem": f"What is {n}?", "answer": "green tea", "task": "open_ended"} for n in range(12)]
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint = Endpoint("j", server.url, backoff_s=0.01, retries=1, timeout_s=2.0)
    reward = RewardSum([RewardTerm(Judge(endpoint, str(folder / "replies")), name="accuracy")])
    engine = FakeEngine(lambda prompt_id, count: [f"<answer>{answers(prompt_id, n)}</answer>" for n in range(count)])
    rollouts = RolloutCallback(reward, SamplingParams(2, 4), engine=engine, max_mean_mismatch=math.inf)
    return train(folder, rollouts, data=data, steps=steps)


def test_a_judge_that_was_never_there_ends_the_run_in_its_first_step_and_says_so(tmp_path):
    with Server(by_content) as server:
        pass
    with pytest.raises(ValueError, match=(
        r"reward 'accuracy' failed on every one of the 4 completions so far, .* first with CallFailed: http.*; see "
        r"that the server of the judge or scorer runs at the url of its endpoint"
    )):  # fmt: skip
        judged_run(tmp_path, server, lambda prompt_id, n: f"{prompt_id} {n}", 5)


def test_a_judge_that_is_away_for_a_rollout_costs_that_rollout(tmp_path):
    calls = []

    def away(body):
        calls.append(body)
        return 503 if 4 < len(calls) <= 12 else by_content(body)  # the second rollout: 4 answers, asked twice

    with Server(away) as server:
        seen = judged_run(tmp_path, server, lambda prompt_id, n: f"green tea {prompt_id} {n}", 4)
    assert [metrics["rollout/failed_rewards"] for metrics in seen.metrics] == [0.0, 1.0, 0.0, 0.0]
    assert not any(group.valid.any() for group in seen.batches[1].groups)
