"""An algorithm of a user's own, in a file beside the config."""

import json
import math

import pytest
import torch
import yaml

from longrl.algorithms import Algorithm, InOrder, Outcomes, Tokens, group_centered, keep_all, needs
from longrl.io.functions import import_function
from longrl.types import SamplingParams
from tests.runs import metrics, run, text_config

SAPO = '''
"""SAPO, arXiv:2511.20347, eq. 6: a soft gate around a ratio of 1 in the place of the clip."""
import torch
from torch import Tensor

from longrl.algorithms import Outcomes, TokenLosses, Tokens, needs

TAU_POSITIVE = 1.0
TAU_NEGATIVE = 1.05


def sapo(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -A * sigmoid(tau (rho - 1)) * 4 / tau, with another tau for either sign of A."""
    tau = torch.where(tokens.advantages > 0, TAU_POSITIVE, TAU_NEGATIVE)
    gate = torch.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau
    never = torch.zeros_like(gate, dtype=torch.bool)
    return TokenLosses(-tokens.advantages * gate, never, never)


@needs(groups=True)
def above_median(outcomes: Outcomes) -> Tensor:
    return (outcomes.rewards - outcomes.rewards.median(1, keepdim=True).values).double()
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with my_sapo.py and some sums to answer."""
    (tmp_path / "my_sapo.py").write_text(SAPO)
    sums = [{"problem": f"{n} + 1?", "answer": str(n + 1), "task": "numeric"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_gate_by_hand(folder):
    sapo = import_function("my_sapo.py:sapo", "surrogate")
    logp = torch.tensor([1.5, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    losses = sapo(Tokens(logp, torch.zeros(2, dtype=torch.float64), advantages, torch.tensor([0, 1])), 0.2, 0.2)
    by_hand = [-2 * 4 / (1 + math.exp(-0.5)), 4 / 1.05 / (1 + math.exp(0.525))]
    assert losses.loss.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_at_a_ratio_of_one_the_gradient_is_that_of_reinforce(folder):
    sapo = import_function("my_sapo.py:sapo", "surrogate")
    logp = torch.full((2,), -1.0, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    sapo(Tokens(logp, logp.detach(), advantages, torch.tensor([0, 1])), 0.2, 0.2).loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)


def test_it_trains_from_the_command_line_and_the_saved_config_names_it_as_given(folder):
    values = text_config(folder / "rows.jsonl", "rl")
    values["trainer"]["max_steps"] = 2
    run(folder / "run", values, "--model.algorithm.surrogate", "my_sapo.py:sapo")
    logged = metrics(folder / "run")
    assert all(math.isfinite(float(logged[step, "train/loss"])) for step in (0, 1))
    assert float(logged[0, "train/grad_norm"]) > 0
    saved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert saved["model"]["algorithm"]["surrogate"] == "my_sapo.py:sapo"


def test_a_wrong_name_is_an_error_that_lists_the_functions(folder):
    with pytest.raises(ValueError, match=r"model\.algorithm\.surrogate 'my_sapo\.py:sappo': .*has no 'sappo'; it has"):
        Algorithm(surrogate="my_sapo.py:sappo")


def test_an_advantage_that_says_it_compares_refuses_a_group_of_one(folder):
    algorithm = Algorithm(advantage="my_sapo.py:above_median")
    algorithm.validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match="above_median compares the completions of a prompt"):
        algorithm.validate(SamplingParams(1), 1)
    with pytest.raises(ValueError, match="above_median compares the completions of a prompt"):
        algorithm.validate_steps(1, 1)


def test_steps_of_a_selection_may_be_paths():
    assert InOrder(["longrl.algorithms.keep_all"]).steps == [keep_all]


def test_needs_of_every_kind_are_asked_for():
    @needs(greedy_baseline=True)
    def beats_greedy(outcomes: Outcomes) -> torch.Tensor:
        return group_centered(outcomes)

    @needs(rows="denoising steps")
    def for_latents(tokens: Tokens, clip_low: float, clip_high: float) -> None: ...

    @needs(rows="tokens")
    def for_tokens(tokens: Tokens, cap: float) -> None: ...

    with pytest.raises(ValueError, match=r"beats_greedy subtracts the reward of a greedy completion"):
        Algorithm(advantage=beats_greedy).validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match=r"surrogate=for_latents is for denoising steps"):
        Algorithm(surrogate=for_latents).validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match="scored apart"):
        Algorithm(correction=for_tokens).validate_steps(2, 1)


def test_a_correction_that_does_not_say_what_it_reads_is_refused_for_denoising_steps():
    def halved(tokens: Tokens, cap: float) -> torch.Tensor:
        return torch.full_like(tokens.old_logp, 0.5)

    Algorithm(correction=halved).validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match="scored apart"):
        Algorithm(correction=halved).validate_steps(2, 1)
    Algorithm(correction=needs(rows="any")(halved)).validate_steps(2, 1)


@pytest.mark.parametrize(
    ("field", "called"),
    [
        ("surrogate", "tokens, clip_low, clip_high"),
        ("advantage", "outcomes"),
        ("token_weights", "lengths, valid, all_reduce"),
        ("select", "groups"),
        ("kl", "logp, ref_logp"),
        ("correction", "tokens, cap"),
    ],
)
def test_a_function_with_other_parameters_is_refused_at_the_start(folder, field, called):
    (folder / "wrong.py").write_text("def mine(a, b, c, d):\n    return a\n")
    with pytest.raises(ValueError, match=rf"model\.algorithm\.{field} is called as \({called}\), but mine takes"):
        Algorithm(**{field: "wrong.py:mine"})


def test_a_surrogate_that_returns_a_tensor_is_told_what_to_return():
    algorithm = Algorithm(surrogate=lambda tokens, clip_low, clip_high: -tokens.advantages * tokens.ratio)
    numbers = torch.zeros(2)
    with pytest.raises(ValueError, match=r"model\.algorithm\.surrogate must return .*TokenLosses.*, got a Tensor"):
        algorithm.loss(numbers, numbers, None, None, numbers, numbers, torch.tensor([0, 1]))
