"""What turns ask of vLLM, and in which order, without it; with it: test_vllm.py, test_server.py."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait

import pytest
import torch

from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.engines.vllm_options import sampling_arguments
from longrl.engines.vllm_turns import (
    SAMPLED_PLACEHOLDERS,
    TurnRequests,
    TurnSampler,
    restore_placeholders,
    turn_arguments,
    turn_request,
)
from longrl.environments.trajectory import begin
from longrl.types import Observed, SamplingParams
from tests.tiny import frames, internvl_family, internvl_prompts, mixed_prompts, row, text_family, vl_family

SAMPLING = SamplingParams(3, 20, temperature=0.7, top_p=0.9, top_k=5)
LIMIT = 200


@pytest.fixture(scope="module")
def family():
    return text_family()


def observed(count, token=7):
    return Observed(torch.full((count,), token), torch.arange(count)[None])


def said(count, reason="stop", token=9):
    return {"token_ids": [token] * count, "logprobs": [-1.0] * count, "finish_reason": reason}


class Scripted(TurnRequests):
    """Answers requests by a function of the trajectory, one at a time, the latest first."""

    def __init__(self, output=lambda trajectory: said(2)):
        self.output = output
        self.pending = []
        self.asked = []

    def add(self, trajectory, request, params):
        self.pending.append(trajectory)
        self.asked.append((trajectory, request, params))

    def finished(self, answers):
        if not self.pending:
            wait(answers, timeout=10, return_when="FIRST_COMPLETED")
            return []
        trajectory = self.pending.pop()
        return [(trajectory, self.output(trajectory))]


class Answering:
    """Gives futures that are done only once `release` is called, the latest first."""

    def __init__(self, answer, held=False):
        self.answer = answer
        self.held = held
        self.futures = []

    def __call__(self, trajectory):
        self.futures.append((Future(), trajectory))
        if not self.held:
            self.release()
        return self.futures[-1][0]

    def release(self):
        for future, trajectory in self.futures:
            if not future.done():
                future.set_result(self.answer(trajectory))


def sampler(family, requests, answer, limit=LIMIT, sampling=SAMPLING):
    return TurnSampler(family, {}, sampling, 5, requests, answer, limit, "max_model_len of VLLMEngine")


def test_a_first_turn_is_asked_for_as_by_generate_and_later_ones_by_seeds_of_their_own(family):
    prompts = [family.render(row(name), "What?") for name in "ab"]
    groups = begin(prompts, SAMPLING, max_turns=3, first=2)
    groups[1][0].stop_token_ids = (11, family.end_token_ids[0])
    requests = Scripted()
    sampler(family, requests, Answering(lambda trajectory: observed(4))).sample(groups)
    first = [asked for asked in requests.asked if asked[2]["max_tokens"] == 20]
    assert [asked[0] for asked in first] == [trajectory for group in groups for trajectory in group]
    for index, (trajectory, request, params) in enumerate(first):
        prompt = trajectory.prompt
        as_generate = sampling_arguments(family, prompt, SAMPLING, 5, 2)
        stops = [*family.end_token_ids, 11] if index == 3 else list(family.end_token_ids)
        assert request == {"prompt_token_ids": prompt.input_ids.tolist()}
        assert params == as_generate | {"n": 1, "seed": as_generate["seed"] + index % 3, "stop_token_ids": stops}
    seeds = [params["seed"] for _, _, params in requests.asked]
    assert len(set(seeds)) == len(seeds) == 18

    # The draws of a turn depend on nothing but seed, prompt, number and turn.
    alone = Scripted()
    sampler(family, alone, Answering(lambda trajectory: observed(4))).sample(begin(prompts[1:], SAMPLING, 3, 3))
    assert {params["seed"] for _, _, params in alone.asked if params["seed"] in seeds} >= set(seeds[4:6])
    assert turn_arguments(family, groups[0][0], SamplingParams(1, 20, temperature=0.0), 5, LIMIT)["seed"] is None


def test_a_later_turn_is_asked_for_all_that_came_before_and_what_is_left(family):
    ((trajectory,),) = begin([family.render(row(), "What?")], SamplingParams(1, 20), max_turns=3)
    requests = Scripted()
    sampler(family, requests, Answering(lambda trajectory: observed(4))).sample([[trajectory]])
    prompt = trajectory.prompt.input_ids.tolist()
    tokens = [request["prompt_token_ids"] for _, request, _ in requests.asked]
    assert tokens == [prompt, prompt + [9] * 2 + [7] * 4, prompt + [9] * 2 + [7] * 4 + [9] * 2 + [7] * 4]
    assert [params["max_tokens"] for _, _, params in requests.asked] == [20, 18, 16]
    assert trajectory.finish_reason == "stop"


def test_a_trajectory_without_room_ends_and_others_go_on(family, caplog):
    prompt = family.render(row(), "What?")
    limit = len(prompt.input_ids) + 20
    ((short, long, exact),) = begin([prompt], SAMPLING, max_turns=2)
    sizes = {0: 1, 1: 18, 2: 17}
    requests = Scripted()
    answer = Answering(lambda trajectory: observed(sizes[trajectory.number]))
    with caplog.at_level(logging.WARNING):
        sampler(family, requests, answer, limit).sample([[short, long, exact]])
    assert [one.finish_reason for one in (short, long, exact)] == ["stop", "length", "stop"]
    assert [len(one.turns) for one in (short, long, exact)] == [3, 1, 3]
    assert long.completion().token_ids.tolist() == [9, 9]
    assert [params["max_tokens"] for one, _, params in requests.asked if one is exact] == [20, 1]
    (line,) = caplog.messages
    assert line.startswith("1 completions ended early: ")
    assert f"no room in {limit}, the max_model_len of VLLMEngine; raise that, or lower rollout.environment" in line


def test_turns_go_on_while_others_wait_for_their_answers(family):
    groups = begin([family.render(row(), "What?")], SAMPLING, max_turns=2)
    requests = Scripted()
    answer = Answering(lambda trajectory: observed(1), held=True)
    finished = requests.finished

    def all_but_one_have_been_asked_about(answers):
        if not requests.pending:  # only now is anything answered
            assert len(answer.futures) == 3
            answer.release()
        return finished(answers)

    requests.finished = all_but_one_have_been_asked_about
    sampler(family, requests, answer).sample(groups)
    assert [len(one.turns) for one in groups[0]] == [3, 3, 3]


def test_trajectories_go_on_where_they_were_left(family):
    ((asking, answered, ended),) = begin([family.render(row(), "What?")], SAMPLING, max_turns=3)
    for one in (asking, answered, ended):
        one.add_turn(torch.tensor([9]), torch.zeros(1), "so", stopped=True)
    answered.add_observed(observed(2))
    ended.add_observed(None)
    requests = Scripted()
    sampler(family, requests, Answering(lambda trajectory: None)).sample([[asking, answered, ended]])
    assert [one for one, _, _ in requests.asked] == [answered]
    assert [one.finish_reason for one in (asking, answered, ended)] == ["stop"] * 3


def test_what_runs_out_of_tokens_is_not_answered(family):
    groups = begin([family.render(row(), "What?")], SAMPLING, max_turns=3)
    answer = Answering(lambda trajectory: observed(1))
    sampler(family, Scripted(lambda trajectory: said(20, "length")), answer).sample(groups)
    assert not answer.futures
    assert [one.finish_reason for one in groups[0]] == ["length"] * 3


@pytest.mark.parametrize("of", [(vl_family, mixed_prompts), (internvl_family, internvl_prompts)])
def test_a_placeholder_that_was_sampled_stands_for_no_media(of):
    """vLLM and our own requests find media by their placeholders."""
    family = of[0]()
    prompt, *_ = of[1](family)
    placeholders = list(family.media_token_ids().values())
    ((trajectory,),) = begin([prompt], SamplingParams(1, 20), max_turns=3)
    trajectory.add_turn(torch.tensor([9, *placeholders, 9]), torch.zeros(2 + len(placeholders)), "", stopped=True)
    crop = family.patch(frames(1, 60, 60, "crop", "image"))
    ids = torch.tensor(family.placeholder_ids(crop))
    trajectory.add_observed(Observed(ids, family.position_ids(ids, [crop]), (crop,)))
    so_far = trajectory.so_far()
    width = family.feature_size
    features = {item.key: torch.randn(family.num_features(item), width) for item in so_far.media}
    request = turn_request(family, trajectory, features)

    start = len(prompt.input_ids) + 1
    assert request[SAMPLED_PLACEHOLDERS] == [[start + index, token] for index, token in enumerate(placeholders)]
    if "prompt_embeds" in request:
        is_text = torch.tensor(request["prompt_is_token_ids"])
        assert is_text[start : start + len(placeholders)].all()
        rendered = restore_placeholders(request, request[SAMPLED_PLACEHOLDERS])["prompt_token_ids"]
        assert torch.equal(torch.tensor(rendered)[is_text], so_far.input_ids[is_text])
    else:
        compact = torch.tensor(request["prompt_token_ids"])
        assert int(torch.isin(compact, torch.tensor(placeholders)).sum()) == len(so_far.media)
    assert SAMPLED_PLACEHOLDERS not in turn_request(family, begin([prompt], SAMPLING, 1)[0][0], features)


@pytest.mark.parametrize("pairs", [[[3, 1]], [[-1, 1]], [[0, -1]], [[0]], [["x", 1]], 5, [None]])
def test_pairs_that_no_trainer_sends_are_refused(pairs):
    with pytest.raises(ValueError, match="must be .* of a prompt of 3 tokens"):
        restore_placeholders({"prompt_token_ids": [1, 2, 3]}, pairs)


def test_ranks_that_share_an_engine_are_refused():
    assert VLLMEngine().environment_problem() is None
    assert VLLMServerEngine("http://127.0.0.1:1").environment_problem() is None
    assert "leave out tensor_parallel_size" in VLLMEngine(tensor_parallel_size=2).environment_problem()
