"""One optimizer step and several: against plain transformers forwards and losses written out by hand."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from longrl.algorithms import (
    Algorithm,
    Constant,
    DualClipped,
    SoftGated,
    cispo,
    clipped,
    drop_uniform,
    geometric_clipped,
    greedy_centered,
    k1,
    reinforce,
    sequence_clipped,
    sequence_mean,
    token_mean,
)
from longrl.modules.mini_batches import flatten_groups, make_mini_batches
from longrl.modules.policy import OptimizerSettings, PolicyModule, all_media
from longrl.packing.pack import pack
from longrl.strategies.axis import SINGLE_RANK
from longrl.testing.plain_forward import qwen_media_inputs as media_of, whole_sequence
from longrl.testing.sample_turns import random_turns
from longrl.types import Batch, Completion, Continuation, Group, SamplingParams
from tests.tiny import (
    assert_same_gradients,
    gradients,
    mixed_prompts,
    plain_model,
    random_completions,
    row,
    separate_logps,
    text_family,
    vl_family,
)

LENGTHS = [[3, 7, 4], [5, 1, 6], [2, 9, 3]]
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.3, 0.0, 0.9]])
BUDGETS = {"pieces_of_groups": 57, "some": 100, "all": 10_000}
"""3 and 4, 2, and 1 micro-batches."""
WEIGHTS = {"sequence_mean": sequence_mean, "token_mean": token_mean, "constant": Constant(12)}
SURROGATES = {
    "clipped": clipped,
    "gspo": sequence_clipped,
    "cispo": cispo,
    "dual": DualClipped(),
    "reinforce": reinforce,
    "soft": SoftGated(),
    "gmpo": geometric_clipped,
}


# ---- a trainer without files ----


class Given(LightningDataModule):
    """Hands over batches as they are, so that a test decides what was sampled."""

    def __init__(self, batches, stage):
        super().__init__()
        self.batches, self.renderer, self.datasets = batches, SimpleNamespace(stage=stage), {}

    def limit_lengths(self, limits, splits):
        """The batches are what they are."""

    def train_dataloader(self):
        return self

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


class RenderedPrompt(Callback):
    """Gradients and learning rate of every optimizer step, and what was logged."""

    def __init__(self, before=lambda policy: None):
        self.gradients, self.rates, self.metrics, self.before = [], [], [], before

    def on_train_start(self, trainer, pl_module):
        self.before(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(gradients(pl_module.model))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(policy, *batches, before=lambda policy: None, callbacks=(), **options):
    seen = RenderedPrompt(before)
    stage = "rl"
    if batches[0].groups is None:
        stage = "preference" if any(prompt.rejected is not None for prompt in batches[0].prompts) else "sft"
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks, seen],
            **options,
        }
    )
    trainer.fit(policy, datamodule=Given(list(batches), stage))
    seen.steps = trainer.global_step
    return seen


def policy_of(family, **options):
    return PolicyModule(family, **{"optimizer": OptimizerSettings(lr=1e-3), "max_grad_norm": 0.0, **options})


def text_prompts(family, count=3):
    return [family.render(row(str(i)), "Which one? " * (1 + 2 * i)) for i in range(count)]


def with_targets(prompts, lengths=(5, 1, 9)):
    ids = random_completions(text_family(), [[length] for length in lengths])
    return [
        dataclasses.replace(prompt, response=Continuation(answer))
        for prompt, (answer,) in zip(prompts, ids, strict=True)
    ]


def sampled(family, prompts, sampler=None, rewards=REWARDS, valid=None, **options):
    """Groups of random completions. `sampler` [N] is what an engine would have said of their tokens."""
    answers = random_completions(family, LENGTHS[: len(prompts)])
    said = sampler if sampler is not None else torch.zeros(sum(map(sum, LENGTHS[: len(prompts)])))
    said = iter(said.float().split([length for group in LENGTHS[: len(prompts)] for length in group]))
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    return [
        Group(prompt, [Completion(ids, next(said), "", "stop") for ids in group], rewards[p], {}, valid[p], **options)
        for p, (prompt, group) in enumerate(zip(prompts, answers, strict=True))
    ]


def batch_of(policy, groups):
    """As the rollout callback hands it over."""
    policy.configure_model()
    prompts = [group.prompt for group in groups]
    media = all_media(prompts, answers_of(groups))
    return Batch(prompts, policy.features.get_or_encode(policy.model, media), groups)


def tokens_of(groups):
    return [[completion.token_ids for completion in group.completions] for group in groups]


def answers_of(groups):
    return [group.completions for group in groups]


def with_turns(family, groups, pixels_left_out=False):
    """The same groups with completions that are shown text and media between their turns."""
    shown = random_turns(family, [group.prompt for group in groups], pixels_left_out=pixels_left_out)
    return [
        dataclasses.replace(group, completions=[as_completion(one) for one in turns])
        for group, turns in zip(groups, shown, strict=True)
    ]


def as_completion(continuation):
    fields = {field.name: getattr(continuation, field.name) for field in dataclasses.fields(Continuation)}
    return Completion(**fields, logprobs=torch.zeros(continuation.num_sampled), text="", finish_reason="stop")


# ---- the loss by hand ----


def advantages_by_hand(rewards, valid):
    """[P][G] floats, GRPO's."""
    table = []
    for group, mask in zip(rewards.tolist(), valid.tolist(), strict=True):
        values = [reward for reward, counts in zip(group, mask, strict=True) if counts]
        mean = sum(values) / max(len(values), 1)
        std = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
        table.append(
            [(reward - mean) / (std + 1e-6) if counts else 0.0 for reward, counts in zip(group, mask, strict=True)]
        )
    return table


