"""Every file of configs/algorithm/ as jsonargparse builds it, and as the trainer will use it."""

import re
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from longrl import algorithms
from longrl.algorithms import (
    Algorithm,
    BoundedK3,
    Constant,
    CorrectionProduct,
    DualClipped,
    EntropyControl,
    GeometricMask,
    InOrder,
    KLControl,
    MovingReference,
    OffPolicySequenceMask,
    SequenceDualClipped,
    SoftGated,
    StaleClipped,
    TaskNormalized,
    TwoSidedMask,
)
from longrl.types import SamplingParams

CONFIGS = Path(__file__).parents[2] / "configs" / "algorithm"

# The settings of the papers that differ from Algorithm(), written down a second time.
EXPECTED = {
    "grpo": {"kl_coef": 0.04},
    "grpo_entropy": {"entropy_control": EntropyControl(target=0.2)},
    "grpo_adaptive_kl": {"kl_coef": 0.04, "kl_control": KLControl(target=0.01)},
    "tr_grpo": {"kl_coef": 0.04, "moving_reference": MovingReference(alpha=0.6, every_n_steps=512)},
    "ema_grpo": {
        "advantage": TaskNormalized(decay=0.99),
        "surrogate": DualClipped(3.0),
        "token_weights": algorithms.token_mean,
        "select": algorithms.drop_uniform,
        "kl": BoundedK3(10.0),
        "kl_coef": 0.01,
        "clip_high": 0.3,
        "advantage_limit": 5.0,
    },
    "grpo_dual_clip": {"surrogate": DualClipped(3.0)},
    "dr_grpo": {"advantage": algorithms.group_centered, "token_weights": Constant(1024)},
    "dapo": {"token_weights": algorithms.token_mean, "select": algorithms.drop_uniform, "clip_high": 0.28},
    "dapo_overlong_filter": {
        "token_weights": algorithms.token_mean,
        "select": InOrder([algorithms.mask_truncated_loss, algorithms.drop_uniform]),
        "clip_high": 0.28,
    },
    "gspo": {"surrogate": algorithms.sequence_clipped, "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {
        "surrogate": algorithms.cispo,
        "token_weights": algorithms.token_mean,
        "clip_low": 1.0,
        "clip_high": 4.0,
        "fp32_lm_head": True,
    },
    "rloo": {
        "advantage": algorithms.leave_one_out,
        "surrogate": algorithms.reinforce,
        "clip_high": 1.0,
        "token_weights": algorithms.token_mean,
        "kl": algorithms.k1,
        "kl_coef": 0.03,
        "kl_placement": "reward",
    },
    "reinforce": {
        "advantage": algorithms.raw,
        "surrogate": algorithms.reinforce,
        "clip_high": 1.0,
        "token_weights": algorithms.token_mean,
    },
    "reinforce_pp": {
        "advantage": algorithms.batch_normalized,
        "token_weights": algorithms.token_mean,
        "kl": algorithms.k1,
        "kl_coef": 1e-4,
        "kl_placement": "reward",
    },
    "reinforce_pp_baseline": {
        "advantage": algorithms.group_centered_batch_normalized,
        "token_weights": algorithms.token_mean,
        "kl": algorithms.k2,
        "kl_coef": 1e-3,
    },
    "long_rl": {
        "surrogate": DualClipped(3.0),
        "token_weights": algorithms.token_mean,
        "kl": BoundedK3(10.0),
        "kl_coef": 0.01,
        "clip_high": 0.3,
    },
    "gdpo": {"advantage": algorithms.part_normalized},
    "sapo": {"surrogate": SoftGated(1.0, 1.05)},
    "gmpo": {"surrogate": algorithms.geometric_clipped, "clip_low": 0.4, "clip_high": 0.4},
    "gspo_dual_clip": {"surrogate": SequenceDualClipped(3.0, 10.0), "clip_low": 3e-4, "clip_high": 4e-4},
    "lite_ppo": {"advantage": algorithms.group_centered_global_std, "token_weights": algorithms.token_mean},
    "dapo_top_entropy": {
        "token_weights": algorithms.token_mean,
        "select": algorithms.drop_uniform,
        "clip_high": 0.28,
        "top_entropy_share": 0.2,
    },
    "opo": {
        "advantage": algorithms.length_centered,
        "surrogate": algorithms.reinforce,
        "clip_high": 1.0,
        "token_weights": algorithms.token_mean,
    },
    "gpg": {
        "advantage": algorithms.group_centered_rescaled,
        "surrogate": algorithms.reinforce,
        "clip_high": 1.0,
        "token_weights": algorithms.token_mean,
    },
    "optimal_token_baseline": {
        "advantage": algorithms.optimal_token_baseline,
        "token_weights": algorithms.token_mean,
    },
    "icepop": {"correction": TwoSidedMask(0.5, 5.0)},
    "deepseek_v32": {
        "advantage": algorithms.group_centered,
        "kl": algorithms.k3_unbiased,
        "correction": OffPolicySequenceMask(0.5),
    },
    "grpo_decoupled": {
        "token_weights": algorithms.token_mean,
        "correction": algorithms.masked_token,
        "correction_cap": 5.0,
        "decoupled": True,
    },
    "grpo_stale_clip": {"surrogate": StaleClipped(0.5, 2.0, algorithms.clipped)},
    "flow_grpo_gdpo": {
        "advantage": algorithms.part_normalized,
        "kl": algorithms.gaussian_mean_rate,
        "kl_coef": 0.04,
        "clip_low": 1e-4,
        "clip_high": 1e-4,
        "advantage_limit": 5.0,
    },
    "flow_grpo": {
        "kl": algorithms.gaussian_mean_rate,
        "kl_coef": 0.04,
        "clip_low": 1e-4,
        "clip_high": 1e-4,
        "advantage_limit": 5.0,
    },
    "flow_grpo_global_std": {
        "advantage": algorithms.group_centered_global_std,
        "kl": algorithms.gaussian_mean_rate,
        "kl_coef": 0.04,
        "clip_low": 1e-4,
        "clip_high": 1e-4,
        "advantage_limit": 5.0,
    },
    "flow_grpo_wan": {
        "kl": algorithms.gaussian_mean,
        "kl_coef": 0.004,
        "clip_low": 1e-3,
        "clip_high": 1e-3,
        "advantage_limit": 5.0,
    },
    "flow_grpo_guard": {
        "surrogate": algorithms.grpo_guard,
        "kl": algorithms.gaussian_mean,
        "clip_low": 2e-6,
        "clip_high": 2e-6,
        "advantage_limit": 5.0,
    },
    "remax": {
        "advantage": algorithms.greedy_centered,
        "surrogate": algorithms.reinforce,
        "clip_high": 1.0,
        "token_weights": algorithms.token_mean,
        "kl": algorithms.k1,
        "kl_coef": 0.05,
        "kl_placement": "reward",
        "greedy_baseline": True,
    },
}


