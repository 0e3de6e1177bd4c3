"""One optimizer step on pairs: against plain forwards of every answer by itself, and losses written out by hand."""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import Preference, SimPO, SmoothedDPO, ipo
from longrl.commands.first_nonfinite import NonfiniteWatch
from longrl.commands.replay import take_step
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.modules.preference_loss import PreferenceLoss
from longrl.modules.preference_step import answers_of
from longrl.modules.skipped_steps import recorded_continuations, replay_batch, text_record
from longrl.packing.pack import pack
from longrl.types import Batch, Continuation
from tests.modules.test_policy import disturb_text, policy_of, text_prompts, train
from tests.tiny import (
    assert_same_gradients,
    gradients,
    mixed_prompts,
    plain_model,
    random_completions,
    separate_logps,
    text_family,
    vl_family,
)

LENGTHS = [[3, 7], [5, 1], [2, 9]]
BUDGETS = {"one pair": 59, "some": 100, "all": 10_000}
OBJECTIVES = {
    "dpo": Preference(beta=0.5),
    "smoothed": Preference(loss=SmoothedDPO(0.2), beta=0.5),
    "ipo": Preference(loss=ipo, beta=0.5),
    "simpo": Preference(loss=SimPO(0.5), beta=2.0),
    "mpo": Preference(beta=0.5, preference_weight=0.8, quality_weight=0.2, generation_weight=1.0),
}


def with_pairs(family, prompts):
    answers = random_completions(family, LENGTHS[: len(prompts)])
    return [
        dataclasses.replace(prompt, response=Continuation(chosen), rejected=Continuation(rejected))
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]


def log_sigmoid(value):
    return torch.nn.functional.logsigmoid(value)


def loss_by_hand(name, logp, reference, prompts, shift=0.0):
    """Mean over pairs of the loss, and their rewards, from [N] log-probabilities in float64: pair by pair."""
    losses, rewards, start = [], [], 0
    for prompt in prompts:
        sums, ratios, lengths = [], [], []
        for answer in (prompt.response, prompt.rejected):
            part = slice(start, start + answer.num_sampled)
            start += answer.num_sampled
            sums.append(logp[part].sum())
            ratios.append(logp[part].sum() - reference[part].sum())
            lengths.append(answer.num_sampled)
        margin = 0.5 * (ratios[0] - ratios[1])
        if name == "dpo":
            loss = -log_sigmoid(margin)
        elif name == "smoothed":
            loss = -0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin)
        elif name == "ipo":
            loss = (ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1) ** 2
        elif name == "simpo":
            loss = -log_sigmoid(2 * (sums[0] / lengths[0] - sums[1] / lengths[1]) - 0.5)
        else:
            quality = -log_sigmoid(0.5 * ratios[0] - shift) - log_sigmoid(shift - 0.5 * ratios[1])
            loss = -0.8 * log_sigmoid(margin) + 0.2 * quality - sums[0] / lengths[0]
        losses.append(loss)
        own = [0.5 * ratio for ratio in ratios]
        if name == "simpo":
            own = [2 * total / length for total, length in zip(sums, lengths, strict=True)]
        rewards.append([reward.item() for reward in own])
    return sum(losses) / len(losses), torch.tensor(rewards, dtype=torch.float64)


def answered(prompts):
    return [answers_of(prompt) for prompt in prompts]


