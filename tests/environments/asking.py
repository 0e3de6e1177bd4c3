"""Turns that are said to an `EnvironmentRunner`, and the processes that answer them."""

import collections
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from longrl.types import Row, SamplingParams

MAKE = f"{Path(__file__).with_name('hostile.py')}:Hostile"
SECONDS = 1.5


def call(name, **arguments):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


def begin(runner, clip, count=1):
    prompt = runner.family.render(Row("r", "What?", "A"), "What?")
    prompt = replace(prompt, row=Row("r", "What?", "A", videos=(clip,)))
    sampling = SamplingParams(num_generations=count, max_completion_tokens=1000)
    return runner.begin([prompt], sampling)[0]


def say(answer, trajectory, text, end=True):
    """A turn, and the future of what it is answered."""
    ids = torch.tensor([5, *([answer.end] if end else [6])])
    assert trajectory.add_turn(ids, torch.zeros(2), text, stopped=True)
    return answer.ask(trajectory)


Answers = collections.namedtuple("Answers", "ask end features")


def answers(runner, model, features=None):
    features = {} if features is None else features
    return Answers(runner.answers(model, features), runner.family.end_token_ids[0], features)


def told(answer, trajectory, text):
    """What a turn is answered; it is added."""
    observed = say(answer, trajectory, text).result(60)
    trajectory.add_observed(observed)
    return observed


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids):
    deadline = time.monotonic() + 10
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_there(pid)]
        time.sleep(0.05)
