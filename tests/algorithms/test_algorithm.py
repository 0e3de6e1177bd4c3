"""The Algorithm record: weighted sums, gradients, micro-batches, checks against a run."""

import contextlib
import inspect
import logging
import math
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from longrl.algorithms import (
    Algorithm,
    Constant,
    CorrectionProduct,
    DualClipped,
    GeometricMask,
    InOrder,
    OffPolicySequenceMask,
    SequenceDualClipped,
    SoftGated,
    StaleClipped,
    TokenLosses,
    TwoSidedMask,
    batch_normalized,
    cispo,
    clipped,
    drop_uniform,
    geometric_clipped,
    greedy_centered,
    group_centered,
    group_centered_batch_normalized,
    group_normalized,
    k1,
    k2,
    k3,
    k3_unbiased,
    keep_all,
    leave_one_out,
    mask_truncated,
    masked_sequence,
    needs,
    no_correction,
    raw,
    reinforce,
    sequence_clipped,
    sequence_mean,
    single_rank,
    token_mean,
    truncated_sequence,
    truncated_token,
)
from longrl.types import SamplingParams

SURROGATES = [
    clipped, DualClipped(1.5), sequence_clipped, cispo, reinforce,
    SoftGated(), StaleClipped(0.1, 0.9), SequenceDualClipped(1.5), geometric_clipped,
]  # fmt: skip
CORRECTIONS = [
    truncated_sequence,
    OffPolicySequenceMask(0.05),
    CorrectionProduct([GeometricMask(0.8, 1.2), TwoSidedMask(0.7, 1.5)]),
]
WEIGHTS = [sequence_mean, token_mean, Constant(8)]


