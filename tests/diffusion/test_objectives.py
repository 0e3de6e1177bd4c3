"""Objectives on finished samples: their formulas, gradients of any split and on ranks, the old policy, refusals."""

import dataclasses
import math

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid

from longrl.algorithms import Algorithm, EntropyControl, gaussian_mean, grpo_guard, optimal_token_baseline
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.noised_rows import Item, NoisedBatch, NoiseLevels, noised_rows
from longrl.diffusion.objective_step import one_token_each
from longrl.diffusion.objectives import BestOfGroup, DiffusionDPO, DiffusionNFT, Velocities, ranked
from longrl.diffusion.old_policy import OldPolicySettings
from longrl.diffusion.sampler import DiffusionSampling, Trajectory, sample_trajectories, seeded_noise
from longrl.diffusion.trajectory_rows import TrajectoryGroup
from longrl.engines.rollout_engine import prompt_seed
from longrl.models.lora import LoRASettings
from longrl.modules.mini_batches import flatten_groups, make_mini_batches
from longrl.modules.optimizer import OptimizerSettings
from longrl.strategies.axis import SINGLE_RANK
from longrl.strategies.fsdp import RootModule
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.types import Row, TextPrompt
from tests.diffusion.tiny import FAMILIES, PromptRows, fit, sd3_family, sd3_folder, wan_folder
from tests.distributed import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
CPU = torch.device("cpu")
ODE = DiffusionSampling(num_generations=3, num_steps=4, guidance_scale=1.0, window=None)
TIMES = {"num_times": 5, "times_per_sample": 3}
OBJECTIVES = {
    "nft": DiffusionNFT(**TIMES, beta=0.5, kl_coef=0.1, old=OldPolicySettings(decay_per_step=0.5)),
    "dpo": DiffusionDPO(**TIMES, beta=50.0, imitation=0.1),
    "best": BestOfGroup(**TIMES, keep=2, kl_coef=0.1),
}


def module(name="sd3", objective="nft", lr=1e-3, **kwargs):
    family = kwargs.pop("family", None) or FAMILIES[name]()
    objective = OBJECTIVES.get(objective, objective)
    settings = {"optimizer": OptimizerSettings(lr=lr), "objective": objective, "max_grad_norm": 0.0}
    return DiffusionModule(family, **{**settings, **kwargs})


# ---- formulas ----


def fixed_batch():
    """The numbers that the released code was given: 3 rows of [4, 2, 2] in float64."""
    numbers = torch.arange(48, dtype=torch.float64)
    clean, noise = torch.sin(numbers).view(3, 4, 2, 2), torch.cos(numbers * 0.7).view(3, 4, 2, 2)
    velocities = [torch.sin(numbers * 0.3 + shift).view(3, 4, 2, 2) for shift in (1.0, 1.1, 0.8)]
    sigmas = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
    batch = NoisedBatch(
        noisy=(1 - sigmas) * clean + sigmas * noise, target=noise - clean, sigmas=sigmas, timesteps=torch.zeros(3),
        texts=("",) * 3, guidance_scale=1.0, item_index=torch.arange(3),
    )  # fmt: skip
    policy, old, reference = velocities
    return Velocities(policy.requires_grad_(), old, reference), batch


def test_nft_is_that_of_the_released_code():
    """The lines of NVlabs/DiffusionNFT, scripts/train_nft_sd3.py, gave these figures for the same numbers."""
    velocities, batch = fixed_batch()
    result = DiffusionNFT(beta=0.1).losses(velocities, batch, torch.tensor([2.0, -7.0, 0.5]).double())
    expected = torch.tensor([68.65426694763823, 42.659614606191184, 8.198055305240423]).double()
    torch.testing.assert_close(result.loss, expected, rtol=1e-7, atol=0)
    result.loss.mean().backward()
    gradient = velocities.policy.grad.flatten()
    assert float(gradient.square().sum()) == pytest.approx(0.523739231778542, rel=1e-7)
    first = torch.tensor([-0.010558888904808831, 0.09203757714434206, 0.1509531036633971]).double()
    torch.testing.assert_close(gradient[:3], first, rtol=1e-6, atol=0)


