"""From prompts to rewarded, selected groups: with a scripted engine, and with the real one on a toy task."""

import dataclasses
import json
import logging
import math
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from longrl.algorithms import Algorithm, batch_normalized, drop_uniform, greedy_centered, group_normalized, raw
from longrl.callbacks.rollout import RolloutCallback
from longrl.callbacks.waiting_groups import restored_group, saved_group
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.engines.hf import HFEngine
from longrl.engines.parity import RenderedPrompt
from longrl.engines.rollout_engine import RolloutEngine
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.modules.staleness import token_staleness
from longrl.rewards import RewardSum, RewardTerm
from longrl.strategies.axis import Axis
from longrl.strategies.fsdp import RootModule
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Completion, Group, SamplingParams
from tests.tiny import text_family, vl_family

SAMPLING = SamplingParams(num_generations=2, max_completion_tokens=4)
DAPO = Algorithm(select=drop_uniform)


# ---- doubles ----


class FakeEngine(RolloutEngine):
    """Answers as told: `script(prompt id, num_generations)` gives the texts. Keeps what it was asked."""

    reads_policy_weights = True  # no engine of its own to compare with the trainer

    def __init__(self, script):
        self.script, self.calls, self.synced = script, [], []

    def sync(self, family, model, step):
        self.synced.append(step)

    def generate(self, family, model, prompts, features, sampling, seed, first=0):
        self.calls.append(SimpleNamespace(ids=[prompt.id for prompt in prompts], sampling=sampling, seed=seed))
        return [
            [
                Completion(family.encode_response(text), torch.zeros(len(family.encode_response(text))), text, "stop")
                for text in self.script(prompt.id, sampling.num_generations)
            ]
            for prompt in prompts
        ]


def right_is_good(completion, row):
    if completion.text == "fail":
        raise RuntimeError("this reward cannot judge")
    return float(completion.text == "right")


class Steps(Callback):
    """What each step trained on and logged."""

    def __init__(self):
        self.batches, self.metrics = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def data_module(folder, family=None, count=12, **options):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": f"{n + 1}"}) + "\n" for n in range(count)))
    options = {"prompts_per_batch": 2, "skipped_dir": str(folder), **options}
    return LongVideoReason(family or text_family(), train=str(file), val=str(file), test=str(file), **options)


def callback(engine=None, **options):
    options = {"reward": RewardSum([RewardTerm(right_is_good)]), "sampling": SAMPLING, **options}
    if engine is not None:
        options.setdefault("max_mean_mismatch", math.inf)  # a scripted answer's log-probabilities are no model's
    return RolloutCallback(engine=engine, **options)


def trainer_of(*callbacks, steps=1, **options):
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "limit_train_batches": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "callbacks": list(callbacks),
            **options,
        }
    )


def train(folder, rollouts, algorithm=None, steps=1, policy=None, data=None, **options):
    """Trains and gives what the steps saw."""
    data = data or data_module(folder)
    policy = policy or PolicyModule(data.renderer.family, algorithm, OptimizerSettings(lr=1e-3))
    seen = Steps()
    trainer_of(rollouts, seen, steps=steps, **options).fit(policy, datamodule=data)
    return seen


def order_of(folder, count, **options):
    """The ids in the order in which the data module hands them out."""
    data = data_module(folder, **options)
    data.setup("fit")
    return [prompt.id for prompt in data.draw_prompts(count)]


def half_right(prompt_id, count):
    return (["right", "wrong"] * count)[:count]


def ids(groups):
    return [group.prompt.id for group in groups]


# ---- one step ----


def test_a_step_generates_rewards_trains_and_logs(tmp_path):
    engine = FakeEngine(half_right)
    policy = PolicyModule(text_family(), optimizer=OptimizerSettings(lr=1e-2))
    policy.configure_model()
    before = policy.model.get_input_embeddings().weight.clone()
    seen = train(tmp_path, callback(engine), policy=policy, steps=2)
    assert [call.ids for call in engine.calls] == [order_of(tmp_path, 4)[:2], order_of(tmp_path, 4)[2:]]
    assert [ids(batch.groups) for batch in seen.batches] == [call.ids for call in engine.calls]
    assert engine.synced == [0, 1]  # optimizer steps done before
    assert len({call.seed for call in engine.calls}) == 2
    for group in seen.batches[0].groups:
        assert [completion.text for completion in group.completions] == ["right", "wrong"]
        assert group.rewards.tolist() == group.reward_parts["right_is_good"].tolist() == [1.0, 0.0]
        assert group.valid.tolist() == [True, True]
        assert not group.carried_over
    assert seen.metrics[0]["reward/mean"] == seen.metrics[0]["reward/right_is_good"] == 0.5
    assert seen.metrics[0]["reward/std_in_group"] == 0.5
    assert seen.metrics[0]["rollout/prompts_drawn"] == 2
    assert seen.metrics[0]["rollout/resample_rounds"] == seen.metrics[0]["rollout/surplus_groups"] == 0
    assert not torch.equal(policy.model.get_input_embeddings().weight, before)


