"""The thread that samples over several updates, by a scripted engine: cuts, pauses, answers, what is given up."""

import contextlib
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

import pytest
import torch

from longrl.engines.activity import busy_share
from longrl.engines.continuous import ContinuousSampler, SamplingTask
from longrl.engines.turn_requests import ContinuousRequests
from longrl.environments.trajectory import Trajectory, begin
from longrl.types import Observed, SamplingParams
from tests.tiny import mixed_prompts, row, text_family, vl_family

SAMPLING = SamplingParams(num_generations=2, max_completion_tokens=6)


class Requests(ContinuousRequests):
    """Turns end when the test says so, or by a cut with the tokens that they have."""

    def __init__(self):
        self.pending, self.asked, self.version = [], [], 0
        self.ended, self.wake = [], Future()
        self.lock = threading.Lock()

    @property
    def num_pending(self):
        return len(self.pending) + len(self.ended)

    def add(self, trajectory, request, params):
        with self.lock:
            self.asked.append((trajectory, request, params))
            self.pending.append(trajectory)

    def finished(self, answers):
        wait([*answers, self.wake], timeout=10, return_when=FIRST_COMPLETED)
        with self.lock:
            ended, self.ended, self.wake = self.ended, [], Future()
        return ended

    def end(self, trajectory, count, reason="stop"):
        until(lambda: trajectory in self.pending)
        with self.lock:
            self.pending.remove(trajectory)
            output = {"token_ids": [9] * count, "logprobs": [-1.0] * count, "finish_reason": reason}
            self.ended.append((trajectory, output | {"version": self.version}))
            if not self.wake.done():
                self.wake.set_result(None)

    def cut(self):
        for trajectory in list(self.pending):
            self.end(trajectory, 2, "cut")


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def requests():
    return Requests()


@pytest.fixture
def sampler(requests):
    made = ContinuousSampler(text_family(), lambda: contextlib.nullcontext(requests), 200, "max_model_len")
    yield made
    made.close()
    assert not made._thread.is_alive()


def task(number, answer=None, max_turns=1):
    prompt = text_family().render(row(f"p{number}"), "What?")
    (trajectories,) = begin([prompt], SAMPLING, max_turns)
    return SamplingTask(number, trajectories, {}, 5, answer)


def test_what_is_cut_goes_on_with_its_tokens_under_the_new_weights(sampler, requests):
    one = task(0)
    first, second = one.trajectories
    sampler.submit([one])
    until(lambda: len(requests.pending) == 2)
    with sampler.pause(), sampler.pause():
        assert not requests.pending
        assert [trajectory.num_sampled for trajectory in one.trajectories] == [2, 2]
        requests.version = 7
        time.sleep(0.05)
        assert not requests.pending  # nobody asks in a pause, nor after an inner one
    requests.end(first, 1)
    requests.end(second, 4, "length")
    sampler.wait_for(1)
    taken = sampler.take(0)
    completions = [trajectory.completion() for trajectory in taken.trajectories]
    assert [one.versions.tolist() for one in completions] == [[0, 0, 7], [0, 0, 7, 7, 7, 7]]
    assert [one.finish_reason for one in completions] == ["stop", "length"]
    family = text_family()
    assert completions[0].text == family.decode(torch.tensor([9, 9, 9]))
    begun = [asked for asked in requests.asked if asked[0] is first]
    length = len(first.prompt.input_ids)
    assert [len(request["prompt_token_ids"]) - length for _, request, _ in begun] == [0, 2]
    assert [params["max_tokens"] for *_, params in begun] == [6, 4]
    assert len({params["seed"] for *_, params in requests.asked}) == 4
    assert 0 < busy_share(sampler.activity.take()) <= 1


def test_a_turn_that_is_cut_without_a_token_left_has_ended_by_length(sampler, requests):
    one = task(0)
    sampler.submit([one])
    for trajectory in one.trajectories:
        requests.end(trajectory, 6, "cut")
    sampler.wait_for(1)
    assert [trajectory.finish_reason for trajectory in one.trajectories] == ["length", "length"]
    assert [len(trajectory.turns) for trajectory in one.trajectories] == [1, 1]


