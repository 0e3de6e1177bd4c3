"""Scorers over HTTP: batches of distinct completions, within a judge's limits; what fails is masked, never a 0."""

import json
import logging
from pathlib import Path

import pytest
import torch

from longrl.chat.endpoint import Budget, Endpoint
from longrl.rewards import RewardSum, RewardTerm
from longrl.rewards.remote import RemoteScorer, ScoreFailed, ScoreRequest, scored_item
from longrl.types import Completion, Group, Prompt, Row
from tests.chat.server import Dripping, Server

ROW = Row(
    "q", "What does he pour?", "tea", task="open_ended", videos=("a.mp4",), metadata={"source": "x", "at": Path("p")}
)
TALK = Row(
    "t", "", "B", messages=({"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]},)
)


def group(*texts: str, row: Row = ROW) -> Group:
    prompt = Prompt(row.id, torch.zeros(3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), (), row)
    return Group(prompt, [Completion(torch.zeros(4), torch.zeros(4), text, "stop") for text in texts])


def scorer(server: Server, folder, **options) -> RemoteScorer:
    endpoint = options.pop("endpoint", {})
    limits = {"backoff_s": 0.01, "retries": 1, "timeout_s": 2.0, "concurrency": 4, **endpoint}
    return RemoteScorer(Endpoint("s", server.url.removesuffix("/v1"), **limits), str(folder), **options)


def by_length(body: dict) -> dict:
    """The length of each completion; odd ones get odd scores."""
    odd = {"null": None, "bad": {"error": "no such row"}, "nan": float("nan"), "text": "0.5", "true": True}
    scores = [odd.get(item["completion"], float(len(item["completion"]))) for item in body["items"]]
    return {"scores": scores, "usage": {"prompt_tokens": 7}}


def scored(reward: RemoteScorer, one: Group) -> int:
    return RewardSum([RewardTerm(reward, 1.0, "remote", tasks="every")]).score([one])


def test_distinct_completions_are_sent_once_in_batches_and_never_again(tmp_path):
    one = group("a", "bbb", "a", "cc", "dddd", "a")
    with Server(by_length) as server:
        for _ in range(2):
            assert scored(scorer(server, tmp_path, batch_size=3), one) == 0
            assert one.rewards.tolist() == [1.0, 3.0, 1.0, 2.0, 4.0, 1.0]
    assert sorted(len(body["items"]) for body in server.bodies) == [1, 3]  # of the first time alone
    (item,) = [item for body in server.bodies for item in body["items"] if item["completion"] == "cc"]
    assert item == scored_item(one.completions[3], ROW)
    assert {"prompt": "What does he pour?", "answer": "tea", "videos": ["a.mp4"]}.items() <= item.items()
    assert item["metadata"] == {"source": "x", "at": "p"}
    assert server.bodies[0]["model"] == "s"


def test_a_score_that_is_none_costs_its_completion_and_null_is_left_out_of_the_sum(tmp_path):
    one = group("null", "bad", "nan", "text", "true", "aa")
    with Server(by_length) as server:
        assert scored(scorer(server, tmp_path), one) == 5  # nothing applies to the first
        values = scorer(server, tmp_path).score_all(one.completions, [ROW] * 6)
    assert one.valid.tolist() == [False] * 5 + [True]
    assert values[0] is None
    assert values[5] == 2.0
    assert [type(value) for value in values[1:5]] == [ScoreFailed] * 4
    assert "no such row" in str(values[1])


@pytest.mark.parametrize("outcome", [500, b"{", {"scores": []}, {"scores": 1.0}, ["a"], 403])
def test_an_answer_that_is_none_masks_the_completions_of_its_batch_alone(tmp_path, outcome, caplog):
    one = group("bad batch", "aa")

    def answer(body):
        return outcome if body["items"][0]["completion"] == "bad batch" else by_length(body)

    with Server(answer) as server:
        assert scored(scorer(server, tmp_path, batch_size=1), one) == 1
    assert one.valid.tolist() == [False, True]
    assert one.rewards.tolist() == [0.0, 2.0]
    assert "bad batch" in caplog.text
    asked = sum(body["items"][0]["completion"] == "bad batch" for body in server.bodies)
    assert asked == (1 if outcome == 403 else 2)  # a refusal is not asked about again


def test_limits_of_budget_and_time_mask_and_a_server_that_is_away_is_said(tmp_path, caplog):
    one = group("a", "bb", "ccc")
    with Server(by_length) as server:
        assert scored(scorer(server, tmp_path / "paid", batch_size=1, budget=Budget(max_calls=1)), one) == 2
        assert len(server.bodies) == 1
    with Dripping({"scores": [1.0], "pad": " " * 300}) as server:
        late = scorer(server, tmp_path / "late", time_limit_s=0.3, endpoint={"retries": 0})
        (value, *_) = late.score_all(one.completions, [ROW] * 3)
    assert "time_limit_s=0.3" in str(value)
    with caplog.at_level(logging.WARNING):
        assert scored(scorer(server, tmp_path / "away"), one) == 3
    assert "none of 3 completions could be judged by s at http" in caplog.text


def test_the_key_is_that_of_the_environment_and_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "sk-very-secret")
    with Server(lambda body: by_length(body) | {"echo": "sk-very-secret"}) as server:
        scored(scorer(server, tmp_path, endpoint={"key_variable": "SCORER_KEY"}), group("a", "bb"))
    assert server.keys == ["Bearer sk-very-secret"]
    assert all("sk-very-secret" not in file.read_text() for file in tmp_path.rglob("*.jsonl"))


def test_vllm_is_sent_a_chat_and_answers_a_logit(tmp_path):
    def pooling(body):
        assert {"use_activation": False, "add_generation_prompt": False}.items() <= body.items()
        return {"data": [{"index": 0, "data": [-1.5 * len(body["messages"][-1]["content"])]}], "usage": {}}

    with Server(pooling) as server:
        reward = scorer(server, tmp_path, form="vllm")
        values = reward.score_all(group("a", "bb").completions, [TALK, ROW])
    assert values == [-1.5, -3.0]
    assert [message["content"] for message in server.bodies[0]["messages"]] in (
        ["Which?", "a"],
        ["What does he pour?", "bb"],
    )
    with Server({"data": [{"data": [0.1, 0.9]}]}) as server:  # a classifier of two
        (value,) = scorer(server, tmp_path / "two", form="vllm").score_all(group("a").completions, [ROW])
    assert "a reward model of one label" in str(value)


def test_what_decides_the_scores_is_in_the_key():
    item = scored_item(group("a").completions[0], ROW)
    keys = {
        request.key
        for request in (
            ScoreRequest("m", (item,)), ScoreRequest("n", (item,)), ScoreRequest("m", (item, item)),
            ScoreRequest("m", ({**item, "answer": "x"},)), ScoreRequest("m", (item,), {"scale": 2}),
        )
    }  # fmt: skip
    assert len(keys) == 5
    assert ScoreRequest("m", (json.loads(json.dumps(item)),)).key in keys
