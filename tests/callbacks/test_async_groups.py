"""Rollouts that go on over several updates, by a slow engine of long-tailed lengths in the process of the test."""

import collections
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from longrl.algorithms import Algorithm, greedy_centered
from longrl.callbacks.async_groups import AskedPrompt, AsyncGroups
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.engines.hf import HFEngine
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.strategies.axis import world_axis
from longrl.types import SamplingParams
from tests.callbacks.test_environment_rollouts import rl as clips_rl
from tests.callbacks.test_rollout import Elsewhere, callback, data_module, half_right, ids, trainer_of
from tests.distributed import run_distributed
from tests.runs import checkpoint, data_order, metrics, rollouts, run, run_in_child, text_config
from tests.slow_engine import SlowEngine
from tests.strategies.test_runs import grid
from tests.test_resume import LAST, killed
from tests.tiny import vl_family

SAMPLING = SamplingParams(num_generations=2, max_completion_tokens=8)


class Weights(Callback):
    """Keeps the weights of every step, and scores all completions of the run by those that drew each token."""

    def __init__(self):
        self.of_step, self.batches, self.metrics = {}, [], []
        self.differences = []
        self.ages = collections.Counter()
        self.is_cut = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = pl_module.model.state_dict()
        self.of_step[trainer.global_step] = {name: value.clone() for name, value in state.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.global_step - pl_module.steps_per_rollout, batch))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        for step, batch in self.batches:
            prompts = [group.prompt for group in batch.groups]
            completions = [group.completions for group in batch.groups]
            engine = torch.cat([completion.logprobs for group in completions for completion in group])
            versions = torch.cat([completion.versions for group in completions for completion in group])
            self.ages.update(((step - versions) / pl_module.steps_per_rollout).ceil().int().tolist())
            self.is_cut += [len(one.versions.unique()) > 1 for group in completions for one in group]
            for version in versions.unique().tolist():
                pl_module.model.load_state_dict(self.of_step[version])
                logp = pl_module.score(pl_module.policy, prompts, completions, batch.features)
                self.differences.append(float((engine - logp)[versions == version].abs().max()))


def asynchronous(engine, **options):
    options = {"max_staleness": 2, "sampling": SAMPLING, "max_mismatch": 1e-4, **options}
    return callback(engine, **options)


def fit(folder, rollouts, steps=6, algorithm=None, family=None, mini_batches=1, **options):
    data = data_module(folder, family, count=64)
    optimizer = OptimizerSettings(lr=1e-2)
    policy = PolicyModule(data.renderer.family, algorithm, optimizer, mini_batches_per_rollout=mini_batches)
    weights = Weights()
    trainer_of(rollouts, weights, steps=steps, **options).fit(policy, datamodule=data)
    return weights


def drawn(folder, count):
    """The first prompts of the data."""
    data = data_module(folder, count=64)
    data.setup("fit")
    return [prompt.id for prompt in data.draw_prompts(count)]


def trained(weights):
    return [name for _, batch in weights.batches for name in ids(batch.groups)]


# ---- what is trained on ----


def test_every_token_has_the_log_probability_of_the_weights_that_drew_it(tmp_path):
    engine = SlowEngine(seconds=0.02, tail=1.0)
    seen = fit(tmp_path, asynchronous(engine), mini_batches=2)
    assert max(seen.differences) < 1e-5
    assert any(seen.is_cut)
    assert set(seen.ages) == {0, 1, 2}
    assert engine.synced == [0, 2, 4, 6, 8, 10]
    for step, metrics_of_step in enumerate(seen.metrics):
        assert metrics_of_step["rollout/prompts_in_flight"] == 6
        assert metrics_of_step["train/mismatch_max"] < 1e-5 or step > 0
    assert max(one["rollout/staleness_max"] for one in seen.metrics) == 2
    assert seen.metrics[-1]["rollout/engine_busy"] > 0.5
    assert seen.metrics[-1]["rollout/engine_requests"] > 1
    # The first prompts of the data, each once; those in flight at the end were asked, too.
    assert len(set(trained(seen))) == 12
    given_up = sum(one["rollout/asked_again"] + one["rollout/dropped"] for one in seen.metrics)
    asked = list(dict.fromkeys(name for name, *_ in engine.asked))
    assert asked == drawn(tmp_path, len(asked))
    assert len(asked) == 6 * 2 + 4 - given_up or given_up


def test_no_step_waits_for_a_straggler(tmp_path):
    """A prompt that never ends is waited for by nobody, asked again twice, and dropped."""
    engine = SlowEngine()
    (slow,) = drawn(tmp_path, 1)
    engine.seconds_of = lambda trajectory: 1e3 if trajectory.prompt.id == slow else 0.0
    seen = fit(tmp_path, asynchronous(engine), steps=11)
    assert slow not in trained(seen)
    assert sum(one["rollout/asked_again"] for one in seen.metrics) == 2
    assert sum(one["rollout/dropped"] for one in seen.metrics) == 1


