"""The tokens of highest entropy of a step, against sorting, whatever the ranks."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.algorithms import Algorithm, high_entropy, single_rank
from longrl.types import SamplingParams


def chosen_by_sorting(entropies, counted, share):
    values = sorted((e for e, c in zip(entropies, counted, strict=True) if c), reverse=True)
    if not values:
        return [False] * len(counted), 0.0
    threshold = values[math.floor(share * (len(values) - 1))]
    return [c and e >= threshold for e, c in zip(entropies, counted, strict=True)], threshold


ENTROPIES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-30, 0.1, 0.1000001, 1.0, 2.5, 11.9]) | st.floats(0, 12, width=32), st.booleans()
    ),
    max_size=30,
)


@given(tokens=ENTROPIES, share=st.sampled_from([0.05, 0.2, 0.5, 1.0]))
def test_as_many_as_the_share_says_and_those_of_highest_entropy(tokens, share):
    entropies = torch.tensor([e for e, _ in tokens], dtype=torch.float32)
    counted = torch.tensor([c for _, c in tokens], dtype=torch.bool)
    expected, threshold = chosen_by_sorting(entropies.tolist(), counted.tolist(), share)
    found = high_entropy(entropies, counted, share)
    assert found.chosen.tolist() == expected
    assert found.threshold.item() == threshold


def test_ten_tokens_of_which_two_learn():
    entropies = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.3, 0.4, 0.0, 5.0, 0.5])
    counted = torch.ones(10, dtype=torch.bool)
    counted[8] = False  # has no weight
    found = high_entropy(entropies, counted, 0.2)
    assert found.chosen.nonzero().flatten().tolist() == [1, 3]
    assert found.threshold == entropies[3]


def test_ranks_have_one_threshold_and_one_may_have_no_token(over_ranks):
    generator = torch.Generator().manual_seed(1)
    entropies = torch.rand(50, generator=generator) * 3
    counted = torch.rand(50, generator=generator) > 0.3
    whole = high_entropy(entropies, counted, 0.2)
    parts = [slice(0, 3), slice(3, 3), slice(3, 40), slice(40, 50)]
    found = over_ranks(lambda rows, sums: high_entropy(entropies[rows], counted[rows], 0.2, sums), parts)
    assert torch.equal(torch.cat([one.chosen for one in found]), whole.chosen)
    assert {one.threshold.item() for one in found} == {whole.threshold.item()}
    alone = torch.cat([high_entropy(entropies[rows], counted[rows], 0.2, single_rank).chosen for rows in parts])
    assert not torch.equal(alone, whole.chosen)


def test_what_is_no_number_has_no_entropy():
    entropies = torch.tensor([math.nan, 1.0, -1e-8, 0.5])
    found = high_entropy(entropies, torch.ones(4, dtype=torch.bool), 0.4)
    assert found.chosen.tolist() == [False, True, False, True]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_must_be_one(share):
    with pytest.raises(ValueError, match=r"model\.algorithm\.top_entropy_share must be above 0 and at most 1"):
        Algorithm(top_entropy_share=share)


def test_denoising_steps_have_one_entropy():
    Algorithm(top_entropy_share=0.2).validate(SamplingParams(2), 1)
    with pytest.raises(ValueError, match=r"whose entropies are equal, got top_entropy_share=0\.2; set .* to 1"):
        Algorithm(top_entropy_share=0.2).validate_steps(2, 1)