def rows(lengths, seed=0, spread=0.4):
    """Random rows of completions with `lengths`, as (logp, old, ref, sampler, advantages) and completion_index."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    base = -torch.rand(len(index), dtype=torch.float64, generator=generator) * 3
    noise = torch.randn(5, len(index), dtype=torch.float64, generator=generator)
    logp, old, ref, sampler = (base + spread * noise[i] for i in range(4))
    return [logp, old, ref, sampler, noise[4]], index


# ---- values and gradients ----


def test_the_loss_is_the_weighted_sum_by_hand():
    # rho 1.5, .5 with A 1, -1 are clipped at 1.2 and 0.8; rho 1 is not; weights are not renormalised
    old = torch.tensor([-1.0, -2, -3], dtype=torch.float64)
    logp = (old + torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64).log()).requires_grad_()
    advantages, weights = torch.tensor([1.0, -1, 2]), torch.tensor([0.5, 0.25, 0.125])
    output = Algorithm().loss(logp, old, None, None, advantages, weights, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(output.loss.item(), 0.5 * -1.2 + 0.25 * 0.8 + 0.125 * -2)
    output.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0, 0, -0.25], dtype=torch.float64))

    approx_kl = 0.5 * (0.5 - math.log(1.5)) + 0.25 * (-0.5 - math.log(0.5))
    expected = {
        "clip_fraction_low": 0.25,
        "clip_fraction_high": 0.5,
        "ratio_mean": 0.5 * 1.5 + 0.25 * 0.5 + 0.125,
        "approx_kl": approx_kl,
        "correction_mean": 0.875,
        "weight_sum": 0.875,
    }
    assert output.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.metrics[name].item(), value)
        assert not output.metrics[name].requires_grad


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        (k1, lambda x: x, lambda x: 1.0),
        (k2, lambda x: x * x / 2, lambda x: x),
        (k3, lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
    ],
)
@pytest.mark.parametrize("correction", [None, truncated_token])
def test_loss_and_gradient_of_reinforce_with_kl_and_correction_equal_the_formula(kl, value, slope, correction):
    (logp, old, ref, sampler, advantages), index = rows([3, 1, 2])
    weights = torch.linspace(0.05, 0.3, 6, dtype=torch.float64)
    chosen = {} if correction is None else {"correction": correction, "correction_cap": 1.1}
    logp.requires_grad_()
    output = Algorithm(surrogate=reinforce, kl=kl, kl_coef=0.5, **chosen).loss(
        logp, old, ref, sampler, advantages, weights, index
    )
    loss, gradients, kl_ref = 0.0, [], 0.0
    for p, o, f, s, a, w in zip(*(t.tolist() for t in (logp, old, ref, sampler, advantages, weights)), strict=True):
        q = 1.0 if correction is None else min(math.exp(o - s), 1.1)
        q *= min(math.exp(p - o), 1.2)  # the truncated importance weight
        loss += w * (-q * a * p + 0.5 * value(p - f))
        gradients.append(w * (-q * a + 0.5 * slope(p - f)))
        kl_ref += w * value(p - f)
    torch.testing.assert_close(output.loss.item(), loss)
    torch.testing.assert_close(output.metrics["kl_ref"].item(), kl_ref)
    output.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor(gradients, dtype=torch.float64))


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("correction", [truncated_sequence, masked_sequence])
def test_the_gradient_flows_through_logp_alone(surrogate, correction):
    tensors, index = rows([2, 3])
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    for tensor in (*tensors, weights):
        tensor.requires_grad_()
    output = Algorithm(surrogate=surrogate, kl_coef=0.1, correction=correction).loss(*tensors, weights, index)
    output.loss.backward()
    logp, *others = tensors
    assert logp.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in (*others, weights))


def test_kl_in_the_reward_leaves_the_loss_alone():
    (logp, old, ref, _, advantages), index = rows([2, 3])
    weights = torch.full((5,), 0.2)
    arguments = (advantages, weights, index)
    without = Algorithm().loss(logp, old, None, None, *arguments)
    in_reward = Algorithm(kl_coef=0.5, kl_placement="reward").loss(logp, old, ref, None, *arguments)
    in_loss = Algorithm(kl_coef=0.5).loss(logp, old, ref, None, *arguments)
    assert in_reward.loss == without.loss
    assert in_loss.loss != without.loss


def test_a_kl_term_without_reference_is_an_error_that_names_the_flag():
    (logp, old, *_, advantages), index = rows([2])
    with pytest.raises(ValueError, match=r"kl_coef=0\.5 .* set model\.algorithm\.kl_coef"):
        Algorithm(kl_coef=0.5).loss(logp, old, None, None, advantages, torch.ones(2), index)


def test_masked_and_broken_tokens_leave_loss_gradient_and_metrics_finite():
    (logp, old, ref, sampler, advantages), index = rows([2, 3])
    sampler[1] = -math.inf
    weights = torch.zeros(5)
    logp.requires_grad_()
    algorithm = Algorithm(kl_coef=0.1, correction=truncated_token)
    output = algorithm.loss(logp, old, ref, sampler, advantages, weights, index)
    output.loss.backward()
    assert output.loss == 0
    assert (logp.grad == 0).all()
    assert all(value == 0 for value in output.metrics.values())


def test_a_token_the_sampler_did_not_score_has_no_policy_gradient_and_no_sampler_kl():
    (logp, old, _, sampler, advantages), index = rows([3])
    sampler[1] = math.nan
    logp.requires_grad_()
    algorithm = Algorithm(surrogate=reinforce, correction=truncated_token)
    output = algorithm.loss(logp, old, None, sampler, advantages, torch.ones(3), index)
    output.loss.backward()
    assert logp.grad[1] == 0
    assert (logp.grad[[0, 2]] != 0).all()
    x = (old - sampler)[[0, 2]]
    torch.testing.assert_close(output.metrics["sampler_kl"], (x.exp() - 1 - x).sum())


@pytest.mark.parametrize("rule", WEIGHTS, ids=lambda r: getattr(r, "__name__", "constant"))
def test_an_empty_completion_enters_no_sequence_ratio_and_no_weight(rule):
    """GSPO's ratio is a mean over the tokens of a completion: none has no ratio, and no padding stands for it."""
    found = []
    for lengths in ([2, 0, 5], [2, 5]):
        (logp, old, _, _, advantages), _ = rows([2, 5])
        index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        weights = rule(torch.tensor(lengths), torch.ones(len(lengths), dtype=torch.bool))[index].double()
        logp.requires_grad_()
        output = Algorithm(surrogate=sequence_clipped).loss(logp, old, None, None, advantages, weights, index)
        output.loss.backward()
        found.append((output.loss.detach(), logp.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][1].abs().sum() > 0


# ---- micro-batches ----


def name_of(function):
    return getattr(function, "__name__", type(function).__name__)


@pytest.mark.parametrize(
    ("surrogate", "rule", "correction"),
    [(surrogate, rule, truncated_sequence) for surrogate in SURROGATES[:5] for rule in WEIGHTS]
    + [(surrogate, sequence_mean, truncated_sequence) for surrogate in SURROGATES[5:]]
    + [(clipped, token_mean, correction) for correction in CORRECTIONS[1:]],
    ids=name_of,
)
@given(
    completions=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_any_split_of_completions_over_micro_batches_gives_the_same_loss_gradient_and_metrics(
    surrogate, rule, correction, completions, seed
):
    lengths, valid, parts = zip(*completions, strict=True)
    (logp, *others), index = rows(lengths, seed)
    weights = rule(torch.tensor(lengths), torch.tensor(valid))[index].double()
    algorithm = Algorithm(surrogate=surrogate, kl_coef=0.1, correction=correction)
    stale = logp > -1.5

    def run(picked):
        leaf = logp.clone().requires_grad_()
        inputs = [t[picked] for t in (leaf, *others, weights)]
        output = algorithm.loss(*inputs, index[picked], stale=stale[picked])
        output.loss.backward()
        return output, leaf.grad

    whole, whole_gradient = run(torch.arange(len(index)))
    shuffled = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    pieces = [run(shuffled[torch.tensor(parts)[index[shuffled]] == part]) for part in range(3)]
    torch.testing.assert_close(sum(output.loss for output, _ in pieces), whole.loss)
    torch.testing.assert_close(sum(gradient for _, gradient in pieces), whole_gradient)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(output.metrics[name] for output, _ in pieces), value)


# ---- from rewards to the gradient ----


def test_one_grpo_step_by_hand():
    # group 1: rewards 1, 0 -> A = +-1/sqrt(2), lengths 1 and 3; group 2: equal rewards; its first completion is empty
    algorithm = Algorithm()
    rewards, valid = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.ones(2, 2, dtype=torch.bool)
    lengths = torch.tensor([1, 3, 0, 2])
    advantages = algorithm.token_advantages(rewards, valid, lengths)
    a = math.sqrt(0.5)
    torch.testing.assert_close(advantages, torch.tensor([a, -a, -a, -a, 0, 0]), rtol=1e-5, atol=0)
    assert advantages[4:].tolist() == [0, 0]
    weights = algorithm.token_weights(lengths, valid.flatten(), single_rank)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 9, 0, 1 / 6]))

    index = torch.repeat_interleave(torch.arange(4), lengths)
    logp = torch.full((6,), -1.0, requires_grad=True)
    output = algorithm.loss(logp, logp.detach(), None, None, advantages, weights[index], index)
    output.loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-a / 3, a / 9, a / 9, a / 9, 0, 0]), rtol=1e-5, atol=0)


