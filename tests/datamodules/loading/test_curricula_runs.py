"""Runs whose rows, frames and lengths follow a curriculum: it takes effect, and a resumed run ends as the whole one."""

import json
from collections import Counter
from itertools import chain

import pytest
import torch

from longrl.algorithms import Algorithm, drop_uniform
from longrl.datamodules.loading.curriculum import Curriculum
from longrl.datamodules.loading.pass_rates import PassRates
from longrl.datamodules.loading.schedules import Schedule
from longrl.types import SamplingParams
from tests.callbacks.test_async_groups import asynchronous
from tests.callbacks.test_rollout import Elsewhere, FakeEngine, callback, data_module, train
from tests.runs import config, metrics, rollouts, run, videos
from tests.slow_engine import SlowEngine
from tests.test_resume import assert_same_end

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def by_row(prompt_id, count):
    """Of three rows the first is always answered right, the second never, the third half of the time."""
    return (["right", "right"], ["wrong", "wrong"], ["right", "wrong"])[int(prompt_id.split()[0]) % 3]


# ---- effect ----


@pytest.mark.parametrize(("engine", "max_staleness"), [(FakeEngine, 0), (Elsewhere, 1)])
def test_a_band_draws_what_is_answered_right_now_and_then_once_every_row_is_known(tmp_path, engine, max_staleness):
    pass_rates = PassRates(low=0.1, high=0.9, retry_after=0)
    data = data_module(tmp_path, curriculum=Curriculum(pass_rates=pass_rates))
    rollouts = callback(engine(by_row), max_staleness=max_staleness)
    seen = train(tmp_path, rollouts, data=data, steps=6, max_epochs=2)
    trained = [[int(group.prompt.id) for group in batch.groups] for batch in seen.batches]
    assert len(trained) == 12
    assert sorted(chain.from_iterable(trained[:6])) == list(range(12))  # every row once
    # What is drawn lags behind what is known by the delay and, sampled ahead, by the step in which that is trained on.
    late = chain.from_iterable(trained[8 + max_staleness :])
    assert {row % 3 for row in late} == {2}
    last = seen.metrics[-1]
    assert last["data/pass_rate_mean"] == 0.5
    assert last["data/rows_known"] == 12
    assert last["data/rows_in_band"] == 4
    assert last["data/rows_new"] == 0


def test_refills_learn_from_rows_that_are_not_trained_on(tmp_path):
    """Groups that dynamic sampling drops say how hard their rows are: later steps need no refill."""
    pass_rates = PassRates(low=0.1, high=0.9, retry_after=0)
    data = data_module(tmp_path, curriculum=Curriculum(pass_rates=pass_rates, delay_steps=1))
    rollouts = callback(FakeEngine(by_row), max_resample_rounds=5)
    seen = train(tmp_path, rollouts, Algorithm(select=drop_uniform), data=data, steps=6)
    rounds = [one["rollout/resample_rounds"] for one in seen.metrics]
    assert rounds[0] > 0
    assert rounds[-2:] == [0, 0]


def test_rates_of_before_make_a_band_without_rewards(tmp_path):
    rates = tmp_path / "rates.jsonl"
    rates.write_text("".join(json.dumps({"id": str(n), "pass_rate": n / 11}) + "\n" for n in range(12)))
    rule = PassRates(low=0.4, high=0.7, online=False, initial=str(rates), retry_after=0)
    data = data_module(tmp_path, curriculum=Curriculum(pass_rates=rule), stage="sft")
    data.setup("fit")
    assert Counter(prompt.id for prompt in data.draw_prompts(9)) == {"5": 3, "6": 3, "7": 3}


def test_completions_have_the_length_of_the_step_that_asks_for_them(tmp_path):
    engine = FakeEngine(by_row)
    schedule = Schedule([0, 2, 3], [1, 3, 4])
    seen = train(tmp_path, callback(engine, length_schedule=schedule), steps=5)
    assert [call.sampling.max_completion_tokens for call in engine.calls] == [1, 1, 3, 4, 4]
    assert [one["data/max_completion_tokens"] for one in seen.metrics] == [1, 1, 3, 4, 4]
    with pytest.raises(ValueError, match=r"length_schedule goes up to 5, above rollout\.sampling\.max_completion_tok"):
        train(tmp_path, callback(engine, length_schedule=Schedule([0], [5])))