def by_hand(name, family, prompts, shift=0.0):
    """Loss, gradients and rewards of a stock model, one forward per answer; the reference is it undisturbed."""
    policy = policy_of(family)
    policy.configure_model()
    with torch.no_grad():
        reference = separate_logps(plain_model(policy.model, family), prompts, answered(prompts))
    disturb_text(policy)
    plain = plain_model(policy.model, family)
    loss, rewards = loss_by_hand(name, separate_logps(plain, prompts, answered(prompts)), reference, prompts, shift)
    loss.backward()
    return loss.item(), gradients(plain), rewards


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_is_the_mean_over_pairs_of_separate_forwards(name, budget):
    family = text_family()
    prompts = with_pairs(family, text_prompts(family))
    loss, expected, rewards = by_hand(name, family, prompts, shift=0.3)
    policy = policy_of(family, preference=OBJECTIVES[name], max_tokens_per_micro_batch=budget)
    policy.reward_shift.add(0.3, 4)
    seen = train(policy, Batch(prompts), before=disturb_text)
    metrics = seen.metrics[0]
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    margins = rewards[:, 0] - rewards[:, 1]
    assert metrics["train/reward_margin"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-6)
    assert metrics["train/preference_accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert (policy.reference is None) == (name == "simpo")
    assert policy.num_scoring_passes == (name != "simpo")
    if name == "mpo":
        assert metrics["train/reward_shift"] == pytest.approx(0.3)
        assert policy.reward_shift.count == 10
        assert policy.reward_shift.total == pytest.approx(1.2 + rewards.sum().item(), rel=1e-5)
    else:
        assert "train/reward_shift" not in metrics


@pytest.mark.parametrize("budget", [110, 10_000], ids=["some", "all"])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
def test_pairs_with_media(freeze, budget):
    """A medium is encoded once for both answers, the prompt computed once; an encoder that trains gets its gradient."""
    family = vl_family(freeze_vision_encoder=freeze)
    prompts = with_pairs(family, mixed_prompts(family))
    loss, expected, _ = by_hand("mpo", family, prompts)
    policy = policy_of(family, preference=OBJECTIVES["mpo"], max_tokens_per_micro_batch=budget)
    seen = train(policy, Batch(prompts), before=disturb_text)
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    expected = {name: grad for name, grad in expected.items() if not (freeze and "visual" in name)}
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    if freeze:
        assert policy.features.num_encoded == 4
    (packed,) = pack(prompts, answered(prompts), 10_000)
    assert len(packed.input_ids) == sum(len(prompt.input_ids) for prompt in prompts) + sum(map(sum, LENGTHS))


def test_the_first_step_prefers_nothing_and_later_ones_what_is_chosen():
    policy = policy_of(text_family(), optimizer=OptimizerSettings(lr=1e-2), preference=Preference(beta=1.0))
    batch = Batch(with_pairs(policy.family, text_prompts(policy.family)))
    seen = train(policy, *[batch] * 6)
    assert seen.metrics[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert seen.metrics[0]["train/reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert seen.metrics[-1]["train/preference_accuracy"] == 1.0
    assert seen.metrics[-1]["train/loss"] < 0.2
    assert seen.metrics[0]["train/logp_chosen"] < seen.metrics[-1]["train/logp_chosen"]


def test_half_a_pair_in_a_micro_batch_is_refused():
    """Rows that are too long for their pair are skipped by the data module; whoever gives other batches is told."""
    policy = policy_of(text_family(), max_tokens_per_micro_batch=57)
    prompts = with_pairs(policy.family, text_prompts(policy.family))
    sizes = [len(prompt.input_ids) + sum(lengths) for prompt, lengths in zip(prompts, LENGTHS, strict=True)]
    assert max(sizes) > 57
    with pytest.raises(ValueError, match="both answers of a pair must lie in one micro-batch.*max_tokens_per_micro"):
        train(policy, Batch(prompts))


def test_prompts_without_both_answers_are_refused():
    policy = policy_of(text_family())
    prompts = with_pairs(policy.family, text_prompts(policy.family))
    prompts[1] = dataclasses.replace(prompts[1], response=None)
    with pytest.raises(ValueError, match="row '1' is no pair, which data.stage=preference needs"):
        train(policy, Batch(prompts))


def test_an_objective_without_pairs_is_told_of(caplog):
    policy = policy_of(text_family(), preference=Preference())
    prompts = with_pairs(policy.family, text_prompts(policy.family))
    train(policy, Batch([dataclasses.replace(prompt, rejected=None) for prompt in prompts]))
    assert "model.preference has no effect without data.stage=preference" in caplog.text


def test_a_record_of_a_step_on_pairs_gives_the_pairs_again():
    family = text_family()
    prompts = with_pairs(family, text_prompts(family))
    plain = {prompt.id: dataclasses.replace(prompt, response=None, rejected=None) for prompt in prompts}
    record = text_record(prompts, answered(prompts), SimpleLoss())
    assert len(recorded_continuations(record)) == 6
    again = replay_batch(record, lambda row: plain[row.id])
    for one, other in zip(again.prompts, prompts, strict=True):
        assert torch.equal(one.response.token_ids, other.response.token_ids)
        assert torch.equal(one.rejected.token_ids, other.rejected.token_ids)


class SimpleLoss:
    def tensors(self):
        return {}


def test_a_step_on_pairs_that_was_left_out_is_replayed_with_the_loss_that_it_had():
    family = text_family()
    prompts = with_pairs(family, text_prompts(family))
    policy = policy_of(family, preference=OBJECTIVES["mpo"])
    policy.configure_model()
    with torch.no_grad():
        ref_logp = separate_logps(plain_model(policy.model, family), prompts, answered(prompts)).float()
    disturb_text(policy)
    pairs = answered(prompts)
    loss = PreferenceLoss.of_pairs(OBJECTIVES["mpo"], pairs, ref_logp, 3, 0.3, policy.device)
    record = text_record(prompts, pairs, loss)
    total = take_step(policy, record, prompts, NonfiniteWatch())
    wanted, expected, _ = by_hand("mpo", family, prompts, shift=0.3)
    assert total == pytest.approx(wanted, rel=1e-5)
    assert_same_gradients(gradients(policy.model), expected, 1e-5)


def test_the_shift_is_in_checkpoints_and_not_of_other_runs():
    policy = PolicyModule(text_family(), preference=OBJECTIVES["mpo"])
    checkpoint = {}
    policy.on_save_checkpoint(checkpoint)
    assert "reward_shift" not in checkpoint
    policy.reward_shift.add(0.5, 3)
    policy.on_save_checkpoint(checkpoint)
    assert checkpoint["reward_shift"] == {"total": 1.5, "count": 3.0}
