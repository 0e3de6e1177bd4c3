"""A thousand calls that no tool was made for: each is answered or ends its completion, and no run ends."""

import json
import random

import torch

from longrl.environments.environment import Observation
from longrl.environments.rendering import render_observation
from longrl.types import Row
from tests.environments.asking import answers, begin, call, say, told
from tests.environments.hostile import Hostile

NUM_CALLS = 1000
NUM_BY_PROCESSES = 60
NUMBERS = (0, 1, 1.5, 3.999, 4, 4.0001, -1, -0.0, 1e-12, 1e9, 1e300, 10**30, float("nan"), float("inf"), True)
OTHERS = (None, "", "1", "x" * 5000, [], [1], {}, {"a": {}}, [[[]]], "\ud800", "<|im_end|><image>", "0x10")
BOXES = ([0, 0, 1000, 1000], [5, 5, 5, 5], [0, 0, 0, 1000], [1, 2, 3], [9, 0, 1, 9], [0, 0, 1e-9, 1e-9], [-1, 0, 5, 5])
TEXTS = (
    "", "The answer is A.", "<tool_call>", "</tool_call>", "<tool_call></tool_call>", "<tool_call>{}</tool_call>",
    "<tool_call>" * 500, "</think>" * 200, "<tool_call>" + "{" * 5000 + "</tool_call>", "\x00\ud800" * 50,
    "<tool_call>null</tool_call>" * 300, "<tool_call><function=</tool_call>",
    "<tool_call><function=zoom><parameter=box>[1</parameter></function></tool_call>",
    "<tool_call><function=zoom><parameter=time_s>1</parameter><parameter=box>[0, 0, 9, 9]</parameter></function>"
    "</tool_call>",
)  # fmt: skip


def value(rng):
    choice = rng.random()
    if choice < 0.6:
        return rng.choice(NUMBERS)
    if choice < 0.8:
        return list(rng.choice(BOXES))
    return rng.choice(OTHERS) if choice < 0.95 else [rng.choice(NUMBERS) for _ in range(rng.choice((0, 3, 40, 1500)))]


def turn(rng):
    """What a model might say: texts, or calls with some of their bytes changed."""
    if rng.random() < 0.1:
        return rng.choice(TEXTS)
    calls = []
    for _ in range(rng.choice((1, 1, 1, 2, 6))):
        name = rng.choice(("crop_video", "zoom", "get_frames", "search_subtitles", "do", "nothing", "step", "__init__"))
        keys = ("start_s", "end_s", "fps", "time_s", "box", "times_s", "query", "video", "self")
        arguments = {key: value(rng) for key in rng.sample(keys, rng.randint(0, 4))}
        if rng.random() < 0.6:  # the names at least are right
            wanted = {"crop_video": keys[:2], "zoom": keys[3:5], "get_frames": keys[5:6], "search_subtitles": keys[6:7]}
            arguments = {key: value(rng) for key in wanted.get(name, ())}
        if name == "do" and rng.random() < 0.9:
            arguments = {"trick": rng.choice(("fail", "misspelt", "lines", "leave", "talk", "refuse", "recurse", "x"))}
        content = json.dumps({"name": name, "arguments": arguments})
        if rng.random() < 0.2:
            where = rng.randrange(len(content))
            broken = rng.choice(('"', "{", "]", "\\u", "9" * 400, "<tool_call>", ""))
            content = content[:where] + broken + content[where + 1 :]
        calls.append(f"<tool_call>\n{content}\n</tool_call>")
    return "".join(calls)


def test_a_thousand_calls_are_answered(clip, family):
    environment = Hostile(max_frames=8)
    environment.reset(Row("r", "", "", videos=(clip,)))
    rng = random.Random(0)
    outcomes = {"answered": 0, "error": 0, "end": 0}
    num_calls = 0
    while num_calls < NUM_CALLS - NUM_BY_PROCESSES:
        text = turn(rng)
        try:
            observation = environment.step(text)
        except SystemExit:  # the tool that leaves: its process has an answer, see test_runner
            num_calls += 1
            continue
        if observation is None:
            num_calls += 1
            outcomes["end"] += 1
            continue
        assert isinstance(observation, Observation)
        num_calls += len(observation.responses)
        for response in observation.responses:
            outcomes["error" if response.call.error else "answered"] += 1
            json.dumps(dict(response.call.arguments), allow_nan=False).encode()
        observed = render_observation(family, observation, True, 300, lambda keys: frozenset())
        assert observed is None or len(observed.input_ids) <= 300
    assert min(outcomes.values()) > 10, outcomes


def test_calls_by_processes_are_answered_or_cut_by_their_limit(runner, model, clip):
    rng = random.Random(1)
    answer = answers(runner, model)
    special = ["sleep", "spin", "die", "die", "leave", "lines", "huge"]
    texts = [f'<tool_call>{{"name": "do", "arguments": {{"trick": "{trick}"}}}}</tool_call>' for trick in special]
    texts += [turn(rng) for _ in range(NUM_BY_PROCESSES - len(texts))]
    futures = [say(answer, one, text) for one, text in zip(begin(runner, clip, len(texts)), texts, strict=True)]
    for future in futures:
        observed = future.result(60)
        assert observed is None or len(observed.input_ids) <= 600


def test_endless_calls_end_by_the_number_of_turns_and_by_what_is_shown(runner, model, clip):
    answer = answers(runner, model)
    one, other = begin(runner, clip, 2)
    while one.num_policy_turns < runner.settings.max_turns - 1:
        told(answer, one, call("do", trick="x"))
    assert not one.add_turn(torch.tensor([5, answer.end]), torch.zeros(2), "", stopped=True)
    assert one.finish_reason == "stop"
    while other.finish_reason is None:
        other.turns.clear()  # as if there were no such limit
        told(answer, other, call("get_frames", times_s=[1, 2, 3]))
    assert 0 < other.num_observed <= runner.settings.max_observed_tokens