def test_nft_without_weighting_is_the_papers_equation():
    velocities, batch = fixed_batch()
    result = DiffusionNFT(beta=0.3, weighting="none", kl_coef=0.0).losses(
        dataclasses.replace(velocities, reference=None), batch, torch.tensor([5.0, 0.0, -2.5]).double()
    )
    v, old, target = velocities.policy, velocities.old, batch.target
    expected = []
    for row, r in enumerate((1.0, 0.5, 0.25)):
        towards, away = 0.7 * old[row] + 0.3 * v[row], 1.3 * old[row] - 0.3 * v[row]
        expected.append(r * ((towards - target[row]) ** 2).mean() + (1 - r) * ((away - target[row]) ** 2).mean())
    torch.testing.assert_close(result.loss, torch.stack(expected), rtol=1e-12, atol=0)
    found, *_ = torch.autograd.grad(result.loss.sum(), v, retain_graph=True)
    wanted, *_ = torch.autograd.grad(sum(expected), v)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert "kl_ref" not in result.metrics


def test_dpo_is_that_of_the_released_code():
    """Of SalesforceAIResearch/DiffusionDPO, train.py: -logsigmoid(-beta / 2 (model_diff - ref_diff))."""
    velocities, batch = fixed_batch()
    pairs = [0, 2, 1, 0]  # two pairs, the better first
    v, reference, target = (values[pairs] for values in (velocities.policy, velocities.reference, batch.target))
    picked = dataclasses.replace(batch, target=target)
    result = DiffusionDPO(beta=3.0, imitation=0.2).losses(Velocities(v, None, reference), picked, torch.zeros(2))
    expected = []
    for better, worse in ((0, 1), (2, 3)):
        gain = [((v[i] - target[i]) ** 2).mean() - ((reference[i] - target[i]) ** 2).mean() for i in (better, worse)]
        imitated = 0.2 * ((v[better] - target[better]) ** 2).mean()
        expected.append(-logsigmoid(-1.5 * (gain[0] - gain[1])) + imitated)
    torch.testing.assert_close(result.loss, torch.stack(expected), rtol=1e-12, atol=0)
    found, *_ = torch.autograd.grad(result.loss.sum(), velocities.policy, retain_graph=True)
    wanted, *_ = torch.autograd.grad(sum(expected), velocities.policy)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    same = DiffusionDPO().losses(Velocities(reference, None, reference), picked, torch.zeros(2))
    torch.testing.assert_close(same.loss, torch.full((2,), math.log(2.0)).double())  # at the reference


# ---- rows ----


def one_sample(seed=5):
    final = seeded_noise(seed, 3, (4, 2, 2))
    return Trajectory(final[None], torch.zeros(0), (), final, 1.0, seed)


def test_rows_are_mixed_with_noise_by_their_sigma_and_pairs_share_it():
    items = [Item((one_sample(5), one_sample(6)), "a"), Item((one_sample(7), one_sample(8)), "b")]
    levels = NoiseLevels([1.0, 0.75, 0.5, 0.25], [1000.0, 750.0, 500.0, 250.0])
    rows = noised_rows(items, 4, 3, epoch=0)
    assert [len({row.level for row in rows if row.item_index == index}) for index in (0, 1)] == [3, 3]
    batch = NoisedBatch.from_rows(rows, levels, CPU)
    assert batch.texts == ("a",) * 6 + ("b",) * 6
    assert batch.item_index.tolist() == [0] * 3 + [1] * 3
    for number, row in enumerate(rows):
        seed = prompt_seed(row.item.samples[0].seed, f"forward 0 {row.level}")
        noise, sigma = seeded_noise(seed, 0, (4, 2, 2)), levels.sigmas[row.level]
        for place, sample in enumerate(row.item.samples, start=2 * number):
            torch.testing.assert_close(batch.noisy[place], (1 - sigma) * sample.final + sigma * noise)
            torch.testing.assert_close(batch.target[place], noise - sample.final)
            assert batch.timesteps[place] == levels.timesteps[row.level]
    later = noised_rows(items, 4, 3, epoch=1)
    assert {row.draw for row in later}.isdisjoint(row.draw for row in rows)