def test_right_answers_become_more_likely(tmp_path):
    policy = PolicyModule(text_family(), optimizer=OptimizerSettings(lr=1e-3))
    seen = train(tmp_path, callback(FakeEngine(half_right)), policy=policy, steps=3)
    (batch, *_) = seen.batches
    before = RootModule(text_family(), text_family().build())
    for group in batch.groups:
        tokens = [[completion.token_ids for completion in group.completions]]
        split = [len(group.completions[0].token_ids), len(group.completions[1].token_ids)]
        after, start = (
            [float(part.sum()) for part in policy.score(scoring, [group.prompt], tokens, {}).split(split)]
            for scoring in (policy.policy, before)
        )
        assert after[0] - start[0] > after[1] - start[1]


def test_sft_batches_are_left_alone(tmp_path):
    engine = FakeEngine(half_right)
    seen = train(tmp_path, callback(engine), data=data_module(tmp_path, stage="sft"))
    assert engine.calls == []
    assert seen.batches[0].groups is None
    assert "train/loss" in seen.metrics[0]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_takes_one_greedy_completion_and_always_the_same_seed(tmp_path, stage):
    engine = FakeEngine(lambda prompt_id, count: ["right" if int(prompt_id) < 3 else "wrong"] * count)
    data = data_module(tmp_path, count=4, eval_prompts_per_batch=2)
    trainer = trainer_of(callback(engine, sampling=SamplingParams(8, 4, 0.7, 0.9, 5)), limit_val_batches=1.0)
    policy = PolicyModule(text_family())
    found = getattr(trainer, stage)(policy, datamodule=data)
    assert {(call.sampling.num_generations, call.sampling.temperature) for call in engine.calls} == {(1, 0.0)}
    assert len({call.seed for call in engine.calls}) == 1
    assert [call.ids for call in engine.calls] == [["0", "1"], ["2", "3"]]
    if stage == "predict":
        assert found == [[["right"], ["right"]], [["right"], ["wrong"]]]
    else:
        (values,) = found
        assert set(values.values()) == {0.75}
        assert ("val/right_is_good/general" in values) == (stage == "validate")  # `test` has its own table


def test_seeds_of_a_resumed_run_go_on(tmp_path):
    straight = FakeEngine(half_right)
    train(tmp_path, callback(straight), steps=4)
    first, second = callback(FakeEngine(half_right)), callback(FakeEngine(half_right))
    train(tmp_path, first, steps=2)
    second.load_state_dict(first.state_dict())
    train(tmp_path, second, steps=2)
    seeds = [call.seed for engine in (first.engine, second.engine) for call in engine.calls]
    assert seeds == [call.seed for call in straight.calls]
    other = callback(FakeEngine(half_right), seed=1)
    train(tmp_path, other, steps=4)
    assert not {call.seed for call in other.engine.calls} & set(seeds)


def test_a_prompt_that_comes_again_in_a_batch_has_a_seed_of_its_own(tmp_path):
    engine, data = FakeEngine(half_right), data_module(tmp_path, count=3)
    seen = train(tmp_path, callback(engine), steps=9, data=data, max_epochs=9)
    crossing = [step for step, batch in enumerate(seen.batches) if len(set(ids(batch.groups))) == 1]
    assert crossing
    for step, batch in enumerate(seen.batches):
        own, expected = ids(batch.groups), engine.calls[step].ids
        assert expected == (own if step not in crossing else [own[0], f"{own[0]} (copy 1)"])


# ---- dynamic sampling ----


def contrast_in(*some):
    """Groups of these prompts have a right and a wrong answer, all others only wrong ones."""
    return FakeEngine(lambda prompt_id, count: half_right(prompt_id, count) if prompt_id in some else ["wrong"] * count)


