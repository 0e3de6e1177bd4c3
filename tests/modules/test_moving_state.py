"""The entropy bonus, and what moves from rollout to rollout: coefficients, deviations of tasks, the reference.

Oracles are stock transformers models in float64, one forward per completion, and sums written out by hand.
"""

import copy

import pytest
import torch

from longrl.algorithms import Algorithm, EntropyControl, KLControl, MovingReference, TaskNormalized, k1
from longrl.models.lora import LoRASettings
from longrl.modules.optimizer import OptimizerSettings
from longrl.testing.plain_forward import plain_logits, qwen_media_inputs
from tests.modules.test_policy import (
    BUDGETS,
    WEIGHTS,
    answers_of,
    batch_of,
    disturb_text,
    gradients_by_hand,
    loss_by_hand,
    policy_of,
    sampled,
    text_prompts,
    train,
)
from tests.tiny import (
    assert_same_gradients,
    gradients,
    mixed_prompts,
    peft_model,
    plain_model,
    separate_logps,
    text_family,
    vl_family,
)


def separate_entropies(plain, prompts, completions):
    """[N] float64 entropies of the whole distribution of each token, one ordinary forward per completion."""
    entropies = []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            logp = plain_logits(plain, prompt, completion, qwen_media_inputs).double().log_softmax(-1)
            entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(entropies)


def bonus_by_hand(plain, groups, weights, coefficient):
    """Loss, gradients and weighted mean entropy of a step with a bonus."""
    plain.zero_grad()
    prompts = [group.prompt for group in groups]
    logp = separate_logps(plain, prompts, answers_of(groups))
    entropies = separate_entropies(plain, prompts, answers_of(groups))
    lengths = [completion.num_sampled for group in groups for completion in group.completions]
    scale = {"sequence_mean": None, "token_mean": 1 / sum(lengths), "constant": 1 / (len(lengths) * 12)}[weights]
    of_tokens = [[scale or 1 / (len(lengths) * length)] * length for length in lengths]
    mean = (entropies * torch.tensor([weight for one in of_tokens for weight in one], dtype=torch.float64)).sum()
    loss = loss_by_hand(logp, logp.detach(), groups, weights=weights) - coefficient * mean
    loss.backward()
    return loss.item(), gradients(plain), mean.item()


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bonus_is_the_gradient_of_the_whole_distribution_whatever_the_split(weights, budget):
    family = text_family()
    algorithm = Algorithm(token_weights=WEIGHTS[weights], entropy_coef=0.7)
    policy = policy_of(family, algorithm=algorithm, max_tokens_per_micro_batch=budget)
    policy.configure_model()
    groups = sampled(family, text_prompts(family))
    loss, expected, entropy = bonus_by_hand(plain_model(policy.model, family), groups, weights, 0.7)
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert seen.metrics[0]["train/entropy_coef"] == pytest.approx(0.7)
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    if weights != "constant":
        assert seen.metrics[0]["train/entropy"] == pytest.approx(entropy, rel=1e-5)
    without = train(policy_of(family, algorithm=Algorithm(token_weights=WEIGHTS[weights])), batch_of(policy, groups))
    assert "train/entropy_coef" not in without.metrics[0]
    with pytest.raises(AssertionError):
        assert_same_gradients(without.gradients[0], expected, 1e-5)


