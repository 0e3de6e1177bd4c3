"""Runs with `rollout.environment`: from the command line to the step, by a tiny model and clips of its videos."""

import copy
import json

import pytest
import torch

from tests.runs import checkpoint, config, data_order, metrics, rollouts, run

ENVIRONMENT = {"make": "tests.environment_runs.Clips", "max_turns": 3, "max_observed_tokens": 200}


def rl(**options):
    """Two prompts per step, two completions each, and clips between their turns."""
    values = config("rl")
    engine = {"class_path": "tests.environment_runs.PlainTurns"}
    values["rollout"] = rollouts("tests.environment_runs.has_turns", engine=engine, environment=dict(ENVIRONMENT))
    values["rollout"]["sampling"]["max_completion_tokens"] = 6
    values["rollout"] |= options
    values["trainer"] |= {"max_steps": 2}
    values["model"]["max_tokens_per_micro_batch"] = 4000
    return values


def test_a_run_trains_on_completions_that_were_shown_clips(tmp_path):
    folder = run(tmp_path / "run", rl())
    logged = metrics(folder)
    assert float(logged[1, "rollout/observed_tokens"]) > 0