def test_groups_without_contrast_are_sampled_anew_and_the_surplus_is_carried_over(tmp_path):
    order = order_of(tmp_path, 10)
    #  step 1 reads 0 1 | 2 3 | 4 5 and keeps 1 4 5; step 2 has 5, reads 6 7 and keeps 7; step 3 reads 8 9
    engine = contrast_in(*(order[place] for place in (1, 4, 5, 7, 8, 9)))
    seen = train(tmp_path, callback(engine), DAPO, steps=3)
    assert [call.ids for call in engine.calls] == [order[start : start + 2] for start in (0, 2, 4, 6, 8)]
    assert [ids(batch.groups) for batch in seen.batches] == [[order[a], order[b]] for a, b in ((1, 4), (5, 7), (8, 9))]
    flags = [[group.carried_over for group in batch.groups] for batch in seen.batches]
    assert flags == [[False, False], [True, False], [False, False]]
    counts = [
        [metrics[f"rollout/{name}"] for name in ("prompts_drawn", "resample_rounds", "surplus_groups")]
        for metrics in seen.metrics
    ]
    assert counts == [[6, 2, 1], [2, 0, 0], [2, 0, 0]]
    assert seen.metrics[0]["reward/mean"] == pytest.approx(3 * 0.5 / 6)  # of all that was sampled, selected or not


def test_too_few_groups_after_all_refills_are_a_warning_and_a_smaller_step(tmp_path, caplog):
    order = order_of(tmp_path, 8)
    engine = contrast_in(order[0])
    with caplog.at_level(logging.WARNING):
        seen = train(tmp_path, callback(engine, max_resample_rounds=2), DAPO)
    assert len(engine.calls) == 3  # the batch and two refills
    assert ids(seen.batches[0].groups) == [order[0]]
    assert "dynamic sampling kept 1 of 2 groups after 2 rounds of resampling" in caplog.text
    assert "max_resample_rounds" in caplog.text
    assert "train/loss" in seen.metrics[0]


def test_no_group_at_all_is_no_step_and_the_run_goes_on(tmp_path):
    order = order_of(tmp_path, 10)
    seen = train(tmp_path, callback(contrast_in(order[4], order[5]), max_resample_rounds=1), DAPO, steps=2)
    assert seen.batches[0].groups == []
    assert "train/loss" not in seen.metrics[0]
    assert seen.metrics[0]["reward/mean"] == 0.0
    assert ids(seen.batches[1].groups) == [order[4], order[5]]


def test_a_run_that_keeps_no_group_for_long_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("longrl.callbacks.rollout.MAX_EMPTY_STEPS", 2)
    rollouts = callback(contrast_in(), max_resample_rounds=0)
    with pytest.raises(RuntimeError, match="in 2 steps in a row no group was of use"):
        train(tmp_path, rollouts, DAPO, steps=4)
    assert len(rollouts.engine.calls) == 2


def test_surplus_waits_as_long_as_it_takes(tmp_path):
    """Oldest first; nothing sampled is lost."""
    order = order_of(tmp_path, 8)
    engine = contrast_in(order[1], *order[2:])  # step 1 reads 0 1 | 2 3 and keeps 1 2 | 3; from then on all are good
    seen = train(tmp_path, callback(engine), DAPO, steps=3)
    trained = [name for batch in seen.batches for name in ids(batch.groups)]
    assert trained == order[1:7]


def test_carried_over_groups_survive_a_checkpoint_also_before_the_first_batch(tmp_path):
    order = order_of(tmp_path, 8)
    first = callback(contrast_in(*order[1:]))
    train(tmp_path, first, DAPO)
    file = tmp_path / "state.pt"
    torch.save(first.state_dict(), file)
    second = callback(contrast_in(*order[1:]))
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [saved["prompt"]["id"] for saved in second.state_dict()["waiting"][0]["carried"]] == [order[3]]
    data = data_module(tmp_path)
    data.setup("fit")
    data.draw_prompts(4)  # what the first run consumed
    resumed = data_module(tmp_path)
    resumed.load_state_dict(data.state_dict())
    seen = train(tmp_path, second, DAPO, data=resumed)
    assert ids(seen.batches[0].groups) == [order[3], order[4]]
    assert [group.carried_over for group in seen.batches[0].groups] == [True, False]
    assert ids(second._source.waiting.carried) == [order[5]]


# ---- groups sampled ahead ----


class Elsewhere(FakeEngine):
    """Answers in another process, as far as the callback can tell."""

    is_remote = True