def loss_by_hand(
    logp, old, groups, weights="sequence_mean", surrogate="clipped", clip=(0.2, 0.2), reference=None, kl_coef=0.0
):
    """Float64 loss of [N] log-probabilities: completion by completion, token by token."""
    rewards, valid = torch.stack([g.rewards for g in groups]), torch.stack([g.valid for g in groups])
    advantages = [a for group in advantages_by_hand(rewards, valid) for a in group]
    lengths = [completion.num_sampled for group in groups for completion in group.completions]
    valid = valid.flatten().tolist()
    num_completions = sum(valid)
    num_tokens = sum(length for length, counts in zip(lengths, valid, strict=True) if counts)
    low, high = 1 - clip[0], 1 + clip[1]
    total, start = logp.new_zeros(()), 0
    for length, counts, a in zip(lengths, valid, advantages, strict=True):
        part = slice(start, start + length)
        start += length
        if not counts:
            continue
        ratio = (logp[part] - old[part]).exp()
        if surrogate == "gspo":
            ratio = (logp[part] - old[part]).mean().exp().expand(length)
        losses = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        if surrogate == "dual" and a < 0:
            losses = torch.minimum(losses, torch.full_like(losses, -3.0 * a))
        if surrogate == "soft":
            tau = 1.0 if a > 0 else 1.05
            losses = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
        if surrogate == "gmpo":
            bounded = ratio.log().clamp(max=clip[1]) if a > 0 else ratio.log().clamp(min=-clip[0])
            losses = -a * bounded.mean().exp().expand(length)
        if surrogate == "cispo":
            losses = -ratio.detach().clamp(low, high) * a * logp[part]
        if surrogate == "reinforce":
            losses = -ratio.detach().clamp(max=high) * a * logp[part]
        if reference is not None:
            difference = reference[part] - logp[part]
            losses = losses + kl_coef * (difference.exp() - 1 - difference)
        weight = {
            "sequence_mean": 1 / (num_completions * length),
            "token_mean": 1 / num_tokens,
            "constant": 1 / (num_completions * 12),
        }[weights]
        total = total + weight * losses.sum()
    return total


def gradients_by_hand(plain, groups, old=None, **options):
    """Loss and gradients of a stock model, one forward per completion."""
    plain.zero_grad()
    logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    loss = loss_by_hand(logp, logp.detach() if old is None else old.double(), groups, **options)
    loss.backward()
    return loss.item(), gradients(plain)


def off_policy(policy, groups, spread=0.5):
    """[N] sampler log-probabilities that put ratios on both sides of every clip."""
    plain = plain_model(policy.model, policy.family)
    with torch.no_grad():
        logp = separate_logps(plain, [group.prompt for group in groups], answers_of(groups))
    return (logp + spread * torch.randn(len(logp), generator=torch.Generator().manual_seed(3))).float()


def test_the_budgets_are_different_splits():
    for family, prompts in ((vl_family(), mixed_prompts(vl_family())), (text_family(), text_prompts(text_family()))):
        counts = [len(pack(prompts, random_completions(family, LENGTHS), budget)) for budget in BUDGETS.values()]
        assert counts[0] > counts[1] > counts[2] == 1