def test_dynamic_sampling_draws_further_prompts_and_baselines_are_greedy(tmp_path):
    engine = SlowEngine(seconds=0.002, tail=0.5)
    algorithm = Algorithm(
        advantage=greedy_centered,
        greedy_baseline=True,
        select=lambda groups: [g for g in groups if int(g.prompt.id) % 2],
    )
    seen = fit(tmp_path, asynchronous(engine, max_resample_rounds=20), algorithm=algorithm)
    assert len(trained(seen)) == len(set(trained(seen))) == 12
    assert all(int(name) % 2 for name in trained(seen))
    for _, batch in seen.batches:
        for group in batch.groups:
            assert len(group.completions) == 2
            assert group.baseline is not None
    assert any(one["rollout/resample_rounds"] for one in seen.metrics)
    assert max(seen.ages) <= 2
    assert max(seen.differences) < 1e-5


def test_a_validation_in_between_has_the_engine_to_itself(tmp_path):
    engine = SlowEngine(seconds=0.01, tail=1.0)
    seen = fit(tmp_path, asynchronous(engine), steps=4, limit_val_batches=2, val_check_interval=1)
    assert engine.num_generated == 2 + 1 + 4 * 2  # before the first step: Lightning's check, and the comparison
    assert max(seen.differences) < 1e-5
    assert len(set(trained(seen))) == 8


def test_an_error_in_the_middle_of_a_step_loses_nothing(tmp_path, monkeypatch):
    """One group of the step is there already, a second was filtered, and a further prompt is to be drawn."""
    draw_prompts = LongVideoReason.draw_prompts
    first = []

    def drawn_until_then(self, count):
        if len(first) >= 5:
            raise ConnectionError("gone")
        return draw_prompts(self, count)

    def one_of_a_call(groups):
        first.extend(groups)
        return groups[:1]

    monkeypatch.setattr(LongVideoReason, "draw_prompts", drawn_until_then)
    rollouts = asynchronous(SlowEngine(), max_resample_rounds=20)
    assert rollouts._source.undo_step()  # before a step has begun its batch is to be read again
    with pytest.raises(ConnectionError, match="gone"):
        fit(tmp_path, rollouts, algorithm=Algorithm(select=one_of_a_call))
    assert not rollouts._source.undo_step()
    saved = rollouts.state_dict()["asked"]
    rollouts.teardown(None, None, "fit")
    waiting = [one["prompt"]["id"] for one in saved["prompts"][0]]
    (kept,) = [one["prompt"]["id"] for one in saved["kept"][0]]
    assert kept == first[3].prompt.id
    monkeypatch.undo()
    assert sorted(waiting + ids(first)) == sorted(drawn(tmp_path, len(waiting) + len(first)))


class WithoutThread(AsyncGroups):
    """Of two ranks the second has a thread that an error has ended."""

    def _encode(self, module, asked):
        pass

    def _begin(self, module, prompt):
        return []

    def _submit(self, module, number, trajectories, seed):
        if module.parallel.world.rank == 1:
            raise ConnectionError("gone")


def asked_on_a_rank():
    world = world_axis()
    groups = WithoutThread(SimpleNamespace(seed=0), 2, 0)
    groups._queue.extend(AskedPrompt(None) for _ in range(4))
    with pytest.raises((ConnectionError, RuntimeError), match="gone"):
        groups._ask(SimpleNamespace(parallel=SimpleNamespace(world=world, dp=world)), 3)
    return sorted(groups._asked), len(groups._queue)


def test_a_thread_that_an_error_has_ended_is_known_on_all_ranks_and_loses_no_prompt():
    assert run_distributed(asked_on_a_rank, 2) == [([0, 1, 2], 1)] * 2


def test_groups_too_many_for_a_step_wait_for_the_next(tmp_path):
    """As of a checkpoint of more ranks."""
    ((_, batch),) = fit(tmp_path, asynchronous(SlowEngine()), steps=1).batches
    rollouts = asynchronous(SlowEngine())
    rollouts._source._kept = [*batch.groups, *batch.groups]
    seen = fit(tmp_path, rollouts, steps=3)
    assert [len(batch.groups) for _, batch in seen.batches] == [2, 2, 2]
    assert trained(seen)[:4] == ids(batch.groups) * 2
    # What was under way at the end would be the first that a further run asks.
    assert not rollouts._source._asked
    assert len(rollouts._source._queue) == 4