def test_at_a_staleness_of_one_a_step_trains_on_what_was_sampled_during_the_last_update(tmp_path):
    order = order_of(tmp_path, 8)
    engine = Elsewhere(half_right)
    rollouts = callback(engine, max_staleness=1)
    seen = train(tmp_path, rollouts, steps=3)
    rollouts.state_dict()  # waits for what was begun last
    assert [call.ids for call in engine.calls] == [order[start : start + 2] for start in (0, 2, 4, 6)]
    assert engine.synced == [0, 0, 1, 2]  # what step 2 trains on was begun with the weights of step 1
    assert [ids(batch.groups) for batch in seen.batches] == [order[0:2], order[2:4], order[4:6]]
    assert [batch.groups[0].carried_over for batch in seen.batches] == [False, True, True]


def test_groups_sampled_ahead_survive_a_checkpoint(tmp_path):
    order = order_of(tmp_path, 8)
    first = callback(Elsewhere(half_right), max_staleness=1)
    train(tmp_path, first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = callback(Elsewhere(half_right), max_staleness=1)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    data = data_module(tmp_path)
    data.setup("fit")
    data.draw_prompts(4)  # what the first run consumed
    resumed = data_module(tmp_path)
    resumed.load_state_dict(data.state_dict())
    seen = train(tmp_path, second, data=resumed)
    assert ids(seen.batches[0].groups) == order[2:4]
    second.state_dict()
    assert [call.ids for call in second.engine.calls] == [order[4:6]]
    assert len({call.seed for engine in (first.engine, second.engine) for call in engine.calls}) == 3


def test_groups_sampled_ahead_need_no_pass_of_the_old_policy(tmp_path, monkeypatch):
    calls = []
    score = PolicyModule.score
    monkeypatch.setattr(PolicyModule, "score", lambda self, *a, **k: calls.append(1) or score(self, *a, **k))
    rollouts = callback(Elsewhere(half_right), max_staleness=1)
    seen = train(tmp_path, rollouts, steps=3)
    rollouts.state_dict()
    assert calls == []
    assert all(metrics["train/mismatch_mean"] > 1 for metrics in seen.metrics)  # scripted log-probabilities are 0


def test_a_rank_without_restored_groups_waits_for_the_others(tmp_path):
    rollouts = callback(Elsewhere(half_right), max_staleness=1)
    rollouts._source.waiting.restored = {"carried": [], "ahead": [], "unasked": []}
    rollouts._source.waiting.render_restored(None, OthersHaveOne())
    assert rollouts._source.waiting.prefetched == []


class OthersHaveOne(Axis):
    def max(self, number):
        return max(number, 1)


def test_staleness_needs_an_engine_in_another_process(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.max_staleness=1 needs .* got FakeEngine; use .*VLLMServerEngine"):
        train(tmp_path, callback(FakeEngine(half_right), max_staleness=1))


# ---- the gap between engine and trainer ----


class Offset(RolloutEngine):
    """The trainer's own model, whose log-probabilities are reported `offset` too high from call `after` on."""

    reads_policy_weights = True

    def __init__(self, offset, after=0):
        self.engine, self.offset, self.after, self.count = HFEngine(), offset, after, 0

    def sync(self, family, model, step):
        pass

    def generate(self, *args, **kwargs):
        self.count += 1
        offset = self.offset if self.count > self.after else 0.0
        groups = self.engine.generate(*args, **kwargs)
        return [[dataclasses.replace(c, logprobs=c.logprobs + offset) for c in own] for own in groups]


def two_updates(**options):
    return PolicyModule(text_family(), mini_batches_per_rollout=2, optimizer=OptimizerSettings(lr=1e-3), **options)


def test_the_gap_of_every_step_is_logged(tmp_path):
    seen = train(tmp_path, callback(Offset(-0.25), max_mean_mismatch=0.3), policy=two_updates(), steps=2)
    for metrics in seen.metrics:
        assert metrics["train/mismatch_mean"] == pytest.approx(0.25, abs=1e-4)
        assert metrics["train/mismatch_max"] == pytest.approx(0.25, abs=1e-4)
        assert metrics["train/mismatch_effective_share"] == pytest.approx(1.0, abs=1e-4)


def test_an_engine_that_parts_from_the_trainer_ends_the_run_before_the_update(tmp_path):
    policy = two_updates()
    policy.configure_model()
    before = policy.model.get_input_embeddings().weight.clone()
    with pytest.raises(RuntimeError, match=r"have parted: .* mean above max_mean_mismatch=0\.2"):
        train(tmp_path, callback(Offset(0.25), max_mean_mismatch=0.2), policy=policy)
    assert torch.equal(policy.model.get_input_embeddings().weight, before)


def test_trust_that_saves_nothing_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, callback(Offset(0.0), bypass_old_logp_below=0.1))
    assert "rollout.bypass_old_logp_below has no effect" in caplog.text


@pytest.mark.parametrize(("offset", "passes"), [(0.0, [1, 0, 0]), (0.25, [1, 1, 1])])
def test_a_trusted_engine_saves_the_pass_of_the_old_policy(tmp_path, monkeypatch, offset, passes):
    policy = two_updates()
    scored = []
    score = PolicyModule.score
    monkeypatch.setattr(PolicyModule, "score", lambda self, *a, **k: scored.append(1) or score(self, *a, **k))
    counts = []

    class Count(Callback):
        def on_train_batch_end(self, *args):
            counts.append(len(scored))
            scored.clear()

    trainer = trainer_of(callback(Offset(offset), bypass_old_logp_below=0.1), Count(), steps=3)
    trainer.fit(policy, data_module(tmp_path))
    assert counts == passes


def test_a_filtered_distribution_cannot_be_trusted(tmp_path, caplog):
    filtered = dataclasses.replace(SAMPLING, top_p=0.9)
    with pytest.raises(ValueError, match=r"bypass_old_logp_below=0\.1 needs top_p=1"):
        train(tmp_path, callback(HFEngine(), sampling=filtered, bypass_old_logp_below=0.1))
    with caplog.at_level(logging.WARNING):
        train(tmp_path, callback(HFEngine(), sampling=filtered, max_mean_mismatch=1e-9))  # the gap is no fault here
    assert "log-probabilities are those of the filtered distribution" in caplog.text


class Sees(FakeEngine):
    """Has weights of its own and reads prompts as told."""

    reads_policy_weights = False

    def __init__(self, script, change):
        super().__init__(script)
        self.change = change

    def rendered_prompts(self, family, prompts, features):
        return [self.change(prompt) for prompt in prompts]


def test_prompts_that_the_engine_reads_differently_end_the_run_before_its_first_step(tmp_path):
    engine = Sees(half_right, lambda prompt: RenderedPrompt(prompt.input_ids.flip(0)))
    with pytest.raises(RuntimeError, match=r"read the same prompts differently") as error:
        train(tmp_path, callback(engine))
    assert "input_ids: from [0] on, trainer" in str(error.value)
    train(tmp_path, callback(Sees(half_right, lambda prompt: RenderedPrompt(prompt.input_ids)), max_mismatch=math.inf))


# ---- baselines and failures ----


def test_the_greedy_baseline_is_the_reward_of_a_greedy_completion(tmp_path):
    engine = FakeEngine(lambda prompt_id, count: ["right"] if count == 1 else half_right(prompt_id, count))
    algorithm = Algorithm(advantage=greedy_centered, greedy_baseline=True)
    seen = train(tmp_path, callback(engine), algorithm)
    assert [(call.sampling.num_generations, call.sampling.temperature) for call in engine.calls] == [(2, 1.0), (1, 0.0)]
    assert engine.calls[0].ids == engine.calls[1].ids
    assert [group.baseline for group in seen.batches[0].groups] == [1.0, 1.0]
    assert all(len(group.completions) == 2 for group in seen.batches[0].groups)


def test_a_baseline_that_cannot_be_judged_masks_its_group(tmp_path):
    bad, good = order_of(tmp_path, 2)
    engine = FakeEngine(
        lambda name, count: half_right(name, count) if count > 1 else ["fail" if name == bad else "right"]
    )
    seen = train(tmp_path, callback(engine), Algorithm(advantage=greedy_centered, greedy_baseline=True))
    assert {group.prompt.id: group.valid.tolist() for group in seen.batches[0].groups} == {
        bad: [False, False],
        good: [True, True],
    }


def test_what_a_reward_needs_is_missed_before_weights_are_loaded(tmp_path, monkeypatch):
    def prepare(reward):
        raise ValueError("a package is missing")

    monkeypatch.setattr(RewardSum, "prepare", prepare)
    data = data_module(tmp_path)
    policy = PolicyModule(data.renderer.family)
    with pytest.raises(ValueError, match="a package is missing"):
        train(tmp_path, callback(FakeEngine(half_right)), policy=policy, data=data)
    assert not policy.is_built


def test_a_reward_that_raises_masks_its_completion_and_the_run_goes_on(tmp_path, caplog):
    engine = FakeEngine(lambda prompt_id, count: ["right", "wrong", "fail"])
    rollouts = callback(engine, sampling=SamplingParams(3, 4))
    with caplog.at_level(logging.WARNING):
        seen = train(tmp_path, rollouts, steps=2)
    assert len(seen.batches) == 2
    assert "this reward cannot judge" in caplog.text
    for group in seen.batches[0].groups:
        assert group.valid.tolist() == [True, True, False]
    assert seen.metrics[0]["rollout/failed_rewards"] == pytest.approx(1 / 3)
    without = train(tmp_path, callback(FakeEngine(half_right)))
    assert seen.metrics[0]["train/loss"] == pytest.approx(without.metrics[0]["train/loss"], rel=1e-5)
    assert seen.metrics[0]["train/grad_norm"] == pytest.approx(without.metrics[0]["train/grad_norm"], rel=1e-5)


# ---- rewards that judge nothing ----


def lowers(completion, row):
    return float(completion.lower() == row.answer)


def of_trl(prompts, completions, answer, **kwargs):
    return [float(text == "right") for text in completions]


def test_a_reward_that_fails_on_everything_ends_the_run_in_its_first_step_with_the_hint(tmp_path, caplog):
    rollouts = callback(FakeEngine(half_right), reward=RewardSum([RewardTerm(lowers)]))
    with pytest.raises(ValueError, match=(
        r"reward 'lowers' failed on every one of the 4 completions so far, of row .*, in .*test_rollout\.py line \d+, "
        r"first with AttributeError: 'Completion' object has no attribute 'lower'; .*completion\.text"
    )):  # fmt: skip
        train(tmp_path, rollouts, steps=9)
    assert len([record for record in caplog.records if "reward 'lowers' failed" in record.getMessage()]) == 1


def test_rollouts_of_one_row_are_given_a_second_one(tmp_path):
    rollouts = callback(FakeEngine(half_right), reward=RewardSum([RewardTerm(lowers)]))
    with pytest.raises(ValueError, match="failed on every one of the 4 completions so far"):
        train(tmp_path, rollouts, steps=9, data=data_module(tmp_path, prompts_per_batch=1))


def test_one_reward_of_two_that_fails_ends_the_run_too(tmp_path):
    rollouts = callback(FakeEngine(half_right), reward=RewardSum([RewardTerm(right_is_good), RewardTerm(lowers)]))
    with pytest.raises(ValueError, match="reward 'lowers' failed on every one"):
        train(tmp_path, rollouts, steps=9)


def test_a_reward_that_hangs_on_a_row_costs_that_row_and_the_run_ends_normally(tmp_path, caplog):
    def hangs(completion, row):
        if row.answer == "1":
            time.sleep(600)
        return float(completion.text == "right")

    rollouts = callback(FakeEngine(half_right), reward=RewardSum([RewardTerm(hangs)], time_limit_s=0.1))
    seen = train(tmp_path, rollouts, steps=6)
    assert len(seen.batches) == 6
    hung = [group for batch in seen.batches for group in batch.groups if group.prompt.row.answer == "1"]
    assert [group.valid.tolist() for group in hung] == [[False, False]]
    assert caplog.text.count("TookTooLong: no value within 0.1 s") == 1


def test_a_function_of_trl_trains(tmp_path):
    seen = train(tmp_path, callback(FakeEngine(half_right), reward=RewardSum([RewardTerm(of_trl)])))
    assert [group.rewards.tolist() for group in seen.batches[0].groups] == [[1.0, 0.0]] * 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_task_without_a_judge_is_missed_before_weights_are_loaded(tmp_path, split):
    data = data_module(tmp_path)
    other = tmp_path / "open.jsonl"
    records = [{"problem": "Why?", "answer": "because of tea"}, {"problem": "1 + 1?", "answer": "2"}]
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    data.sources[split] = [*data.sources[split], dataclasses.replace(data.sources[split][0], source=str(other))]
    policy = PolicyModule(data.renderer.family)
    rollouts = callback(FakeEngine(half_right), reward=RewardSum([RewardTerm("longrl.rewards.accuracy")]))
    with pytest.raises(ValueError, match=rf"1 of 14 rows of data\.{split} have the task 'open_ended', which no reward"):
        train(tmp_path, rollouts, policy=policy, data=data, limit_val_batches=1)
    assert not policy.is_built


@pytest.mark.parametrize(
    ("advantage", "said", "told"),
    [
        (group_normalized, ["wrong", "wrong"], 1),
        (group_normalized, ["right", "right"], 1),
        (group_normalized, ["right", "wrong"], 0),
        (batch_normalized, ["right", "right"], 1),
        (raw, ["wrong", "wrong"], 1),
        (raw, ["right", "right"], 0),
    ],
)
def test_steps_without_signal_are_told_once(tmp_path, caplog, advantage, said, told):
    rollouts = callback(FakeEngine(lambda prompt_id, count: said), warn_without_signal_after=2)
    train(tmp_path, rollouts, Algorithm(advantage=advantage), steps=5)
    assert caplog.text.count("in 2 steps in a row no group had a signal") == told


def test_steps_of_which_no_group_is_kept_have_no_signal(tmp_path, caplog):
    engine = FakeEngine(lambda prompt_id, count: ["wrong"] * count)
    train(tmp_path, callback(engine, warn_without_signal_after=2, max_resample_rounds=0), DAPO, steps=3)
    assert caplog.text.count("in 2 steps in a row no group had a signal") == 1


# ---- groups on disk ----


def video_data(folder, prompts_per_batch, **family):
    """2 videos of 4 questions each."""
    generate_videos(folder / "clips", SyntheticConfig(2, 1, scene_s=1.0, size=56))
    source = str(folder / "clips" / "train.jsonl")
    options = {"video": VideoSampling(fps=1.0), "prompts_per_batch": prompts_per_batch, "skipped_dir": str(folder)}
    return LongVideoReason(vl_family(**family), train=source, **options)


def test_a_group_survives_a_checkpoint(tmp_path):
    data = video_data(tmp_path, prompts_per_batch=1)
    data.setup("fit")
    (prompt,) = data.draw_prompts(1)
    assert prompt.media
    experts = torch.arange(12, dtype=torch.int16).view(2, 3, 2)
    of_prompt = torch.zeros(len(prompt.input_ids), 3, 2, dtype=torch.int16)
    completions = [
        Completion(torch.tensor([1, 2, 3]), torch.tensor([-0.1, -0.2, -0.3]), "a b c", "stop", experts, of_prompt),
        Completion(torch.tensor([4]), torch.tensor([-0.4]), "d", "length"),
    ]
    completions[0] = dataclasses.replace(completions[0], versions=torch.tensor([5, 5, 7]))
    parts = {"accuracy": torch.tensor([1.0, 0.0])}
    group = Group(
        prompt, completions, torch.tensor([0.9, 0.1]), parts, torch.tensor([True, False]), 0.5, carried_over=True
    )
    file = tmp_path / "group.pt"
    saved = saved_group(group)
    del saved["completions"][1]["versions"]  # as in a checkpoint from before there were any
    torch.save(saved, file)
    assert file.stat().st_size < 20_000  # no pixels
    restored = restored_group(torch.load(file, weights_only=True), data.renderer)
    assert restored.prompt.row == prompt.row
    assert torch.equal(restored.prompt.input_ids, prompt.input_ids)
    assert torch.equal(restored.prompt.position_ids, prompt.position_ids)
    assert restored.prompt.media[0].key == prompt.media[0].key
    assert torch.equal(restored.prompt.media[0].patches, prompt.media[0].patches)
    for one, other in zip(restored.completions, completions, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.logprobs, other.logprobs)
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    assert restored.completions[1].versions is None
    assert torch.equal(restored.completions[0].versions, completions[0].versions)
    assert token_staleness(restored.completions[0], True, step=9, steps_per_rollout=2).tolist() == [2, 2, 1]
    assert torch.equal(restored.completions[0].experts, experts)
    assert torch.equal(restored.completions[0].prompt_experts, of_prompt)
    assert torch.equal(restored.rewards, group.rewards)
    assert torch.equal(restored.valid, group.valid)
    assert torch.equal(restored.reward_parts["accuracy"], parts["accuracy"])
    assert (restored.baseline, restored.carried_over) == (0.5, True)


# ---- features ----


def encodes(policy):
    """Counts the media that pass the encoder from now on."""
    count = []
    policy.configure_model()
    vision_encoder = policy.family.media_encoders(policy.model)[0]
    vision_encoder.register_forward_hook(
        lambda module, args, kwargs, output: count.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    return count


def test_every_video_is_encoded_once_for_all_its_questions_completions_and_passes(tmp_path):
    data = video_data(tmp_path, prompts_per_batch=8, freeze_vision_encoder=True)
    algorithm = Algorithm(kl_coef=0.1)
    policy = PolicyModule(
        data.renderer.family,
        algorithm,
        OptimizerSettings(lr=1e-3),
        epochs_per_rollout=2,
        mini_batches_per_rollout=2,
        max_tokens_per_micro_batch=300,
    )
    count = encodes(policy)
    rollouts = callback(HFEngine(), reward=RewardSum([RewardTerm(odd_length)]))
    seen = train(tmp_path, rollouts, policy=policy, data=data)
    (batch,) = seen.batches
    assert len(batch.groups) == 8
    assert len({media.key for group in batch.groups for media in group.prompt.media}) == len(batch.features) == 2
    assert sum(count) == 2


@pytest.mark.parametrize("num_generations", [2, 8])
def test_pixels_are_held_once_whatever_the_number_of_completions(tmp_path, num_generations):
    data = video_data(tmp_path, prompts_per_batch=4)
    sampling = dataclasses.replace(SAMPLING, num_generations=num_generations)
    (batch,) = train(tmp_path, callback(HFEngine(), sampling=sampling), data=data).batches
    assert all(len(group.completions) == num_generations for group in batch.groups)
    held = {item.patches.data_ptr(): item.patches.nbytes for group in batch.groups for item in group.prompt.media}
    assert sum(held.values()) == sum(item.patches.nbytes for prompt in batch.prompts for item in prompt.media)
    completions = [completion for group in batch.groups for completion in group.completions]
    fields = {name for completion in completions for name, value in vars(completion).items() if value not in (None, ())}
    assert fields == {"token_ids", "logprobs", "text", "finish_reason"}


def test_a_frozen_towers_features_are_kept_for_later_steps(tmp_path):
    data = video_data(tmp_path, prompts_per_batch=2, freeze_vision_encoder=True)
    policy = PolicyModule(data.renderer.family, optimizer=OptimizerSettings(lr=1e-3))
    count = encodes(policy)
    train(tmp_path, callback(HFEngine()), policy=policy, data=data, steps=4)
    assert sum(count) == 2


def test_a_trainable_tower_encodes_once_for_the_rollout_and_once_per_update(tmp_path):
    data = video_data(tmp_path, prompts_per_batch=8, freeze_vision_encoder=False)
    policy = PolicyModule(data.renderer.family, optimizer=OptimizerSettings(lr=1e-3), max_tokens_per_micro_batch=300)
    count = encodes(policy)
    train(tmp_path, callback(HFEngine()), policy=policy, data=data)
    assert sum(count) == 2 + 2


# ---- learning ----


def odd_length(completion, row):
    return float(len(completion.text) % 2)


def share_of_e(completion, row):
    return completion.text.count("e") / max(len(completion.text), 1)


def test_the_reward_of_a_toy_task_rises(tmp_path):
    """Every completion is to consist of the letter e; nothing but the reward says so."""
    rollouts = callback(reward=RewardSum([RewardTerm(share_of_e)]), sampling=SamplingParams(16, 8))
    data = data_module(tmp_path, count=100, prompts_per_batch=4)
    policy = PolicyModule(data.renderer.family, optimizer=OptimizerSettings(lr=1e-2))
    seen = train(tmp_path, rollouts, policy=policy, data=data, steps=20)
    rewards = [metrics["reward/mean"] for metrics in seen.metrics]
    assert len(rewards) == 20
    assert max(rewards[:3]) < 0.1
    assert min(rewards[-3:]) > 0.4


def test_the_bytes_of_weights_that_the_engine_was_handed_are_counted_on_the_module():
    """Of engines that are given weights, and only in the steps in which they are."""

    class Handed(FakeEngine):
        def sync(self, family, model, step):
            if step not in self.synced:
                list(self.counted([("weight", torch.zeros(2, 3))]))
            super().sync(family, model, step)

    reward = RewardSum([RewardTerm(right_is_good)])
    callback = RolloutCallback(reward=reward, engine=Handed(None), sampling=SAMPLING)
    module = PolicyModule(text_family())
    module.model = None
    callback._steps.family = module.family
    for step in (0, 0, 1):
        callback._steps.sync(module, step)
    assert module.num_synced_bytes == 2 * 24
    assert set(module.phases.collect()) == {"sync"}
