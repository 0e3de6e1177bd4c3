"""Rules of coefficients and references that move, against figures of the peers that have them."""

import pytest

from longrl.algorithms import Algorithm, EntropyControl, KLControl, MovingReference, k1
from longrl.modules.moving_reference import check_reference
from longrl.types import SamplingParams

SAMPLING = SamplingParams(num_generations=4, max_completion_tokens=8)


def test_the_kl_coefficient_is_that_of_verl_and_trl():
    """Figures of `AdaptiveKLController(0.2, 0.01, 10000)` of verl and of TRL 0.13, which agree to the last bit."""
    control = KLControl(target=0.01, horizon=10_000)
    coefficient = 0.2
    found = []
    for kl, num_completions in [(0.02, 256), (0.011, 256), (0.0, 512), (0.0095, 64), (5.0, 9000), (-0.3, 256)]:
        coefficient = control.next(coefficient, kl, num_completions)
        found.append(coefficient)
    wanted = [0.201024, 0.20153862144, 0.1994748659564544, 0.1994110339993483, 0.235305020119231, 0.23410025841622054]
    assert found == pytest.approx(wanted, rel=1e-15)


def test_a_rollout_larger_than_the_horizon_leaves_the_coefficient_above_0():
    control = KLControl(target=0.01, horizon=10)
    assert control.next(1.0, 0.0, 1000) == pytest.approx(0.8)
    smallest = 1e-300
    largest = 1e300
    for _ in range(500):
        smallest = control.next(smallest, 0.0, 1000)
        largest = control.next(largest, 1.0, 1000)
    for coefficient in (smallest, largest):  # in thousands of rollouts on one side of the target
        assert Algorithm(kl_coef=coefficient, kl_control=control).kl_coef == coefficient
    assert control.next(smallest, 1.0, 1000) > smallest


def test_the_entropy_coefficient_is_that_of_skywork():
    """Figures of `EntController(0, 0.02, 0, 0.005, 0.2)` of the released Skywork-OR1: what it adds to the loss."""
    control = EntropyControl(target=0.2, highest=0.02)
    coefficient = 0.0
    found = []
    for entropy in (0.5, 0.19, 0.1, 0.15, 0.25, 0.18, 0.1, 0.1, 0.3):
        coefficient = control.next(coefficient, entropy)
        found.append(coefficient if control.applies(entropy) else 0.0)
    assert found == pytest.approx([0.0, 0.005, 0.01, 0.015, 0.0, 0.015, 0.02, 0.02, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "decays"),
    [
        (MovingReference(alpha=0.25, every_n_steps=1), [0.75] * 4),
        (MovingReference(alpha=1.0, every_n_steps=2), [None, 0.0, None, 0.0]),
    ],
    ids=["soft", "hard"],
)
def test_a_reference_moves_at_every_so_manieth_step(rule, decays):
    assert [rule.decay_at(step) for step in (1, 2, 3, 4)] == decays


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Algorithm(kl_control=KLControl(0.01)), r"kl_control .* got kl_coef=0"),
        (lambda: MovingReference(alpha=1.5), r"model\.algorithm\.moving_reference\.alpha .* at most 1, got 1\.5"),
        (lambda: KLControl(target=0.0), r"model\.algorithm\.kl_control\.target must be above 0, got 0\.0"),
        (lambda: EntropyControl(0.2, lowest=0.5, highest=0.1), r"lowest must not be above highest, got 0\.5 and 0\.1"),
        (lambda: check_reference(MovingReference(), is_needed=False), r"moving_reference .* kl_coef=0 has none"),
        (lambda: Algorithm(entropy_coef=0.1).validate_steps(4, 1), r"entropy no training changes"),
    ],
)
def test_what_moves_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_controls_go_with_kl_in_the_reward():
    Algorithm(kl=k1, kl_coef=0.1, kl_placement="reward", kl_control=KLControl(0.01)).validate(SAMPLING, 2)