@pytest.mark.parametrize(
    ("engine", "family", "said"),
    [
        (HFEngine(), None, r"max_staleness=2 needs an engine in another process, got HFEngine"),
        (Elsewhere(half_right), None, r"max_staleness=2 has completions go on .* Elsewhere cannot: its weights change"),
        (SlowEngine(), vl_family, r"the encoder trains; set model.family.init_args.freeze_vision_encoder to true"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, engine, family, said):
    with pytest.raises(ValueError, match=said):
        fit(tmp_path, asynchronous(engine), family=family and family())


# ---- whole runs ----


def text_rl(folder, engine="SlowEngine", **options):
    """5 steps of 2 prompts; each prompt has a number of its own."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"id": f"r{n}", "problem": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(90))
    )
    values = text_config(rows, "rl")
    sampling = {"num_generations": 2, "max_completion_tokens": 8}
    values["rollout"] = rollouts("tests.environment_runs.by_tokens", sampling=sampling, max_staleness=2, **options)
    values["rollout"]["max_mean_mismatch"] = 10.0
    values["rollout"]["engine"] = {
        "class_path": f"tests.slow_engine.{engine}",
        "init_args": {"seconds": 0.02, "tail": 1.0, "record": str(folder / "asked.jsonl")},
    }
    values["trainer"] |= {"max_steps": 5}
    values["checkpoint"] = {"every_n_train_steps": 1}
    return values


def test_a_run_that_was_killed_asks_nothing_twice_and_loses_nothing(tmp_path):
    values = text_rl(tmp_path)
    values["rollout"]["max_staleness"] = 4  # in so few steps nobody is given up
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 3, "saved")) == -signal.SIGKILL
    (saved,) = checkpoint(folder)["callbacks"]["RolloutCallback"]["asked"]["prompts"]
    before = len((tmp_path / "asked.jsonl").read_text().splitlines())
    run(folder, values, f"--ckpt_path={folder / LAST}")
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()[before:]]

    # 1. Completions go on where they were: finished ones are not asked, others with all tokens that they had.
    begun = {}
    for prompt in saved:
        for number, one in enumerate(prompt["trajectories"]):
            begun[prompt["prompt"]["id"], number] = one
    assert sum(one["num_sampled"] > 0 for one in begun.values()) > 2
    assert any(one["num_sampled"] and one["finish_reason"] is None for one in begun.values())
    for name, number, sampled, _ in asked:
        one = begun.get((name, number))
        if one is not None:
            assert one["finish_reason"] is None
            assert sampled >= one["num_sampled"]
    # 2. Prompts come in the order of the data, none twice and none left out: trained on or under way at the end.
    steps = data_order(folder)
    (left,) = checkpoint(folder)["callbacks"]["RolloutCallback"]["asked"]["prompts"]
    names = [group[0] for _, _, groups in steps for group in groups] + [one["prompt"]["id"] for one in left]
    assert len(names) == len(set(names)) == 5 * 2 + 8
    drawn = [name for _, read, _ in steps for name in read]
    assert set(drawn) <= set(names)


def test_ranks_with_engines_of_their_own_and_those_that_share_one(tmp_path):
    """3 steps on 2 ranks with other prompts, then 2 on ranks that share prompts: the first of them asks for all."""
    values = text_rl(tmp_path)
    folder = tmp_path / "run"
    run_distributed(run, 2, folder, grid(values, 2, 1, 3))
    of_ranks = torch.load(folder / LAST / "meta.pt", weights_only=True)["callbacks"]["RolloutCallback"]["asked"]
    assert [len(prompts) for prompts in of_ranks["prompts"]] == [4, 4]
    run_distributed(run, 2, folder, grid(values, 2, 2, 5), f"--ckpt_path={folder / LAST}")
    logged = metrics(folder)
    assert max(float(logged[step, "rollout/staleness_max"]) for step in range(5)) <= 2
    fresh = [float(logged[step, "train/mismatch_mean_staleness_0"]) for step in range(5)]
    assert max(value for value in fresh if not math.isnan(value)) < 1e-5
    assert [float(logged[step, "rollout/prompts_in_flight"]) for step in range(5)] == [12] * 5
    (left,) = torch.load(folder / LAST / "meta.pt", weights_only=True)["callbacks"]["RolloutCallback"]["asked"][
        "prompts"
    ]
    assert len(left) == 8


@pytest.mark.slow
def test_turns_with_clips_go_on_over_updates(tmp_path):
    values = clips_rl()
    values["rollout"] |= {"max_staleness": 2, "max_mean_mismatch": 10.0, "max_mismatch": 1e-3}
    values["rollout"]["engine"] = {
        "class_path": "tests.slow_engine.SlowEngine",
        "init_args": {"seconds": 0.05, "tail": 1.0, "stop_token_ids": list(range(0, 400, 2))},
    }
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 2, "saved")) == -signal.SIGKILL
    run(folder, values, f"--ckpt_path={folder / LAST}")
    logged = metrics(folder)
    assert sum(float(logged[step, "rollout/observed_tokens"]) for step in range(3)) > 0
    fresh = [float(logged[step, "train/mismatch_mean_staleness_0"]) for step in range(3)]
    assert max(value for value in fresh if not math.isnan(value)) < 1e-4