def test_an_own_advantage_may_forget_about_invalid_completions():
    def ones(outcomes):
        return torch.ones_like(outcomes.rewards)

    advantages = Algorithm(advantage=ones).token_advantages(
        torch.tensor([[5.0, 6.0]]), torch.tensor([[True, False]]), torch.tensor([1, 2])
    )
    assert advantages.tolist() == [1, 0, 0]


def test_kl_estimates_are_scaled_by_the_coefficient():
    algorithm = Algorithm(advantage=raw, kl_coef=0.5, kl_placement="reward")
    arguments = (torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2, 1]))
    advantages = algorithm.token_advantages(*arguments, kl=torch.tensor([0.2, 0.4, -1.0]))
    torch.testing.assert_close(advantages, torch.tensor([0.7, 0.7, 0.5]))


@pytest.mark.parametrize(
    ("algorithm", "kl", "message"),
    [
        (Algorithm(kl_coef=0.1, kl_placement="reward"), None, "needs the KL estimates"),
        (Algorithm(kl_coef=0.1), torch.zeros(2), "takes no KL estimates"),
        (Algorithm(), torch.zeros(2), "takes no KL estimates"),
    ],
)
def test_kl_estimates_come_if_and_only_if_they_are_meant(algorithm, kl, message):
    with pytest.raises(ValueError, match=message):
        algorithm.token_advantages(
            torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([1, 1]), kl=kl
        )