def test_the_oldest_prompts_are_asked_first_and_given_up_ones_no_more(sampler, requests):
    with sampler.pause():
        sampler.submit([task(3), task(1)])
        sampler.submit([task(2)])
        sampler.cancel(2)
    until(lambda: len(requests.asked) == 4)
    assert [trajectory.prompt.id for trajectory, *_ in requests.asked] == ["p1", "p1", "p3", "p3"]
    sampler.cancel(1)
    with sampler.pause():
        pass
    until(lambda: len(requests.pending) == 2)
    assert {trajectory.prompt.id for trajectory in requests.pending} == {"p3"}
    assert sampler.progress() == {3: (0, False)}


def test_answers_come_in_a_pause_and_a_checkpoint_has_them_asked_once_more(sampler, requests):
    futures = {}

    def answer(trajectory):
        futures[trajectory] = Future()
        return futures[trajectory]

    one = task(0, answer, max_turns=2)
    first = one.trajectories[0]
    first.environment_state = b"before"
    sampler.submit([one])
    requests.end(first, 1)
    until(lambda: first in futures)
    first.environment_state = b"after"  # the environment has answered, and its media are on their way
    with sampler.pause():
        assert one.states_before == {first: b"before"}
        futures[first].set_result(Observed(torch.full((3,), 7), torch.arange(3)[None]))
        until(lambda: first.num_observed == 3)
        assert one.states_before == {}
        assert not requests.pending

        # What was saved here goes on anywhere.
        for trajectory in one.trajectories:
            again = Trajectory(trajectory.prompt, trajectory.number, SAMPLING, 2)
            again.restore(trajectory.saved())
            assert again.so_far().input_ids.tolist() == trajectory.so_far().input_ids.tolist()
            assert torch.equal(again.so_far().position_ids, trajectory.so_far().position_ids)
            assert again.turns == trajectory.turns
            assert again.num_open_tokens == trajectory.num_open_tokens
            assert again.environment_state == trajectory.environment_state
            assert again.oldest_version == 0
    until(lambda: len(requests.pending) == 2)
    assert requests.asked[-1][2]["max_tokens"] in (5, 4)


def test_an_error_ends_it_and_leaves_what_there_was(sampler, requests):
    one = task(0)
    sampler.submit([one])
    requests.end(one.trajectories[0], 2, "cut")
    until(lambda: len(requests.asked) == 3)

    def fail(answers):
        raise ConnectionError("gone")

    requests.finished = fail
    with contextlib.suppress(ConnectionError):  # wakes the thread
        sampler.submit([task(1)])
    with pytest.raises(ConnectionError, match="gone"):
        sampler.wait_for(1)
    with pytest.raises(ConnectionError, match="gone"):
        sampler.submit([task(2)])
    with sampler.pause(), sampler.held():  # a checkpoint
        assert [one.number for one in sampler.tasks()] == [0, 1]
        assert one.trajectories[0].num_sampled == 2


def test_an_environment_that_fails_is_saved_as_it_was_before_the_answer(sampler, requests):
    one = task(0, lambda trajectory: future, max_turns=2)
    future = Future()
    first = one.trajectories[0]
    first.environment_state = b"before"
    sampler.submit([one])
    requests.end(first, 1)
    until(lambda: first in one.states_before)
    first.environment_state = b"half changed"
    future.set_exception(ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone"):
        sampler.wait_for(1)
    assert one.states_before == {first: b"before"}


def test_completions_of_a_prompt_share_its_features_also_behind_a_cut(requests):
    family = vl_family()
    prompt = mixed_prompts(family)[0]
    features = {item.key: torch.randn(family.num_features(item), family.feature_size) for item in prompt.media}
    (trajectories,) = begin([prompt], SAMPLING, 1)
    sampler = ContinuousSampler(family, lambda: contextlib.nullcontext(requests), 200, "max_model_len")
    with contextlib.closing(sampler):
        sampler.submit([SamplingTask(0, trajectories, features, 5)])
        until(lambda: len(requests.pending) == 2)
        with sampler.pause():
            pass
        until(lambda: len(requests.asked) == 4)
    data = [request["multi_modal_data"] for _, request, _ in requests.asked]
    for kind, of_kind in family.engine_request(prompt, features)["multi_modal_data"].items():
        for name, wanted in of_kind.items():
            assert torch.equal(data[0][kind][name], wanted)
            assert all(one[kind][name] is data[0][kind][name] for one in data)