# ---- SFT ----


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
def test_sft_is_the_mean_over_all_response_tokens(budget, freeze):
    family = vl_family(freeze_vision_encoder=freeze)
    policy = policy_of(family, max_tokens_per_micro_batch=budget)
    policy.configure_model()
    prompts = with_targets(mixed_prompts(family))
    plain = plain_model(policy.model, family)
    logp = separate_logps(plain, prompts, [[prompt.response.token_ids] for prompt in prompts])
    wanted = -logp.sum() / 15
    wanted.backward()
    seen = train(policy, Batch(prompts))
    assert seen.steps == 1
    assert seen.metrics[0]["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert seen.metrics[0]["train/grad_norm"] > 0
    expected = {name: grad for name, grad in gradients(plain).items() if not (freeze and "visual" in name)}
    assert_same_gradients(seen.gradients[0], expected, 1e-5)
    assert any("visual" in name for name in seen.gradients[0]) != freeze


@pytest.mark.parametrize("budget", [200, 10_000], ids=["some", "all"])
def test_sft_teaches_what_an_answer_says_and_not_what_it_was_shown(budget):
    """As labels of -100 do in plain cross-entropy; with an encoder that trains."""
    family = vl_family()
    policy = policy_of(family, max_tokens_per_micro_batch=budget)
    policy.configure_model()
    prompts = mixed_prompts(family)
    targets = [group[1] for group in random_turns(family, prompts)]
    prompts = [dataclasses.replace(prompt, response=one) for prompt, one in zip(prompts, targets, strict=True)]
    plain = plain_model(policy.model, family)
    logits, labels = [], []
    for prompt, target in zip(prompts, targets, strict=True):
        whole = whole_sequence(prompt, target)
        output = plain(input_ids=whole.input_ids[None], position_ids=whole.position_ids[:, None], **media_of(whole))
        logits.append(output.logits[0, :-1])
        label = whole.input_ids.clone()
        label[: len(prompt.input_ids)] = -100
        if target.sampled is not None:
            label[len(prompt.input_ids) :][~target.sampled] = -100
        labels.append(label[1:])
    wanted = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
    wanted.backward()
    seen = train(policy, Batch(prompts))
    assert seen.metrics[0]["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert_same_gradients(seen.gradients[0], gradients(plain), 1e-5)


def test_sft_trains_and_logs_entropy():
    policy = policy_of(text_family(), optimizer=OptimizerSettings(lr=1e-2))
    batch = Batch(with_targets(text_prompts(policy.family)))
    seen = train(policy, *[batch] * 8)
    losses = [metrics["train/loss"] for metrics in seen.metrics]
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < seen.metrics[-1]["train/entropy"] < seen.metrics[0]["train/entropy"]


# ---- one RL step ----


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trainable"])
def test_an_rl_step_on_videos_is_the_loss_by_hand(budget, freeze):
    family = vl_family(freeze_vision_encoder=freeze)
    policy = policy_of(family, max_tokens_per_micro_batch=budget)
    policy.configure_model()
    groups = sampled(family, mixed_prompts(family))
    loss, expected = gradients_by_hand(plain_model(policy.model, family), groups)
    seen = train(policy, batch_of(policy, groups))
    assert seen.steps == 1
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, abs=1e-6)
    expected = {name: grad for name, grad in expected.items() if not (freeze and "visual" in name)}
    assert_same_gradients(seen.gradients[0], expected, 1e-5)


@pytest.mark.parametrize(
    ("surrogate", "weights"),
    [*itertools.product(list(SURROGATES)[:5], WEIGHTS), ("soft", "sequence_mean"), ("gmpo", "sequence_mean")],
)
def test_any_split_into_micro_batches_gives_the_gradient_by_hand(weights, surrogate):
    """Off-policy, so that every clip is at work, and with one completion masked out."""
    family = text_family()
    policy = policy_of(family)
    policy.configure_model()
    valid = torch.ones_like(REWARDS, dtype=torch.bool)
    valid[1, 2] = False
    old = off_policy(policy, sampled(family, text_prompts(family)))
    groups = sampled(family, text_prompts(family), old, valid=valid, carried_over=True)
    if surrogate == "gspo" and weights != "sequence_mean":
        expected = None  # there each token keeps its own gradient: no such loss exists
    else:
        plain = plain_model(policy.model, family)
        loss, expected = gradients_by_hand(plain, groups, old, weights=weights, surrogate=surrogate)
    found = []
    for budget in BUDGETS.values():
        algorithm = Algorithm(surrogate=SURROGATES[surrogate], token_weights=WEIGHTS[weights])
        policy = policy_of(family, algorithm=algorithm, max_tokens_per_micro_batch=budget)
        seen = train(policy, batch_of(policy, groups))
        found.append((seen.metrics[0]["train/loss"], seen.gradients[0]))
    for value, grads in found:
        assert value == pytest.approx(found[-1][0], rel=1e-5, abs=1e-7)
        assert_same_gradients(grads, found[-1][1], 1e-5)
        if expected is not None:
            assert_same_gradients(grads, expected, 2e-5)
    if expected is not None and surrogate not in ("reinforce", "cispo"):
        assert found[-1][0] == pytest.approx(loss, rel=1e-5)
    clipped_sides = sum(seen.metrics[0][f"train/clip_fraction_{side}"] > 0 for side in ("low", "high"))
    assert clipped_sides >= {"reinforce": 1, "gspo": 1, "soft": 0}.get(surrogate, 2)


def test_the_first_update_needs_no_old_log_probabilities(monkeypatch):
    policy = policy_of(text_family())
    batch = batch_of(policy, sampled(policy.family, text_prompts(policy.family)))
    monkeypatch.setattr(policy, "score", lambda *args: pytest.fail("a forward pass more than needed"))
    seen = train(policy, batch)
    assert seen.metrics[0]["train/ratio_mean"] == pytest.approx(1.0)


def test_carried_over_groups_have_the_samplers_log_probabilities_and_others_the_policys():
    family = text_family()
    policy = policy_of(family)
    policy.configure_model()
    prompts = text_prompts(family)
    plain = plain_model(policy.model, family)
    sampler = off_policy(policy, sampled(family, prompts))
    groups = sampled(family, prompts, sampler)
    groups[1].carried_over = True
    with torch.no_grad():
        old = separate_logps(plain, prompts, tokens_of(groups))
    second = slice(sum(LENGTHS[0]), sum(LENGTHS[0]) + sum(LENGTHS[1]))
    old[second] = sampler[second].double()
    loss, expected = gradients_by_hand(plain, groups, old)
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert_same_gradients(seen.gradients[0], expected, 2e-5)


def test_masked_completions_do_not_count_at_all():
    """The gradient is that of the group without them."""
    family = text_family()
    valid = torch.tensor([[True, False, True]] * 3)
    policy = policy_of(family)
    masked = train(policy, batch_of(policy, sampled(family, text_prompts(family), valid=valid)))
    policy = policy_of(family)
    groups = sampled(family, text_prompts(family))
    for group in groups:
        group.completions = group.completions[::2]
        group.rewards, group.valid = group.rewards[::2], group.valid[::2]
    without = train(policy, batch_of(policy, groups))
    assert_same_gradients(masked.gradients[0], without.gradients[0], 1e-6)


def test_completions_out_of_the_loss_alone_still_count_in_their_group():
    """Advantages are those of all, weights and loss those of the others."""
    family = text_family()
    policy = policy_of(family)
    groups = sampled(family, text_prompts(family))
    in_loss = torch.tensor([True, False, True])
    for group in groups:
        group.in_loss = in_loss
    flat = flatten_groups(groups, torch.device("cpu"))
    (part,) = make_mini_batches(flat, 1, Algorithm(), SINGLE_RANK, None, None)
    (every,) = make_mini_batches(dataclasses.replace(flat, in_loss=flat.valid), 1, Algorithm(), SINGLE_RANK, None, None)
    assert torch.equal(part.advantages, every.advantages)
    lengths = flat.lengths
    assert torch.equal(part.weights, torch.where(in_loss.repeat(3), 1 / (6 * lengths), 0.0))
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/nonfinite_completions"] == 0


@pytest.mark.parametrize("bad", ["old_logp", "ref_logp", "advantage"])
def test_a_completion_with_a_number_that_is_not_finite_is_as_if_it_were_masked(bad):
    """The second of nine completions: nothing of it reaches the mean, the weights or the loss of others."""
    groups = sampled(text_family(), text_prompts(text_family()))
    flat = flatten_groups(groups, torch.device("cpu"))
    size = int(flat.lengths.sum())
    scores = {"old_logp": torch.full((size,), -1.0), "ref_logp": torch.full((size,), -1.5)}
    broken = dict(scores)
    algorithm = Algorithm(kl_coef=0.1)
    if bad == "advantage":
        algorithm = Algorithm(kl_coef=0.1, advantage=nan_for_rewards_below_a_tenth)
    else:
        broken[bad] = scores[bad].clone()
        broken[bad][4] = math.nan if bad == "old_logp" else -math.inf
    (found,) = make_mini_batches(flat, 1, algorithm, SINGLE_RANK, **broken)
    assert found.nonfinite.sum() == (3 if bad == "advantage" else 1)
    valid = flat.rewards > 0.1 if bad == "advantage" else flat.valid.clone()
    if bad != "advantage":
        valid[0, 1] = False
    masked = dataclasses.replace(flat, valid=valid, in_loss=valid)
    (wanted,) = make_mini_batches(masked, 1, algorithm, SINGLE_RANK, **scores)
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.advantages, wanted.advantages)
    for values in (found.advantages, found.old_logp, found.ref_logp):
        assert values.isfinite().all()