# ---- checks ----


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(advantage=group_normalized),
        Algorithm(advantage=group_centered),
        Algorithm(advantage=leave_one_out),
        Algorithm(advantage=group_centered_batch_normalized),
        Algorithm(advantage=raw, select=drop_uniform),
        Algorithm(advantage=raw, select=InOrder([mask_truncated, drop_uniform])),
    ],
)
def test_what_compares_completions_needs_two_of_them(algorithm):
    algorithm.validate(SamplingParams(2), 1)
    with pytest.raises(
        ValueError, match=r"needs num_generations >= 2, got 1; raise rollout\.sampling\.num_generations"
    ):
        algorithm.validate(SamplingParams(1), 1)


def test_what_does_not_compare_completions_is_content_with_one():
    Algorithm(advantage=raw, select=InOrder([mask_truncated])).validate(SamplingParams(1), 1)
    Algorithm(advantage=greedy_centered, greedy_baseline=True, select=keep_all).validate(SamplingParams(1), 1)


def test_greedy_centered_needs_the_greedy_rollout():
    with pytest.raises(ValueError, match=r"got greedy_baseline=False; set model\.algorithm\.greedy_baseline to true"):
        Algorithm(advantage=greedy_centered).validate(SamplingParams(4), 1)


def test_k1_in_the_loss_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        Algorithm(kl=k1, kl_coef=0.1, kl_placement="reward").validate(SamplingParams(2), 1)
        Algorithm(kl=k1, kl_coef=0.0).validate(SamplingParams(2), 1)
        Algorithm(kl=k2, kl_coef=0.1).validate(SamplingParams(2), 1)
        assert not caplog.records
        Algorithm(kl=k1, kl_coef=0.1).validate(SamplingParams(2), 1)
    assert "k1 in the loss has no effect" in caplog.text


@needs(one_update=True)
def without_ratio(tokens, clip_low, clip_high):
    """As a user may write REINFORCE."""
    never = torch.zeros_like(tokens.advantages, dtype=torch.bool)
    return TokenLosses(-tokens.advantages * tokens.logp, never, never)


@pytest.mark.parametrize(
    ("select", "run", "problem"),
    [
        (keep_all, {"mini_batches": 4}, r"4 updates per rollout"),
        (keep_all, {"mini_batches": 1, "max_staleness": 1}, r"rollout\.max_staleness=1"),
        (keep_all, {"mini_batches": 1, "max_staleness": 3}, r"rollout\.max_staleness=3"),
        (drop_uniform, {"mini_batches": 1}, r"select that leaves groups to the next step"),
    ],
)
def test_samples_of_other_weights_are_refused_where_nothing_reads_the_ratio(select, run, problem):
    with pytest.raises(ValueError, match=f"surrogate without_ratio has no importance ratio.*{problem}"):
        Algorithm(surrogate=without_ratio, select=select).validate(SamplingParams(2), **run)
    for surrogate in SURROGATES:
        Algorithm(surrogate=surrogate, select=select).validate(SamplingParams(2), **run)