def test_rollouts_over_several_updates_follow_a_curriculum(tmp_path):
    """Groups come out of order, and what is under way keeps the length that it began with."""
    engine = SlowEngine(seconds=0.01, tail=1.0)
    schedule = Schedule([0, 3], [4, 8])
    rollouts = asynchronous(engine, length_schedule=schedule, sampling=SamplingParams(2, 8))
    data = data_module(tmp_path, count=24, curriculum=Curriculum(pass_rates=PassRates(weight="failure", memory=0)))
    seen = train(tmp_path, rollouts, data=data, steps=6)
    lengths = [[one.num_sampled for group in batch.groups for one in group.completions] for batch in seen.batches]
    assert max(lengths[0]) <= 4
    trained = [int(group.prompt.id) for batch in seen.batches for group in batch.groups]
    known = ~torch.from_numpy(data.stream.order.pools[0].rates).isnan()
    assert set(known.nonzero().flatten().tolist()) == set(trained)
    saved = data.stream.state_dict()
    assert saved["positions"][0] >= len(trained)


# ---- resuming ----


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "text.jsonl"
    records = [{"id": f"text{n}", "question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(5)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def everything(text_source, **trainer):
    """Two sources, dynamic sampling, loader workers; rows, shares, frames and lengths all change."""
    values = config("rl")
    values["trainer"] |= {"max_epochs": -1, "limit_val_batches": 0, **trainer}
    values["model"]["optimizer"] = {"lr": 1e-2}
    values["model"]["algorithm"] = {"select": "longrl.algorithms.drop_uniform"}
    values["model"]["mini_batches_per_rollout"] = 2
    lengths = {"steps": [0, 4, 8], "values": [2, 3, 5]}
    values["rollout"] = rollouts(max_resample_rounds=2, length_schedule=lengths)
    values["data"] |= {
        "train": [
            {"source": str(videos() / "train.jsonl"), "weight": 3},
            {
                "source": str(text_source),
                "weight": 1,
                "row_function": "longrl.datamodules.rows.text_math_row",
            },
        ],
        "video": {"fps": 1.0, "max_frames": 8},
        "num_workers": 1,
        "curriculum": {
            "pass_rates": {"low": 0.05, "high": 0.95, "weight": "variance", "pass_share": 0.5, "retry_after": 2},
            "learning_progress": {"window": 2, "floor": 0.2},
            "video": {"max_frames": {"steps": [0, 4, 8], "values": [4, 8, 4], "shape": "linear"}},
        },
    }
    values["checkpoint"] = {"every_n_train_steps": 6}
    return values


def test_a_run_with_every_curriculum_that_is_resumed_ends_as_the_uninterrupted_one(tmp_path, text_source):
    whole = run(tmp_path / "whole", everything(text_source, max_steps=12))
    first = run(tmp_path / "parts", everything(text_source, max_steps=6))
    run(first, everything(text_source, max_steps=12), f"--ckpt_path={first / 'checkpoints' / 'last.ckpt'}")
    assert_same_end(first, whole)
    found = {name: [] for name in ("data/max_frames", "data/max_completion_tokens", "data/weight_train")}
    for (_, name), value in sorted(metrics(whole).items()):
        if name in found:
            found[name].append(float(value))
    # Steps that find fewer groups take fewer optimizer steps; numbers are in order all the same.
    assert sorted(set(found["data/max_frames"])) == [4, 6, 8]  # whole temporal patches of two
    peak = found["data/max_frames"].index(8)
    assert found["data/max_frames"][:peak] == sorted(found["data/max_frames"][:peak])
    assert found["data/max_frames"][peak:] == sorted(found["data/max_frames"][peak:], reverse=True)
    assert found["data/max_frames"][-1] == 4
    assert sorted(set(found["data/max_completion_tokens"])) == [2, 3, 5]
    assert len(set(found["data/weight_train"])) > 2