def nan_for_rewards_below_a_tenth(outcomes):
    """An advantage of a user's, undefined for some completions."""
    return outcomes.returns.where(outcomes.rewards > 0.1, math.nan).where(outcomes.valid, 0.0)


def test_nothing_valid_is_a_step_without_gradient():
    policy = policy_of(text_family())
    groups = sampled(policy.family, text_prompts(policy.family), valid=torch.zeros(3, 3, dtype=torch.bool))
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/loss"] == 0
    assert all((grad == 0).all() for grad in seen.gradients[0].values())


def test_no_groups_no_step():
    policy = policy_of(text_family())
    batch = batch_of(policy, [])
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    seen = train(policy, batch)
    assert seen.steps == 0
    assert not any(name.startswith("train/") for name in seen.metrics[0])
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_temperature_is_that_of_the_samples():
    family = text_family()
    policy = policy_of(family)
    policy.temperature = 0.5
    policy.configure_model()
    groups = sampled(family, text_prompts(family))
    plain = plain_model(policy.model, family)
    plain.lm_head.register_forward_hook(lambda module, args, logits: logits / 0.5)
    _, expected = gradients_by_hand(plain, groups)
    assert_same_gradients(train(policy, batch_of(policy, groups)).gradients[0], expected, 1e-5)