def group(rewards, valid=None):
    samples = [one_sample(seed) for seed in range(len(rewards))]
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return TrajectoryGroup(TextPrompt(Row("q", "a cat", "")), samples, torch.tensor(rewards), valid=valid)


def test_the_best_and_the_worst_of_those_that_count_are_picked():
    assert ranked(group([0.5, 2.0, -1.0, 2.0], [True, True, False, True])) == [1, 3, 0]
    found = record_of(BestOfGroup(keep=3), group([0.5, 2.0, -1.0, 2.0]), group([1.0, 1.0, 1.0, 1.0]))
    assert [[sample.seed for sample in item.samples] for item in found.items] == [[1], [3]]
    assert found.weights.tolist() == [0.5, 0.5]
    found = record_of(DiffusionDPO(), group([0.5, 2.0, -1.0, 2.0]), group([1.0, 1.0, 1.0, 1.0]))
    assert [[sample.seed for sample in item.samples] for item in found.items] == [[1, 2]]
    assert found.weights.tolist() == [1.0]
    assert record_of(DiffusionDPO(), group([1.0, 1.0])).items == []


def record_of(objective, *groups):
    flat = one_token_each(flatten_groups(groups, CPU))
    (mini_batch,) = make_mini_batches(flat, 1, Algorithm(), SINGLE_RANK, None, None)
    return objective.items(mini_batch, Algorithm(), SINGLE_RANK)


# ---- gradients ----


@pytest.mark.parametrize(
    ("name", "objective"), [("sd3", "nft"), ("sd3", "dpo"), ("sd3", "best"), ("wan", "nft"), ("wan", "dpo")]
)
def test_any_split_into_micro_batches_gives_the_same_gradient(name, objective):
    found = []
    for size in (100, 1, 5):
        policy = module(name, objective, rows_per_micro_batch=size, epochs_per_rollout=2, lr=1e-5)
        found.append(fit(policy, ODE, steps=2))
    for step, tolerance in enumerate((1e-5, 2e-3)):  # the second after a step of Adam, which turns rounding into signs
        whole = found[0].gradients[step]
        largest = max(float(grad.abs().max()) for grad in whole.values())
        assert largest > 0
        for other in found[1:]:
            for key, grad in whole.items():
                torch.testing.assert_close(other.gradients[step][key], grad, rtol=0, atol=tolerance * largest)
    assert len({round(record.metrics[0]["train/loss"], 5) for record in found}) == 1


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_the_gradient_is_that_of_the_formula(objective):
    """From the stored samples and plain autograd, one row at a time."""
    settings = OBJECTIVES[objective]
    record = fit(module(objective=objective), ODE)
    (groups,) = record.groups
    rewards = torch.stack([one.rewards for one in groups])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    family = sd3_family()
    model = family.build()
    sigmas, timesteps = family.denoising_schedule(settings.num_times)

    def errors(sample, level, epoch_seed):
        """Velocity and target of a sample at a level."""
        noise = seeded_noise(prompt_seed(epoch_seed, f"forward 0 {level}"), 0, sample.final.shape)
        noisy = (1 - sigmas[level]) * sample.final + sigmas[level] * noise
        text = next(one.prompt.row.problem for one in groups if any(sample is other for other in one.completions))
        velocity = family.forward(model, noisy[None], torch.tensor([timesteps[level]]), [text], 1.0)[0]
        return velocity, noise - sample.final

    losses = []
    for index, one in enumerate(groups):
        order = rewards[index].argsort(descending=True).tolist()
        above = [place for place in order[:2] if rewards[index, place] > rewards[index].mean()]
        for place in {"nft": range(3), "dpo": order[:1], "best": above}[objective]:
            sample = one.completions[place]
            generator = torch.Generator().manual_seed(prompt_seed(sample.seed, "levels 0"))
            for level in torch.randperm(5, generator=generator)[:3].tolist():
                v, target = errors(sample, level, sample.seed)
                frozen = v.detach()  # old policy and reference, at the first step
                if objective == "nft":
                    r = (advantages[index, place] / 5).clamp(-1, 1) / 2 + 0.5
                    both = []
                    for mixed in (0.5 * frozen + 0.5 * v, 1.5 * frozen - 0.5 * v):
                        error = sigmas[level] * (mixed - target)
                        both.append((error**2).mean() / error.detach().abs().mean())
                    losses.append(5 / 0.5 * (r * both[0] + (1 - r) * both[1]) + 0.1 * ((v - frozen) ** 2).mean())
                elif objective == "dpo":
                    worse, other = errors(one.completions[order[-1]], level, sample.seed)
                    gain = ((v - target) ** 2).mean() - ((frozen - target) ** 2).mean()
                    loss = ((worse - other) ** 2).mean() - ((worse.detach() - other) ** 2).mean()
                    losses.append(-logsigmoid(-25.0 * (gain - loss)) + 0.1 * ((v - target) ** 2).mean())
                else:
                    losses.append(((v - target) ** 2).mean() + 0.1 * ((v - frozen) ** 2).mean())
    torch.stack(losses).mean().backward()
    assert record.metrics[0]["train/loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    largest = max(float(grad.abs().max()) for grad in record.gradients[0].values())
    for name, parameter in model.named_parameters():
        found = record.gradients[0].get(name)
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-5 * largest)