def test_the_entropy_coefficient_follows_its_target():
    """Far below the target it is raised, rollout after rollout; far above the bonus is off, and its gradient."""
    family = text_family()
    low = Algorithm(entropy_coef=0.01, entropy_control=EntropyControl(target=100.0, step=0.1))
    high = Algorithm(entropy_coef=0.2, entropy_control=EntropyControl(target=1e-3, step=0.1))
    found = {}
    for name, algorithm in {"below": low, "above": high, "none": Algorithm()}.items():
        policy = policy_of(family, algorithm=algorithm)
        batch = batch_of(policy, sampled(family, text_prompts(family)))
        found[name] = train(policy, batch, batch, batch)
    assert [seen["train/entropy_coef"] for seen in found["below"].metrics] == pytest.approx([0.01, 0.11, 0.21])
    assert [seen["train/entropy_coef"] for seen in found["above"].metrics] == pytest.approx([0.2, 0.0, 0.0])
    assert found["above"].metrics[2]["train/entropy"] > found["none"].metrics[2]["train/entropy"]


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_kl_coefficient_follows_the_distance(placement):
    """By its rule, of `train/kl_ref` and 9 completions, whatever the mini-batches; what it is moves the loss."""
    family = text_family()
    control = KLControl(target=1e-4, horizon=9)
    algorithm = Algorithm(kl=k1, kl_coef=0.3, kl_placement="reward", kl_control=control)
    if placement == "loss":
        algorithm = Algorithm(kl_coef=0.3, kl_control=control)
    policy = policy_of(family, algorithm=algorithm, mini_batches_per_rollout=2)
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    seen = train(policy, batch, batch, batch, before=disturb_text)
    coefficient = 0.3
    for metrics in seen.metrics:
        assert metrics["train/kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        coefficient = control.next(coefficient, metrics["train/kl_ref"], 9)
    assert policy.algorithm.kl_coef == pytest.approx(coefficient, rel=1e-5)
    assert coefficient != 0.3


def test_what_is_not_in_the_loss_moves_no_coefficient():
    """Of 3 updates on a group each one has all completions masked: means are those of the others, of 6 completions."""
    family = text_family()
    control = {"kl_control": KLControl(target=1e-4, horizon=20), "entropy_control": EntropyControl(target=1e-3)}
    algorithm = Algorithm(kl_coef=0.3, entropy_coef=0.1, **control)
    still = OptimizerSettings(lr=0.0)
    found = []
    for keep in ([True, False, True], [True, None, True], [False, False, False]):
        policy = policy_of(family, algorithm=algorithm, optimizer=still, mini_batches_per_rollout=3)
        groups = sampled(family, text_prompts(family))
        for group, kept in zip(groups, keep, strict=True):
            group.valid = torch.tensor([bool(kept)] * 3)
        groups = [group for group, kept in zip(groups, keep, strict=True) if kept is not None]
        seen = train(policy, batch_of(policy, groups), before=disturb_text)
        found.append((seen.metrics[0], policy.algorithm))
    (masked, after), (without, wanted), (_, unmoved) = found
    for name in ("train/entropy", "train/kl_ref", "train/ratio_mean"):
        assert masked[name] == pytest.approx(without[name], rel=1e-6)
    assert (after.kl_coef, after.entropy_coef) == pytest.approx((wanted.kl_coef, wanted.entropy_coef))
    assert after.kl_coef == pytest.approx(0.3 * (1 + 0.2 * 6 / 20))
    assert (unmoved.kl_coef, unmoved.entropy_coef) == (0.3, 0.1)


def test_the_distance_of_a_penalty_in_the_reward_is_the_mean_under_the_weights():
    """verl's: the mean over completions of the mean over their tokens, at the policy before the update."""
    family = text_family()
    algorithm = Algorithm(kl=k1, kl_coef=0.3, kl_placement="reward", kl_control=KLControl(target=0.01))
    policy = policy_of(family, algorithm=algorithm, max_tokens_per_micro_batch=57)
    policy.configure_model()
    groups = sampled(family, text_prompts(family))
    prompts = [group.prompt for group in groups]
    with torch.no_grad():
        before = separate_logps(plain_model(policy.model, family), prompts, answers_of(groups))
        kept = copy.deepcopy(policy.model.state_dict())
        disturb_text(policy)
        after = separate_logps(plain_model(policy.model, family), prompts, answers_of(groups))
        policy.model.load_state_dict(kept)
    lengths = [completion.num_sampled for group in groups for completion in group.completions]
    wanted = sum(float(part.mean()) for part in (after - before).split(lengths)) / len(lengths)
    seen = train(policy, batch_of(policy, groups), before=disturb_text)
    assert seen.metrics[0]["train/kl_ref"] == pytest.approx(wanted, rel=1e-4)


def test_advantages_scaled_by_task_reach_the_loss():
    """One task: the gradient is GRPO's of each group times its deviation over that of the task."""
    family = text_family()
    policy = policy_of(family, algorithm=Algorithm(advantage=TaskNormalized()))
    policy.configure_model()
    groups = sampled(family, text_prompts(family))
    rewards = torch.stack([group.rewards for group in groups]).double()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(correction=0)
    plain = plain_model(policy.model, family)
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    lengths = [completion.num_sampled for group in groups for completion in group.completions]
    parts = zip(logp.split(lengths), advantages.flatten(), strict=True)
    (-sum(part.mean() * advantage for part, advantage in parts) / len(lengths)).backward()
    seen = train(policy, batch_of(policy, groups))
    assert_same_gradients(seen.gradients[0], gradients(plain), 2e-5)
    (name,) = (name for name in seen.metrics[0] if name.startswith("train/task_std/"))
    assert seen.metrics[0][name] == pytest.approx(float(rewards.std(correction=0)), rel=1e-6)


# ---- the reference ----


@pytest.mark.parametrize("kind", ["text", "trained encoder", "lora"])
def test_the_reference_is_the_average_of_the_policies_and_the_policy_stays_itself(kind):
    """3 steps of half of the way each: the loss of the last is that against a stock model with the averages."""
    lora = LoRASettings(rank=3) if kind == "lora" else None
    family = vl_family(freeze_vision_encoder=False) if kind == "trained encoder" else text_family(lora=lora)
    rule = MovingReference(alpha=0.5, every_n_steps=1)
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.3, moving_reference=rule))
    policy.configure_model()
    prompts = mixed_prompts(family) if kind == "trained encoder" else text_prompts(family)
    groups = sampled(family, prompts)
    average = copy.deepcopy(policy.model)  # of all weights: what does not train is the same in both
    states = []

    class Watched:
        """Notes the weights before each step, and the reference that a step was compared with."""

        def __call__(self, module):
            step = module.optimizer_step_clipped

            def noted(*args):
                states.append(copy.deepcopy(module.model.state_dict()))
                return step(*args)

            module.optimizer_step_clipped = noted

    batch = batch_of(policy, groups)
    seen = train(policy, batch, batch, batch, before=Watched())
    for state in states[1:]:  # after the first and the second step
        for name, value in average.named_parameters():  # tied ones once
            value.data += 0.5 * (state[name] - value.data)
    stock = peft_model if kind == "lora" else plain_model
    with torch.no_grad():
        reference = separate_logps(stock(average, family), prompts, answers_of(groups))
    policy.model.load_state_dict(states[2])
    loss, expected = gradients_by_hand(stock(policy.model, family), groups, reference=reference, kl_coef=0.3)
    assert seen.metrics[0]["train/kl_ref"] == 0
    assert seen.metrics[2]["train/kl_ref"] > 0
    assert seen.metrics[2]["train/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert_same_gradients(seen.gradients[2], expected, 2e-5)


def test_a_hard_update_makes_the_reference_the_policy():
    family = text_family()
    rule = MovingReference(alpha=1.0, every_n_steps=2)
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.3, moving_reference=rule))
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    seen = train(policy, *[batch] * 5)
    assert [metrics["train/kl_ref"] == 0 for metrics in seen.metrics] == [True, False, True, False, True]