# ---- several optimizer steps per rollout ----


def test_mini_batches_and_epochs_are_an_ordinary_loop():
    """Old log-probabilities are taken once, advantages in their group, weights in each mini-batch."""
    family = text_family()
    policy = policy_of(family, mini_batches_per_rollout=2, epochs_per_rollout=2, max_tokens_per_micro_batch=100)
    policy.configure_model()
    prompts = text_prompts(family)
    groups = sampled(family, prompts)
    plain = plain_model(policy.model, family)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        old = separate_logps(plain, prompts, tokens_of(groups))
    parts = [(groups[:1], old[: sum(LENGTHS[0])]), (groups[1:], old[sum(LENGTHS[0]) :])]
    losses, expected = [], []
    for _, (part, before) in itertools.product(range(2), parts):
        loss, grads = gradients_by_hand(plain, part, before)
        losses.append(loss)
        expected.append(grads)
        optimizer.step()
    seen = train(policy, batch_of(policy, groups))
    assert seen.steps == 4
    assert seen.metrics[0]["train/loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)
    for found, wanted in zip(seen.gradients, expected, strict=True):
        assert_same_gradients(found, wanted, 2e-3)  # Adam's first steps enlarge rounding noise
    moved = torch.cat([(policy.model.state_dict()[name] - value).flatten() for name, value in start.items()])
    wanted = torch.cat([(plain.state_dict()[name] - value).flatten() for name, value in start.items()])
    assert (moved - wanted).norm() <= 0.02 * wanted.norm()


def test_more_mini_batches_than_groups_are_one_per_group():
    policy = policy_of(text_family(), mini_batches_per_rollout=8)
    seen = train(policy, batch_of(policy, sampled(policy.family, text_prompts(policy.family))))
    assert seen.steps == 3


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "linear", "warmup_steps": 2}, [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "linear", "total_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_count_optimizer_steps(settings, rates):
    """Two rollouts of four steps each are the whole run."""
    settings = OptimizerSettings(lr=1.0e-3, **settings)
    policy = policy_of(text_family(), optimizer=settings, mini_batches_per_rollout=2, epochs_per_rollout=2)
    batch = batch_of(policy, sampled(policy.family, text_prompts(policy.family)))
    seen = train(policy, batch, batch)
    assert [rate / 1e-3 for rate in seen.rates] == pytest.approx(rates)


def test_max_steps_ends_the_schedule():
    policy = policy_of(text_family(), optimizer=OptimizerSettings(lr=1.0, schedule="linear"))
    batch = Batch(with_targets(text_prompts(policy.family)))
    seen = train(policy, *[batch] * 9, max_epochs=None, max_steps=4)
    assert seen.rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_gradients_are_clipped_to_the_norm_of_all_together():
    batch = Batch(with_targets(text_prompts(text_family())))
    free = train(policy_of(text_family()), batch)
    held = train(policy_of(text_family(), max_grad_norm=0.01), batch)
    norm = torch.cat([grad.flatten() for grad in free.gradients[0].values()]).norm().item()
    assert free.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert held.metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    assert norm > 0.1
    scaled = {name: grad * 0.01 / norm for name, grad in free.gradients[0].items()}
    assert_same_gradients(held.gradients[0], scaled, 1e-4)


# ---- the reference policy ----


def disturb(policy):
    """The policy leaves its reference behind."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def test_kl_in_the_loss_is_the_distance_to_the_initial_weights():
    family = vl_family(freeze_vision_encoder=True)
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.3), max_tokens_per_micro_batch=100)
    groups = sampled(family, mixed_prompts(family))
    batch = batch_of(policy, groups)
    initial, moved = plain_model(policy.model, family), policy_of(family)
    moved.configure_model()
    features = batch.features
    disturb_text(moved)
    plain = plain_model(moved.model, family)
    with torch.no_grad():
        reference = separate_logps(initial, [group.prompt for group in groups], tokens_of(groups))
    loss, expected = gradients_by_hand(plain, groups, reference=reference, kl_coef=0.3)
    batch.features = features
    seen = train(policy, batch, before=disturb_text)
    assert seen.metrics[0]["train/kl_ref"] > 0.01
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-4)
    expected = {name: grad for name, grad in expected.items() if "visual" not in name}
    assert_same_gradients(seen.gradients[0], expected, 2e-5)


def disturb_text(policy):
    """The same as `disturb`, leaving the vision encoder alone, and what is frozen beside adapters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "visual" not in name and "audio_tower" not in name and parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def test_the_reference_is_no_part_of_the_module_and_never_changes():
    family = text_family()
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.1), optimizer=OptimizerSettings(lr=1e-2))
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    initial = {name: value.clone() for name, value in policy.model.state_dict().items()}
    seen = train(policy, batch, batch)
    reference = policy.reference.model
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(torch.equal(value, initial[name]) for name, value in reference.state_dict().items())
    names = {name.removeprefix("model.") for name in policy.state_dict()}
    assert names == set(initial)
    assert len(list(policy.parameters())) == len(list(policy.model.parameters()))
    assert seen.metrics[0]["train/kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert seen.metrics[1]["train/kl_ref"] > 1e-4


def test_without_kl_there_is_no_reference():
    policy = policy_of(text_family())
    train(policy, batch_of(policy, sampled(policy.family, text_prompts(policy.family))))
    assert policy.reference is None


def test_a_reference_of_a_trainable_tower_has_its_own_features():
    """Its features are those of the encoder it started with, however far the policy's encoder has gone."""
    family = vl_family(freeze_vision_encoder=False)
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.3))
    groups = sampled(family, mixed_prompts(family))
    policy.configure_model()
    initial = plain_model(policy.model, family)
    moved = policy_of(family)
    moved.configure_model()
    disturb(moved)
    plain = plain_model(moved.model, family)
    with torch.no_grad():
        reference = separate_logps(initial, [group.prompt for group in groups], tokens_of(groups))
    loss, expected = gradients_by_hand(plain, groups, reference=reference, kl_coef=0.3)
    seen = train(policy, Batch([], {}, groups), before=disturb)
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert_same_gradients(seen.gradients[0], expected, 5e-5)


