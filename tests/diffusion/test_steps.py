"""Steps against closed forms in float64, diffusers' own Euler sampler, and a flow whose solution is known."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from longrl.algorithms import DrawnSteps, gaussian_mean
from longrl.diffusion.sampler import DiffusionSampling, denoise_latents, sample_trajectories, seeded_noise
from longrl.diffusion.steps import CPS, FlowSDE, broadcast_rows, make_step, ode_step, step_log_prob, step_mean
from longrl.diffusion.windows import RandomWindow, SlidingWindow, all_steps
from tests.algorithms.test_algorithm_yaml import CONFIGS, parse
from tests.diffusion.tiny import sd3_family, wan_family


def schedule(num_steps: int, shift: float = 3.0):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


def model(latents, timesteps):
    """Any smooth function."""
    return torch.sin(3 * latents) + timesteps.view(-1, 1) / 1000


def drawn_from(seeds, steps, **options):
    def policy(latents, timesteps, texts, guidance_scale):
        return model(latents, timesteps)

    texts = [""] * len(seeds)
    return sample_trajectories(policy, texts, seeds, steps, shape=(6,), device=torch.device("cpu"), **options)


# ---- one step ----


def test_the_sde_step_is_the_papers_formula():
    s, n, a = 0.6, 0.5, 0.7
    x, v = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    g = a * math.sqrt(s / (1 - s))
    d = n - s
    keep, move, std = FlowSDE(a)(s, n)
    expected = x * (1 + g**2 / (2 * s) * d) + v * (1 + g**2 * (1 - s) / (2 * s)) * d
    torch.testing.assert_close(step_mean(x, v, keep, move), expected, rtol=1e-14, atol=0)
    assert std == pytest.approx(g * math.sqrt(-d), rel=1e-14)


def test_the_first_step_takes_its_noise_from_where_it_ends():
    _, _, std = FlowSDE(0.7)(1.0, 0.9)
    assert std == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))


def test_the_cps_step_is_a_mixture_of_predicted_data_predicted_noise_and_new_noise():
    s, n, h = 0.6, 0.4, 0.8
    x, v = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    keep, move, std = CPS(h)(s, n)
    data, noise = x - s * v, x + (1 - s) * v
    expected = (1 - n) * data + n * math.cos(h * math.pi / 2) * noise
    torch.testing.assert_close(step_mean(x, v, keep, move), expected, rtol=1e-12, atol=1e-14)
    assert std**2 + (n * math.cos(h * math.pi / 2)) ** 2 == pytest.approx(n**2)  # the noise that the model expects


@pytest.mark.parametrize("dynamics", [FlowSDE(0.0), CPS(0.0)])
def test_without_noise_a_step_is_eulers(dynamics):
    assert dynamics(0.6, 0.5) == ode_step(0.6, 0.5)


def test_log_probability_and_kl_are_those_of_gaussians_per_number():
    generator = torch.Generator().manual_seed(0)
    drawn, mean, other = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    policy, reference = (Independent(Normal(m, std.view(3, 1, 1, 1)), 3) for m in (mean, other))
    torch.testing.assert_close(step_log_prob(drawn, mean, std), policy.log_prob(drawn) / 32, rtol=1e-13, atol=0)
    found = gaussian_mean(mean.flatten(1) / std[:, None], other.flatten(1) / std[:, None])
    torch.testing.assert_close(found, kl_divergence(policy, reference) / 32, rtol=1e-13, atol=0)


RELEASED_SD3 = [
    1.2935e-07, 2.87471e-07, 9.29638e-07, 2.37892e-06, 5.79249e-06, 1.44692e-05, 3.93855e-05, 1.27098e-04, 5.94870e-04,
]  # fmt: skip
RELEASED_WAN = [
    6.05409e-08, 1.02297e-07, 2.31927e-07, 3.96631e-07, 6.06748e-07, 8.76255e-07, 1.22434e-06, 1.67774e-06, 2.27445e-06,
    3.06963e-06, 4.14532e-06, 5.62725e-06, 7.71509e-06, 1.07400e-05, 1.52821e-05, 2.24344e-05, 3.44695e-05, 5.68557e-05,
    1.06321e-04,
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "family", "num_steps", "released"),
    [
        ("flow_grpo", sd3_family, 10, RELEASED_SD3),
        ("flow_grpo_global_std", sd3_family, 10, RELEASED_SD3),
        ("flow_grpo_wan", wan_family, 20, RELEASED_WAN),
    ],
)
def test_the_kl_term_of_every_step_is_the_released_one(config, family, num_steps, released):
    """Figures of the released code: coefficient times KL of velocities that differ by (0.1, -0.3), noise level 0.7."""
    algorithm = parse(f"--model.algorithm={CONFIGS / config}.yaml")
    steps = DiffusionSampling(num_steps=num_steps).steps(*family().denoising_schedule(num_steps), 0, 0)[:-1]
    velocity = torch.tensor([[0.1, -0.3]])
    found = []
    for step in steps:
        mean = velocity * step.velocity_coef
        drawn = DrawnSteps(mean, torch.tensor([step.std]), torch.tensor([step.length]), mean, torch.zeros(1, 2))
        one, zero = torch.ones(1), torch.zeros(1)
        found.append(float(algorithm.loss(zero, zero, None, None, zero, one, zero.long(), drawn).loss))
    assert found == pytest.approx(released, rel=2e-5)


def test_the_released_coefficient_is_a_thirteenth_where_the_length_is_left_out():
    theirs = schedule(10)
    steps = [make_step(FlowSDE(), index, theirs.sigmas, theirs.timesteps) for index in range(9)]
    inverse = sum(1 / step.length for step in steps) / 9
    assert inverse == pytest.approx(13.02, abs=0.005)
    assert 0.04 / inverse == pytest.approx(0.00307, abs=5e-6)


def test_late_steps_of_cps_are_many_deviations_long_and_those_of_the_sde_are_not():
    theirs = schedule(10)
    gains = {}
    for dynamics in (FlowSDE(0.7), CPS(0.8)):
        steps = [make_step(dynamics, index, theirs.sigmas, theirs.timesteps) for index in range(10)]
        gains[type(dynamics)] = [round(step.gain, 2) for step in steps]
    assert gains[FlowSDE][:9] == [0.06, 0.08, 0.13, 0.19, 0.26, 0.37, 0.54, 0.82, 1.49]
    assert gains[CPS] == [0.04, 0.08, 0.13, 0.19, 0.28, 0.4, 0.6, 1.1, 32.22, 0.0]


# ---- many steps ----


@pytest.mark.parametrize("dynamics", [ode_step, FlowSDE(0.0), CPS(0.0)])
def test_without_noise_the_sampler_is_diffusers_own_step_for_step_and_ends_at_zero(dynamics):
    theirs = schedule(10)
    steps = [make_step(dynamics, i, theirs.sigmas, theirs.timesteps) for i in range(10)]
    assert steps[0].sigma == 1
    assert steps[-1].next_sigma == 0
    expected = torch.randn(4, 6)
    for step, timestep in zip(steps, theirs.timesteps, strict=True):
        start = expected
        expected = theirs.step(model(start, timestep.expand(4)), timestep, start).prev_sample
        assert torch.equal(denoise_latents(model, start, [step], lambda index: pytest.fail("no noise")).final, expected)


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.8)])
def test_a_drawn_trajectory_scored_again_gives_the_samplers_log_probabilities(dynamics):
    theirs, seeds = schedule(10), [11, 12, 13]
    steps = DiffusionSampling(dynamics=dynamics).steps(theirs.sigmas, theirs.timesteps, 0, 0)
    found = drawn_from(seeds, steps)
    for sample in found:
        assert len(sample.steps) == 9
        rows = sample.latents[:-1]
        column = broadcast_rows([step.timestep for step in sample.steps], rows)
        state_coef = broadcast_rows([step.state_coef for step in sample.steps], rows)
        velocity_coef = broadcast_rows([step.velocity_coef for step in sample.steps], rows)
        mean = step_mean(rows, model(rows, column), state_coef, velocity_coef)
        std = torch.tensor([step.std for step in sample.steps])
        torch.testing.assert_close(step_log_prob(sample.latents[1:], mean, std), sample.logprobs, rtol=0, atol=1e-5)
        old = torch.stack([sample.old_mean(place) for place in range(9)])
        torch.testing.assert_close(old, mean, rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_its_seed_alone():
    theirs = schedule(6)
    steps = DiffusionSampling().steps(theirs.sigmas, theirs.timesteps, 0, 0)
    together = drawn_from([1, 2], steps)
    (alone,) = drawn_from([2], steps)
    torch.testing.assert_close(together[1].final, alone.final)
    assert not torch.allclose(together[0].final, alone.final)
    (other,) = drawn_from([2], steps, start_seeds=[1])
    assert not torch.allclose(other.final, alone.final)
    assert torch.equal(seeded_noise(3, 0, (4,)), seeded_noise(3, 0, (4,)))


@pytest.mark.parametrize(
    ("dynamics", "t", "num_steps"),
    [
        (ode_step, 0.5, 400),
        (FlowSDE(0.7), 0.5, 400),
        (FlowSDE(1.2), 0.5, 400),
        (CPS(0.8), 0.0, 400),
        (CPS(0.8), 0.0, 6),
    ],
)
def test_marginals_are_those_of_a_flow_with_a_known_solution(dynamics, t, num_steps):
    """Data N(m, t^2): x_s is N((1-s) m, (1-s)^2 t^2 + s^2), and E[noise - data | x_s] is linear in x."""
    m, samples = 1.5, 40_000

    def exact(latents, timesteps):
        s = (timesteps / 1000).view(-1, 1)
        variance = (1 - s) ** 2 * t**2 + s**2
        return (s - (1 - s) * t**2) / variance * (latents - (1 - s) * m) - m

    theirs = schedule(num_steps)
    sigmas, timesteps = theirs.sigmas.double(), theirs.timesteps.double()
    generator = torch.Generator().manual_seed(0)
    drawn = range(num_steps - 1)
    steps = [make_step(dynamics if i in drawn else ode_step, i, sigmas, timesteps) for i in range(num_steps)]
    start = torch.randn(samples, 1, generator=generator)
    for stop in (num_steps * 2 // 3, num_steps):
        own = steps[:stop]
        found = denoise_latents(exact, start, own, lambda index: torch.randn(samples, 1, generator=generator)).final
        s = own[-1].next_sigma
        variance = (1 - s) ** 2 * t**2 + s**2
        assert float(found.mean()) == pytest.approx((1 - s) * m, abs=5 * math.sqrt(variance / samples) + 4e-3)
        assert float(found.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / samples) + 1e-2, abs=1e-9)


# ---- windows ----


def test_flow_grpo_draws_in_all_steps_but_the_last():
    assert [step.std > 0 for step in DiffusionSampling().steps([1, 0.6, 0.3, 0], [1000, 600, 300], 0, 0)] == [
        True,
        True,
        False,
    ]
    assert all_steps(10, 3, 0) == range(9)


def test_a_random_window_moves_from_rollout_to_rollout_and_is_drawn_by_the_seed():
    window = RandomWindow(2, end=5)
    starts = {window(10, rollout, 0).start for rollout in range(50)}
    assert starts == {0, 1, 2, 3}
    assert window(10, 7, 1) == window(10, 7, 1)
    assert all(len(window(10, rollout, 0)) == 2 for rollout in range(5))


def test_mixgrpos_window_slides_to_the_end_and_begins_anew():
    window = SlidingWindow(4, stride=1, every=25)
    assert [window(10, rollout, 0) for rollout in (0, 24, 25, 125, 150)] == [
        range(4), range(4), range(1, 5), range(5, 9), range(4),
    ]  # fmt: skip


@pytest.mark.parametrize("window", [RandomWindow(5), RandomWindow(2, end=5), SlidingWindow(5)])
def test_a_window_that_does_not_fit_says_so(window):
    with pytest.raises(ValueError, match="does not fit 5 denoising steps"):
        window(5, 0, 0)


def test_no_window_is_the_ode():
    steps = DiffusionSampling(window=None).steps([1, 0.5, 0], [1000, 500], 0, 0)
    assert [step.std for step in steps] == [0, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowSDE(-1), "noise_level of FlowSDE"),
        (lambda: CPS(1.1), "noise_level of CPS"),
        (lambda: RandomWindow(0), "size of RandomWindow"),
        (lambda: SlidingWindow(every=0), "every of SlidingWindow"),
        (lambda: DiffusionSampling(num_steps=1), "sampling.num_steps"),
        (lambda: DiffusionSampling(guidance_scale=0.5), "sampling.guidance_scale"),
    ],
)
def test_wrong_numbers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_window_with_a_hole_is_refused():
    with pytest.raises(ValueError, match=r"neighbouring steps, got \[0, 2\]"):
        DiffusionSampling(window=lambda *args: [0, 2]).steps([1, 0.6, 0.3, 0], [1000, 600, 300], 0, 0)


def test_window_and_dynamics_may_be_functions_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def second(num_steps, rollout, seed):\n    return range(1, 2)\n"
        "def half(sigma, next_sigma):\n    return 1.0, next_sigma - sigma, 0.5\n"
    )
    sampling = DiffusionSampling(window=f"{path}:second", dynamics=f"{path}:half")
    steps = sampling.steps([1, 0.6, 0.3, 0], [1000, 600, 300], 0, 0)
    assert [step.std for step in steps] == [0.0, 0.5, 0.0]
    assert DiffusionSampling(window="longrl.diffusion.windows.all_steps").window is all_steps
    with pytest.raises(ValueError, match=r"rollout.sampling.window '\S+:third': \S+ has no 'third'; it has second"):
        DiffusionSampling(window=f"{path}:third")