def losses_and_gradients(devices, sp, name, objective, options):
    """Loss and all gradients of two rollouts of two prompts on so many ranks."""
    family = FAMILIES[name](**options)
    policy = module(name, objective, family=family, lr=1e-3 if objective == "nft" else 1e-5, rows_per_micro_batch=4)
    data = PromptRows(num_batches=2)
    if devices > sp:  # each rank has a prompt
        rank = torch.distributed.get_rank()
        data.rows = data.rows[rank : rank + 1]
    strategy = MRSPStrategy(sequence_parallel_size=sp) if devices > 1 else "auto"
    record = fit(policy, ODE, steps=2, data=data, devices=devices, strategy=strategy)
    whole = []
    for step in record.gradients:
        whole.append({key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in step.items()})
    return [metrics["train/loss"] for metrics in record.metrics], whole


@pytest.mark.parametrize(
    ("name", "objective", "sp", "options"),
    [
        ("sd3", "nft", 1, {"lora": LoRASettings(rank=2)}),
        ("wan", "dpo", 2, {}),
    ],
)
def test_loss_and_every_gradient_on_two_ranks_are_those_of_one(name, objective, sp, options):
    options = {"folder": {"sd3": sd3_folder, "wan": wan_folder}[name](), **options}
    losses, gradients = losses_and_gradients(1, 1, name, objective, options)
    for found, grads in run_distributed(losses_and_gradients, 2, 2, sp, name, objective, options):
        assert found == pytest.approx(losses, rel=1e-4)
        for step, tolerance in enumerate((1e-5, 2e-3)):
            largest = max(float(grad.abs().max()) for grad in gradients[step].values())
            assert grads[step].keys() == gradients[step].keys()
            for key, grad in gradients[step].items():
                torch.testing.assert_close(grads[step][key], grad, rtol=0, atol=tolerance * largest)


# ---- the old policy ----