def test_kl_in_the_reward_comes_off_every_tokens_return():
    """k1 at the old policy; with raw returns the advantage of a completion is its reward minus the whole penalty."""
    from longrl.algorithms import raw

    family = text_family()
    algorithm = Algorithm(advantage=raw, surrogate=reinforce, kl=k1, kl_coef=0.5, kl_placement="reward")
    policy = policy_of(family, algorithm=algorithm)
    prompts = text_prompts(family)
    groups = sampled(family, prompts)
    batch = batch_of(policy, groups)
    initial = plain_model(policy.model, family)
    moved = policy_of(family)
    moved.configure_model()
    disturb(moved)
    plain = plain_model(moved.model, family)
    with torch.no_grad():
        reference = separate_logps(initial, prompts, tokens_of(groups))
    logp = separate_logps(plain, prompts, tokens_of(groups))
    lengths = [length for group in LENGTHS for length in group]
    penalties = [part.sum().item() for part in (0.5 * (logp.detach() - reference)).split(lengths)]
    loss = -sum(
        (reward - penalty) * part.mean() / len(lengths)
        for reward, penalty, part in zip(REWARDS.flatten().tolist(), penalties, logp.split(lengths), strict=True)
    )
    loss.backward()
    seen = train(policy, batch, before=disturb)
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradients(seen.gradients[0], gradients(plain), 2e-5)
    assert max(map(abs, penalties)) > 0.05