class Policy:
    """Has its algorithm as the LightningModule has."""

    def __init__(self, algorithm: Algorithm | None = None, lr: float = 1.0) -> None:
        self.algorithm = algorithm


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Policy, "model", sub_configs=True)
    return parser


def parse(*arguments: str) -> Algorithm:
    return parser().instantiate(parser().parse_args(list(arguments))).model.algorithm


def test_every_file_is_expected_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EXPECTED.keys()


def test_every_file_is_in_the_table_of_the_docs():
    page = (CONFIGS.parents[1] / "docs" / "algorithms.md").read_text()
    assert [name for name in EXPECTED if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_builds_the_algorithm_of_the_paper(name):
    assert parse(f"--model.algorithm={CONFIGS / name}.yaml") == Algorithm(**EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_saved_config_builds_the_same_algorithm(name, tmp_path):
    config = parser().parse_args([f"--model.algorithm={CONFIGS / name}.yaml"])
    (tmp_path / "saved.yaml").write_text(parser().dump(config))
    assert parse(f"--config={tmp_path / 'saved.yaml'}") == Algorithm(**EXPECTED[name])


def test_a_recipe_names_the_file_and_flags_change_single_values(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model:\n  algorithm: {CONFIGS / 'dr_grpo.yaml'}\n")
    changed = parse(
        f"--config={recipe}",
        "--model.algorithm.clip_high=0.3",
        "--model.algorithm.token_weights.init_args.max_completion_tokens=64",
        "--model.algorithm.correction=longrl.algorithms.truncated_token",
    )
    assert changed == Algorithm(
        advantage=algorithms.group_centered,
        token_weights=Constant(64),
        clip_high=0.3,
        correction=algorithms.truncated_token,
    )


def test_corrections_are_multiplied_in_a_recipe_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    mask = "{class_path: longrl.algorithms.GeometricMask, init_args: {low: 0.98, high: 1.02}}"
    recipe.write_text(f"""
model:
  algorithm:
    correction:
      class_path: longrl.algorithms.CorrectionProduct
      init_args:
        factors: [{mask}, longrl.algorithms.truncated_token]
""")
    product = CorrectionProduct([GeometricMask(0.98, 1.02), algorithms.truncated_token])
    assert parse(f"--config={recipe}") == Algorithm(correction=product)


def test_a_typo_is_an_error():
    with pytest.raises(ArgumentError, match="cliphigh"):
        parse(f"--model.algorithm={CONFIGS / 'grpo.yaml'}", "--model.algorithm.cliphigh=0.3")
    with pytest.raises(ValueError, match=r"algorithm\.advantage .* has no 'group_normalised'; it has group_normalized"):
        parse("--model.algorithm.advantage=longrl.algorithms.group_normalised")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_lines_name_paper_and_formula(name):
    header = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert 1 <= len(header) <= 3
    assert "arXiv:" in header[0] + header[1]
    assert all(len(line) <= 120 for line in header)


@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.startswith("flow_")])
def test_every_algorithm_prefers_the_better_completion(name):
    """One whole step: the better answer's tokens are to rise, the worse one's to fall; one is masked, one empty."""
    algorithm = Algorithm(**EXPECTED[name])
    algorithm.validate(SamplingParams(4), 1)
    rewards, lengths = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([2, 3, 4, 0])
    valid = torch.tensor([[True, True, False, True]])
    index = torch.repeat_interleave(torch.arange(4), lengths)
    logp = torch.full((9,), -1.0, requires_grad=True)
    old = logp.detach()
    needs_ref = algorithm.kl_coef > 0
    in_reward = needs_ref and algorithm.kl_placement == "reward"
    advantages = algorithm.token_advantages(
        rewards,
        valid,
        lengths,
        kl=algorithm.kl(old, old) if in_reward else None,
        baseline=torch.tensor([0.0]) if algorithm.greedy_baseline else None,
        parts={"accuracy": rewards},
        part_weights={"accuracy": torch.ones(1)},
        gradient_norms=torch.ones(9),
        task_deviations=torch.ones(1) if algorithm.task_decay is not None else None,
    )
    weights = algorithm.token_weights(lengths, valid.flatten(), algorithms.single_rank)[index]
    ref = old if needs_ref and not in_reward else None
    algorithm.loss(logp, old, ref, old, advantages, weights, index, None, old > 0).loss.backward()
    assert (logp.grad[:2] < 0).all()
    assert (logp.grad[2:5] > 0).all()
    assert (logp.grad[5:] == 0).all()


def test_long_rl_gives_the_numbers_of_its_released_code():
    """`compute_grpo_outcome_advantage`, `compute_policy_loss` and `compute_kl` of NVlabs/Long-RL (97abc84), run once.

    Two completions of three tokens; ratios on both sides of every clip, one beyond 3, and two KL estimates beyond 10.
    """
    algorithm = Algorithm(**EXPECTED["long_rl"])
    lengths, valid = torch.tensor([3, 3]), torch.ones(1, 2, dtype=torch.bool)
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.2, -12.0], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.tensor([1.5, 0.5, 1.0, 4.0, 0.7, 1.1], dtype=torch.float64).log()
    ref = torch.tensor([-1.5, -1.0, -0.5, -0.3, -0.2, -0.5], dtype=torch.float64)
    advantages = algorithm.token_advantages(torch.tensor([[1.0, 0.2]]), valid, lengths).double()
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    weights = algorithm.token_weights(lengths, valid.flatten(), algorithms.single_rank)[index]
    output = algorithm.loss(logp, old, ref, None, advantages, weights, index)
    assert output.loss.item() == pytest.approx(0.28219497911786584, rel=1e-6)
    output.loss.backward()
    gradients = [0.0006557822925969958, -0.0617892578969543, -0.11785090943403938, 0.0, 0.0, 0.1296360113049616]
    assert logp.grad.tolist() == pytest.approx(gradients, rel=1e-5)
    # Of its metrics, `pg_clipfrac_higher` is a third of the tokens and `pg_clipfrac_lower` a sixth; the first counts
    # both sides of the clip, the second the dual clip.
    clipped = output.metrics["clip_fraction_low"] + output.metrics["clip_fraction_high"]
    assert clipped.item() == pytest.approx(1 / 3 + 1 / 6)
