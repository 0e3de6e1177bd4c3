"""Steps on trajectories: ratios, scores, gradients of any split, the reference, weights that reach the sampler."""

import dataclasses
import itertools

import pytest
import torch

from longrl.algorithms import Algorithm, gaussian_mean, group_normalized, grpo_guard, part_normalized
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.sampler import DiffusionSampling
from longrl.diffusion.steps import CPS, FlowSDE
from longrl.diffusion.trajectory_rows import RowBatch, TrajectoryGroup, score_rows, split_rows, trajectory_rows
from longrl.diffusion.windows import RandomWindow
from longrl.models.ema import EMASettings
from longrl.models.lora import LoRASettings
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.skipped_steps import FOLDER, load_step_record
from longrl.rewards import think_answer_format
from longrl.strategies.fsdp import RootModule
from longrl.types import Row, TextPrompt
from tests.diffusion.test_diffusion_family import sampled, stock, stock_frames
from tests.diffusion.tiny import FAMILIES, PromptRows, fit, sd3_family

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
CPU = torch.device("cpu")
NAMES = list(FAMILIES)
SAMPLING = DiffusionSampling(num_generations=3, num_steps=4, guidance_scale=2.0)


def module(name="sd3", lr=1e-3, **kwargs):
    family = kwargs.pop("family", None) or FAMILIES[name]()
    settings = {"optimizer": OptimizerSettings(lr=lr), "algorithm": Algorithm(clip_low=1e-4, clip_high=1e-4)}
    return DiffusionModule(family, **{**settings, **kwargs})


# ---- steps left out ----


def test_a_step_whose_gradient_is_not_finite_moves_nothing_and_is_recorded(tmp_path):
    policy = module(max_nonfinite_steps=2, mini_batches_per_rollout=1)
    policy.configure_model()
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    next(policy.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RuntimeError, match="of 2 optimizer steps in a row was not finite"):
        fit(policy, SAMPLING, data=PromptRows(num_batches=3), default_root_dir=tmp_path)
    assert all(torch.equal(value, start[name]) for name, value in policy.model.state_dict().items())
    files = sorted((tmp_path / FOLDER).iterdir())
    assert len(files) == 2
    record = load_step_record(files[0])
    assert [row.problem for row in record.rows] == ["a red picture", "a small cat"]
    assert len(record.facts["seeds"]) == 6
    assert len(record.facts["steps"]) + 1 == len(record.tensors["latents.5"])
    assert record.tensors["rewards"].shape == (2, 3)


# ---- averages ----


def test_weights_saved_amid_a_validation_are_no_averages_and_the_validation_goes_on_with_them():
    policy = module(ema=EMASettings())
    policy.configure_model()
    averages = [value.clone() for value in policy.ema_weights.buffers()]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 1.0
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    policy.on_validation_start()
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    assert all(map(torch.equal, trained, averages))
    saved = policy.state_dict()  # as a signal's checkpoint
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in weights.items())
    policy.on_validation_batch_end(None, None, 0)
    assert all(map(torch.equal, trained, averages))


# ---- scores ----


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.8)])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_ratio_is_one_and_stored_trajectories_score_as_sampled(name, dynamics):
    sampling = DiffusionSampling(num_generations=3, num_steps=4, guidance_scale=2.0, dynamics=dynamics)
    record = fit(module(name, rows_per_micro_batch=5), sampling)
    (metrics,) = record.metrics
    assert metrics["train/ratio_mean"] == 1.0
    assert metrics["train/approx_kl"] == 0.0
    assert metrics["train/mismatch_max"] < 1e-5
    assert metrics["train/grad_norm"] > 0
    (groups,) = record.groups
    assert [len(sample.logprobs) for group in groups for sample in group.completions] == [3] * 6


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_samples_and_steps_score_as_sampled(name):
    family = FAMILIES[name]()
    model, texts = family.build().eval(), ["a red picture", "a small cat"]
    window = RandomWindow(2)
    samples = sampled(family, model, texts, 2.0, num_steps=5, window=window)
    prompts = [TextPrompt(Row(text, text, "")) for text in texts]
    groups = [TrajectoryGroup(prompt, [sample]) for prompt, sample in zip(prompts, samples, strict=True)]
    rows = trajectory_rows(groups)
    assert [len(part) for part in split_rows(rows, 3)] == [2, 2]
    with torch.no_grad():
        scores = score_rows(RootModule(family, model), RowBatch.from_rows(rows[::-1], CPU))
    expected = torch.cat([sample.logprobs for sample in samples]).flip(0)
    torch.testing.assert_close(scores.logp, expected, rtol=0, atol=1e-5)
    old = RowBatch.from_rows(rows[::-1], CPU).old_mean
    torch.testing.assert_close(scores.mean, old, rtol=1e-5, atol=1e-5)