# ---- settings that contradict each other ----


@pytest.mark.parametrize("name", ["max_tokens_per_micro_batch", "mini_batches_per_rollout", "epochs_per_rollout"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"model.{name}.* must be at least 1, got .*0"):
        PolicyModule(text_family(), **{name: 0})


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Algorithm(), "group_normalized compares the completions"),
        (
            Algorithm(advantage=greedy_centered, select=drop_uniform, greedy_baseline=True),
            "drop_uniform compares the completions",
        ),
        (Algorithm(advantage=greedy_centered), "greedy_baseline to true"),
    ],
)
def test_an_algorithm_that_cannot_learn_from_one_completion_says_so(algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.validate(SamplingParams(1), 1)


def test_a_completion_too_long_for_constant_weights_says_so():
    policy = policy_of(text_family(), algorithm=Algorithm(token_weights=Constant(4)))
    batch = batch_of(policy, sampled(policy.family, text_prompts(policy.family)))
    with pytest.raises(ValueError, match="a completion has 9 tokens, above the 4 that Constant divides by"):
        train(policy, batch)


def test_prompts_that_nobody_answered_say_what_is_missing():
    policy = policy_of(text_family())
    with pytest.raises(ValueError, match="RolloutCallback"):
        train(policy, Batch(text_prompts(policy.family)))


def test_a_negative_gradient_limit_is_refused():
    with pytest.raises(ValueError, match=r"model\.max_grad_norm must be at least 0, got -1"):
        policy_of(text_family(), max_grad_norm=-1)


REFUSED = ("16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine")


@pytest.mark.parametrize("precision", REFUSED)
def test_a_precision_that_changes_losses_or_batches_is_refused(precision):
    policy = policy_of(text_family())
    policy._trainer = SimpleNamespace(precision=precision, world_size=1, strategy=object())
    with pytest.raises(ValueError, match=f"precision must be 32-true or bf16-mixed, got {precision}; set it to bf16-"):
        policy.setup("fit")


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_a_run_in_another_precision_ends_before_it_loads_weights(precision):
    policy = policy_of(text_family())
    policy.build_model = None  # a call would fail
    plugins = [MixedPrecision(precision, "cpu")] if "mixed" in precision else [HalfPrecision(precision)]
    with pytest.raises(ValueError, match=r"trainer\.precision must be 32-true or bf16-mixed"):
        train(policy, Batch(with_targets(text_prompts(policy.family))), plugins=plugins)


def test_several_devices_need_the_strategy():
    policy = policy_of(text_family())
    policy._trainer = SimpleNamespace(precision="32-true", world_size=2, strategy=object())
    with pytest.raises(ValueError, match=r"2 devices need a strategy .* set trainer\.strategy to longrl\.strategies"):
        policy.setup("fit")


def test_a_schedule_of_an_endless_run_needs_its_end():
    policy = policy_of(text_family(), optimizer=OptimizerSettings(schedule="cosine"))
    with pytest.raises(ValueError, match=r"set model\.optimizer\.total_steps or trainer\.max_steps"):
        train(policy, Batch(with_targets(text_prompts(policy.family))), max_steps=-1, max_epochs=-1)