STALE = {
    "truncated_token": (Algorithm(correction=truncated_token), None, None),
    "masked_sequence": (Algorithm(correction=masked_sequence), None, r"they count in the surrogate's; set .*token"),
    "decoupled masked_sequence": (
        Algorithm(correction=masked_sequence, decoupled=True), r"little but 0 and the cap is left", None,
    ),
    "geometric_mask": (Algorithm(correction=GeometricMask()), None, r"GeometricMask averages the ratios of all tokens"),
    "decoupled geometric_mask": (
        Algorithm(correction=CorrectionProduct([GeometricMask(), truncated_token]), decoupled=True), None, None,
    ),
    "off-policy mask": (Algorithm(correction=OffPolicySequenceMask(0.1)), None, None),
    "gspo": (Algorithm(surrogate=sequence_clipped), r"clips a completion as a whole, around policies of up to 2", None),
    "decoupled gspo": (
        Algorithm(surrogate=sequence_clipped, correction=truncated_token, decoupled=True), None, None,
    ),
    "decoupled, one update": (Algorithm(correction=truncated_token, decoupled=True), r"clips nothing, for", None),
    "kl in the reward": (Algorithm(kl=k1, kl_coef=0.1, kl_placement="reward"), None, None),
    "batch_normalized": (Algorithm(advantage=batch_normalized), None, None),
    "remax": (Algorithm(advantage=greedy_centered, greedy_baseline=True), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", STALE)
def test_what_completions_of_several_weights_would_learn_wrongly_is_refused_or_told(name, caplog):
    algorithm, warning, error = STALE[name]
    num_updates = 1 if "one update" in name else 2
    for max_staleness in (0, 1):
        if "decoupled" not in name or not max_staleness:
            algorithm.validate(SamplingParams(2), num_updates, max_staleness)
    assert not caplog.records
    with contextlib.nullcontext() if error is None else pytest.raises(ValueError, match=error):
        algorithm.validate(SamplingParams(2), num_updates, max_staleness=2)
    assert len(caplog.records) == (warning is not None)
    assert re.search(warning or "", caplog.text)


@pytest.mark.parametrize(
    "correction", [GeometricMask(), OffPolicySequenceMask(0.1), CorrectionProduct([GeometricMask(), no_correction])]
)
def test_a_mask_alone_weighs_no_old_tokens(correction):
    with pytest.raises(ValueError, match=r"decoupled=true .* got .*Mask.*; set model\.algorithm\.correction to"):
        Algorithm(decoupled=True, correction=correction)
    Algorithm(decoupled=True, correction=CorrectionProduct([correction, truncated_token]))


def test_a_range_of_old_tokens_without_any_is_told(caplog):
    algorithm = Algorithm(surrogate=StaleClipped(0.5, 2.0))
    algorithm.validate(SamplingParams(2), 1, max_staleness=1)
    Algorithm(surrogate=StaleClipped(0.5, 2.0), select=drop_uniform).validate(SamplingParams(2), 1)
    assert not caplog.records
    algorithm.validate(SamplingParams(2), 1)
    assert "the surrogate StaleClipped treats tokens of older weights apart, and there are none" in caplog.text


def test_the_needs_of_a_surrogate_within_another_are_its_own_too():
    with pytest.raises(ValueError, match=r"surrogate StaleClipped has no importance ratio"):
        Algorithm(surrogate=StaleClipped(0.5, 2.0, without_ratio)).validate(SamplingParams(2), 4)
    for surrogate in (SequenceDualClipped(), geometric_clipped, StaleClipped(0.5, 2.0)):
        with pytest.raises(ValueError, match=r"have no meaning, got .* as model\.algorithm\.surrogate"):
            Algorithm(surrogate=surrogate).validate_steps(2, 1)
    Algorithm(surrogate=SoftGated()).validate_steps(2, 1)


def test_a_decoupled_objective_needs_a_correction():
    with pytest.raises(ValueError, match=r"decoupled=true .* got no_correction; set model\.algorithm\.correction to"):
        Algorithm(decoupled=True)
    with pytest.raises(ValueError, match=r"corrections, decoupled and greedy_baseline have no meaning"):
        Algorithm(decoupled=True, correction=needs(rows="any")(lambda tokens, cap: tokens.ratio)).validate_steps(2, 1)


def test_a_decoupled_kl_of_the_policy_weighs_the_tokens_by_those_that_drew_them():
    """Ratio 1 to the policy before, 2 and 1/2 from there to the sampler: k3 times 1.5 (the cap) and 1/2."""
    algorithm = Algorithm(kl=k3_unbiased, kl_coef=1.0, decoupled=True, correction=truncated_token, correction_cap=1.5)
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    sampler = logp.detach() - torch.tensor([2.0, 0.5]).log()
    index = torch.tensor([0, 0])
    result = algorithm.loss(logp, logp.detach(), logp - 0.3, sampler, torch.zeros(2), torch.ones(2), index)
    k3 = math.exp(-0.3) - 1 + 0.3
    assert result.loss.item() == pytest.approx(2.0 * k3, rel=1e-5)
    result.loss.backward()
    # rho k3 has the gradient k3 + 1 - exp(-x) = x at rho = 1.
    assert logp.grad.tolist() == pytest.approx([1.5 * 0.3, 0.5 * 0.3], rel=1e-5)


def test_its_own_samples_are_no_matter():
    Algorithm(surrogate=without_ratio).validate(SamplingParams(2), 1)
    Algorithm(surrogate=without_ratio, select=drop_uniform).validate(SamplingParams(2), 1, resamples=False)


@pytest.mark.parametrize("name", ["kl_coef", "clip_low", "clip_high", "correction_cap"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_negative_constants_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"algorithm\.{name} must be .*0, got"):
        Algorithm(**{name: value})


def test_a_class_in_place_of_a_function_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.token_weights must be a function, got the class Constant"):
        Algorithm(token_weights=Constant)


def test_the_positional_order_the_trainer_relies_on():
    assert list(inspect.signature(Algorithm.loss).parameters)[1:] == [
        "logp", "old_logp", "ref_logp", "sampler_logp", "advantages", "weights", "completion_index", "steps",
        "stale",
    ]  # fmt: skip


def test_one_greedy_completion_many_times_teaches_nothing():
    with pytest.raises(
        ValueError, match=r"the 4 completions of a prompt are the same.*set rollout\.sampling\.temperature"
    ):
        Algorithm().validate(SamplingParams(4, temperature=0.0), 1)
    Algorithm(advantage=raw).validate(SamplingParams(1, temperature=0.0), 1)


def test_constant_weights_for_another_limit_are_told(caplog):
    with pytest.raises(ValueError, match=r"divides by 20 tokens, but completions may have 80"):
        Algorithm(token_weights=Constant(20)).validate(SamplingParams(2, 80), 1)
    Algorithm(token_weights=Constant(80)).validate(SamplingParams(2, 80), 1)
    assert not caplog.records
    Algorithm(token_weights=Constant(1024)).validate(SamplingParams(2, 80), 1)
    assert "the loss is 12.8 times smaller" in caplog.text


def test_options_without_effect_are_warned_about(caplog):
    Algorithm(greedy_baseline=True).validate(SamplingParams(2), 1)
    assert "greedy completions that nothing uses" in caplog.text
    Algorithm(select=drop_uniform).validate(SamplingParams(2, top_p=0.9), 1)
    assert "old log-probabilities of carried-over groups" in caplog.text