# ---- gradients ----


@pytest.mark.parametrize("surrogate", ["clipped", "grpo_guard"])
@pytest.mark.parametrize("name", NAMES)
def test_any_split_into_micro_batches_gives_the_same_gradient(name, surrogate):
    algorithm = Algorithm(
        kl=gaussian_mean, kl_coef=0.1, **({"surrogate": grpo_guard} if surrogate == "grpo_guard" else {})
    )
    found = []
    for size in (100, 1, 5):
        policy = module(name, algorithm=algorithm, rows_per_micro_batch=size, epochs_per_rollout=2, lr=1e-5)
        found.append(fit(policy, SAMPLING, steps=2).gradients)
    for step, tolerance in enumerate((1e-4, 2e-3)):  # the second after a step of Adam, which turns rounding into signs
        whole = found[0][step]
        largest = max(float(grad.abs().max()) for grad in whole.values())
        for other in found[1:]:
            for key, grad in whole.items():
                torch.testing.assert_close(other[step][key], grad, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_those_drawn_with_them(name):
    whole = fit(module(name), SAMPLING, samples_per_batch=8).groups[0]
    for drawn_together in (1, 3):
        found = fit(module(name), SAMPLING, samples_per_batch=drawn_together).groups[0]
        for group, other in zip(whole, found, strict=True):
            for one, same in zip(group.completions, other.completions, strict=True):
                torch.testing.assert_close(same.final, one.final, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(same.logprobs, one.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_part", [False, True], ids=["grpo", "gdpo"])
def test_the_gradient_is_that_of_the_formula(by_part):
    """-A grad logp, averaged over samples and steps, from the stored trajectories and plain autograd."""
    family = sd3_family()
    advantage = part_normalized if by_part else group_normalized
    algorithm = Algorithm(clip_low=1e-4, clip_high=1e-4, advantage=advantage)
    record = fit(module(family=family, max_grad_norm=0.0, algorithm=algorithm), SAMPLING)
    ((one, two),) = record.groups
    rewards = torch.stack([one.rewards, two.rewards])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    if by_part:  # the reward has one part
        assert list(one.part_weights) == list(one.reward_parts)
        advantages = advantages / advantages.std()
    model = family.build()
    rows = RowBatch.from_rows(trajectory_rows([one, two]), CPU)
    logp = score_rows(RootModule(family, model), rows).logp.view(2, 3, 3)
    (-advantages[..., None] * logp).mean().backward()
    for name, parameter in model.named_parameters():
        found = record.gradients[0].get(name)
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


def test_later_updates_on_a_rollout_have_ratios_to_the_weights_that_sampled():
    record = fit(module(epochs_per_rollout=2, lr=1e-2), SAMPLING, steps=2)
    (metrics,) = record.metrics  # means over both updates
    assert metrics["train/ratio_mean"] != 1.0
    assert metrics["train/clip_fraction_high"] + metrics["train/clip_fraction_low"] > 0.1


def test_a_prompt_that_comes_again_in_a_batch_gets_other_samples():
    data, same_start = PromptRows(), DiffusionSampling(num_generations=2, num_steps=2, same_start=True)
    data.rows = [data.rows[0], data.rows[1], data.rows[0]]
    for sampling in (SAMPLING, same_start):
        first, _, again = fit(module(), sampling, data=data).groups[0]
        alone, _ = fit(module(), sampling).groups[0]
        for one, other, copy in zip(first.completions, alone.completions, again.completions, strict=True):
            torch.testing.assert_close(one.final, other.final, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(one.final, copy.final, rtol=1e-2, atol=1e-2)


def test_a_sampler_that_parts_from_the_update_ends_the_run_before_its_step(monkeypatch):
    def stale(policy, rows):
        found = score_rows(policy, rows)
        return dataclasses.replace(found, logp=found.logp + 2e-3)

    monkeypatch.setattr("longrl.diffusion.diffusion_module.score_rows", stale)
    policy, before = module(), sd3_family().build().state_dict()
    with pytest.raises(RuntimeError, match=r"mean 0.002, .*model.max_mismatch=0.001"):
        fit(policy, SAMPLING)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    fit(module(max_mismatch=3e-3), SAMPLING)


# ---- the reference ----


@pytest.mark.parametrize("lora", [None, LoRASettings(rank=4, alpha=8)])
def test_the_reference_is_the_policy_that_the_run_began_with(lora):
    algorithm = Algorithm(kl=gaussian_mean, kl_coef=0.01)
    record = fit(module(family=sd3_family(lora=lora), algorithm=algorithm, lr=1e-2), SAMPLING, steps=3)
    kl = [metrics["train/kl_ref"] for metrics in record.metrics]
    assert kl[0] < 1e-10
    assert kl[2] > 1e-6


def test_with_adapters_nothing_else_is_trained():
    policy = module(family=sd3_family(lora=LoRASettings(rank=2)))
    before = sd3_family().build().state_dict()
    record = fit(policy, SAMPLING, steps=2)
    assert all(".lora_" in name for name in record.gradients[0])
    for name, value in policy.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])


# ---- weights that sync ----


@pytest.mark.parametrize("lora", [None, LoRASettings(rank=4, alpha=8)])
@pytest.mark.parametrize("name", NAMES)
def test_after_an_update_samples_change_and_equal_those_of_a_freshly_exported_stock_pipeline(name, lora, tmp_path):
    family = FAMILIES[name](lora=lora)
    policy = module(family=family, lr=0.1)
    texts, seeds = ["a red picture", "a small cat"], (5, 6)
    before = sampled(family, family.build().eval(), texts, 2.0, seeds=seeds)
    fit(policy, SAMPLING, steps=2)
    after = sampled(family, policy.model.eval(), texts, 2.0, seeds=seeds)
    frames = [family.decode_latents(torch.stack([sample.final for sample in own])).float() for own in (before, after)]
    assert float((frames[0] - frames[1]).abs().max()) > 4
    family.export(policy.model, tmp_path / "exported")
    pipeline = stock(family, tmp_path / "exported")
    expected = stock_frames(pipeline, family, texts, 2.0, 4, seeds) * 255
    assert float((frames[1] - expected).abs().max()) <= 1.01


# ---- errors ----


def test_batches_that_nothing_sampled_for_are_refused():
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1
    )
    with pytest.raises(ValueError, match="rollout.reward"):
        trainer.fit(module(), PromptRows())


def test_a_rollout_without_noise_is_refused():
    with pytest.raises(ValueError, match="no denoising step draws noise"):
        fit(module(), DiffusionSampling(num_generations=2, num_steps=4, dynamics=FlowSDE(0.0)))


def test_a_run_whose_first_rewards_all_fail_ends_at_once_with_the_reason(monkeypatch):
    monkeypatch.setattr("tests.diffusion.tiny.redness", think_answer_format)
    with pytest.raises(ValueError, match=r"first with AttributeError: .*'text'; for a diffusion model"):
        fit(module(), DiffusionSampling(num_generations=2, num_steps=2), steps=99)


def test_a_run_of_which_one_reward_fails_goes_on(monkeypatch):
    values = iter([float("nan"), 0.0, 1.0, 0.5])
    monkeypatch.setattr("tests.diffusion.tiny.redness", lambda frames, row: next(values))
    record = fit(module(), DiffusionSampling(num_generations=2, num_steps=2))
    assert record.metrics[0]["rollout/failed_rewards"] == 0.25


def test_what_rewards_need_is_missed_before_weights_are_loaded(monkeypatch):
    def prepare(reward):
        raise ValueError("a package is missing")

    monkeypatch.setattr("longrl.rewards.RewardSum.prepare", prepare)
    policy = module()
    with pytest.raises(ValueError, match="a package is missing"):
        fit(policy, SAMPLING)
    assert not policy.is_built


def test_a_run_whose_rewards_all_fail_later_ends(monkeypatch):
    values = itertools.chain([0.0, 1.0, 0.0, 1.0], itertools.repeat(float("nan")))
    monkeypatch.setattr("tests.diffusion.tiny.redness", lambda frames, row: next(values))
    with pytest.raises(RuntimeError, match="no group was of use"):
        fit(module(), DiffusionSampling(num_generations=2, num_steps=2), steps=99, data=PromptRows(num_batches=12))


def test_micro_batches_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows_per_micro_batch"):
        module(rows_per_micro_batch=0)
