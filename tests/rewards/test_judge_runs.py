"""A policy learns what a judge prefers, in real runs: SFT on two answers, then GRPO judged over HTTP, with faults."""

import json

import torch

from longrl.chat.endpoint import Endpoint
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