def test_the_old_policy_samples_and_follows_after_every_rollout():
    old = OldPolicySettings(decay_per_step=0.25, max_decay=0.6)
    assert [old.decay_at(step) for step in (0, 1, 2, 3)] == [0.0, 0.25, 0.5, 0.6]
    assert OldPolicySettings(75, 0.0075, 0.999).decay_at(100) == pytest.approx(25 * 0.0075)
    policy = module(objective=DiffusionNFT(**TIMES, old=old), lr=1e-2, mini_batches_per_rollout=2)
    policy.configure_model()
    start = {name: value.detach().clone() for name, value in policy.model.named_parameters()}
    record = fit(policy, ODE, steps=2)
    assert record.metrics[0]["train/nft_old_decay"] == 0.5  # two steps in the rollout
    weights = dict(policy.model.named_parameters())
    for name, kept in policy.old_weights.named_buffers():
        name = name.replace("/", ".")
        torch.testing.assert_close(kept, 0.5 * start[name] + 0.5 * weights[name].detach(), rtol=1e-5, atol=1e-6)
    assert record.metrics[0]["train/nft_old_distance"] > 0


def test_a_rollout_is_drawn_by_the_old_policy_and_the_weights_come_back():
    settings = {"objective": DiffusionNFT(**TIMES, old=OldPolicySettings(0, 1.0, 0.9)), "lr": 3e-2}
    once, twice = module(**settings), module(**settings)
    fit(once, ODE, steps=1)
    samples = fit(twice, ODE, steps=2, data=PromptRows(num_batches=2)).groups[1][0].completions
    model = once.family.build()
    weights = dict(once.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(weights[name], 0.1)  # 0.9 of the old policy stays
    found = sample_trajectories(
        RootModule(once.family, model.eval()), ["a red picture"] * 3, [sample.seed for sample in samples],
        ODE.steps(*once.family.denoising_schedule(4), 1, 0), shape=once.family.latent_shape(), device=CPU,
    )  # fmt: skip
    for one, other in zip(samples, found, strict=True):
        torch.testing.assert_close(one.final, other.final, rtol=1e-4, atol=1e-4)
    moved = max(float((weights[name] - value).abs().max()) for name, value in twice.model.named_parameters())
    assert moved > 1e-2  # the step after the rollout went on from the weights


# ---- refusals ----


@pytest.mark.parametrize(
    ("sampling", "algorithm", "said"),
    [
        ({"window": range}, {}, "rollout.sampling.window to null"),
        ({"num_generations": 1}, {}, "num_generations >= 2, got 1"),
        ({}, {"kl": gaussian_mean, "kl_coef": 0.1}, "model.algorithm.kl_coef=0.1 would have no effect"),
        ({}, {"surrogate": grpo_guard}, "model.algorithm.surrogate=grpo_guard would have no effect; set it to clipped"),
        ({}, {"greedy_baseline": True}, "model.algorithm.greedy_baseline"),
        ({}, {"advantage": optimal_token_baseline}, "optimal_token_baseline reads tokens or greedy completions"),
        ({}, {"entropy_coef": 0.1}, "model.algorithm.entropy_coef=0.1 would have no effect"),
        ({}, {"entropy_control": EntropyControl(0.2)}, "model.algorithm.entropy_control=EntropyControl"),
    ],
)
def test_what_has_no_meaning_beside_an_objective_is_refused_before_weights_are_loaded(sampling, algorithm, said):
    if sampling.get("window") is range:
        sampling = {"window": DiffusionSampling().window}
    policy = module(algorithm=Algorithm(**algorithm))
    with pytest.raises(ValueError, match=said):
        fit(policy, dataclasses.replace(ODE, **sampling))
    assert not policy.is_built


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DiffusionNFT(num_times=5, times_per_sample=6), "at most num_times, 5"),
        (lambda: DiffusionNFT(beta=0.0), "beta must be above 0"),
        (lambda: OldPolicySettings(max_decay=1.0), "max_decay must be below 1"),
    ],
)
def test_numbers_without_a_meaning_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
